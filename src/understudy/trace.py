"""Routing traces: what a model's routers chose, token by token, in one Parquet file.

Knows: the columns, how events become rows and rows events, the public CSV route format. Does not
know: models, policies, who recorded.

One row per (sequence, step, MoE layer, token), in the order in which the events happened; an event
begins where ``token`` is 0:

    sequence, step      int32    which text; which forward pass of the model
    layer               int16    MoE layers, counted from 0
    token               int32    row of the event: 0 while decoding, 0.. in a prompt
    request             int32    whose token                                     (null: not known)
    phase               string   "prefill" or "decode"
    ids, weights        lists    the router's choice, one entry per rank, before any route transform
    scores              list     the router's probability of every expert        (null: not asked)
    foretold_ids, foretold_weights    what the layer before foresaw of this one  (null: nothing)
    next_layers, next_ids, next_weights    what was foreseen here of later layers: per entry the
                                 layer, the expert and its weight                (null: nothing)

Metadata ``understudy_trace``: JSON with the format's version and the model's `Shape`. Measured
costs are no part of a trace: they belong to the machine, not to the model.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from understudy.core import NOBODY, LayerEvent, Phase, UnderstudyError

VERSION = 1
KEY = b"understudy_trace"
ROWS = 100_000  # per row group

SCHEMA = pa.schema(
    [
        ("sequence", pa.int32()),
        ("step", pa.int32()),
        ("layer", pa.int16()),
        ("token", pa.int32()),
        ("request", pa.int32()),
        ("phase", pa.dictionary(pa.int8(), pa.string())),
        ("ids", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),
        ("scores", pa.list_(pa.float32())),
        ("foretold_ids", pa.list_(pa.int32())),
        ("foretold_weights", pa.list_(pa.float32())),
        ("next_layers", pa.list_(pa.int16())),
        ("next_ids", pa.list_(pa.int32())),
        ("next_weights", pa.list_(pa.float32())),
    ]
)


class TraceError(UnderstudyError):
    """The file is no trace, or a damaged one."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The model that was traced. ``experts`` and ``expert_bytes``: one number per MoE layer.
    ``source``: how the trace was made, or the file that it was imported from; ``date``: when it was
    recorded, as YYYY-MM-DD."""

    model: str
    experts: tuple[int, ...]
    top_k: int
    expert_bytes: tuple[int, ...]
    format: str = "stored"
    source: str = ""
    hidden: int | None = None
    date: str = ""

    @property
    def layers(self) -> int:
        return len(self.experts)

    @property
    def all_bytes(self) -> int:
        """Of all experts."""
        pairs = zip(self.experts, self.expert_bytes, strict=True)
        return sum(count * size for count, size in pairs)


@dataclass(slots=True)
class Trace:
    """``sequences``: the number of the text that each event belongs to."""

    shape: Shape
    events: list[LayerEvent] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)

    def by_sequence(self) -> Iterator[list[LayerEvent]]:
        """The events of each text."""
        start = 0
        for end in range(1, len(self.events) + 1):
            if end == len(self.events) or self.sequences[end] != self.sequences[start]:
                yield self.events[start:end]
                start = end


# --------------------------------------------------------------------------------------- writing


def write(path: str | Path, shape: Shape, sequences: Iterable[Sequence[LayerEvent]]) -> int:
    """Write the events of each sequence; whole or not at all. Returns the number of rows.

    Row by row into groups: a long trace never lies in memory at once.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    about = json.dumps({"version": VERSION, **asdict(shape)}).encode()
    schema = SCHEMA.with_metadata({KEY: about})
    rows, written = _empty(), 0
    try:
        with pq.ParquetWriter(part, schema, compression="zstd") as writer:
            for number, events in enumerate(sequences):
                for event in events:
                    _add(rows, number, event)
                    if len(rows["ids"]) >= ROWS:
                        written += _flush(writer, schema, rows)
            written += _flush(writer, schema, rows)
        os.replace(part, path)
    except OSError as e:
        raise TraceError(f"cannot write {path}: {e.strerror or e}") from e
    finally:
        part.unlink(missing_ok=True)
    return written


def _empty() -> dict[str, list[Any]]:
    return {name: [] for name in SCHEMA.names}


def _add(rows: dict[str, list[Any]], sequence: int, event: LayerEvent) -> None:
    count = len(event.ids)
    nothing = [None] * count
    single = {
        "sequence": sequence,
        "step": event.step,
        "layer": event.layer,
        "phase": event.phase.value,
    }
    for name, value in single.items():
        rows[name] += [value] * count
    rows["token"] += range(count)
    rows["request"] += event.requests or nothing
    rows["ids"] += event.ids
    rows["weights"] += list(event.weights) or nothing
    rows["scores"] += nothing if event.scores is None else event.scores
    ids, weights = event.foretold or (nothing, nothing)
    rows["foretold_ids"] += ids
    rows["foretold_weights"] += list(weights)
    if not event.lookahead:
        for name in _NEXT:
            rows[name] += nothing
        return
    for name, column in zip(_NEXT, _side_by_side(event), strict=True):
        rows[name] += column


_NEXT = ("next_layers", "next_ids", "next_weights")


def _side_by_side(event: LayerEvent) -> tuple[list[Any], list[Any], list[Any]]:
    """The look-ahead of each token, its layers one after the other in one list."""
    layers: list[list[int]] = [[] for _ in event.ids]
    experts: list[list[int]] = [[] for _ in event.ids]
    weights: list[list[float]] = [[] for _ in event.ids]
    for layer, (said, weighed) in event.lookahead.items():
        for token, (row, values) in enumerate(zip(said, weighed, strict=True)):
            layers[token] += [layer] * len(row)
            experts[token] += row
            weights[token] += values
    return layers, experts, weights


def _flush(writer: Any, schema: Any, rows: dict[str, list[Any]]) -> int:
    count = len(rows["ids"])
    if count:
        writer.write_table(pa.table(rows, schema=schema))
    for column in rows.values():
        column.clear()
    return count


# --------------------------------------------------------------------------------------- reading


def read(path: str | Path) -> Trace:
    """Events equal to those that were written, weights to float32. Raises `TraceError`."""
    if not Path(path).exists():
        raise TraceError(f"{path}: no such trace; record one with `understudy trace`")
    try:
        with pq.ParquetFile(path) as file:
            shape = _shape(path, file.schema_arrow.metadata or {})
            columns = _columns(path, file)
    except (pa.ArrowException, OSError) as e:
        first = str(e).splitlines()[0]
        raise TraceError(f"{path}: cannot be read as a trace ({first}); record it again") from e
    try:
        with _without_collector():
            return _events(shape, columns)
    except _Damaged as e:
        raise TraceError(f"{path}: {e}; record it again") from None


class _Damaged(Exception):
    """Parquet in order, but not what `write` writes."""


@contextmanager
def _without_collector() -> Iterator[None]:
    """Millions of small lists and no cycle among them: looking through all of them again and again
    takes longer than making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _shape(path: str | Path, metadata: Any) -> Shape:
    if KEY not in metadata:
        raise TraceError(f"{path}: not a trace; record one with `understudy trace`")
    try:
        told = dict(json.loads(metadata[KEY]))
        version = told.pop("version", None)
        if version == VERSION:
            for name in ("experts", "expert_bytes"):
                told[name] = tuple(map(int, told[name]))
            known = {f.name for f in fields(Shape)}
            return Shape(**{name: value for name, value in told.items() if name in known})
    except (ValueError, TypeError, KeyError) as e:
        raise TraceError(f"{path}: its metadata is damaged ({e}); record it again") from None
    raise TraceError(
        f"{path}: a trace of version {version}, and this program reads {VERSION}; record it again"
    )


def _columns(path: str | Path, file: Any) -> dict[str, Any]:
    """Name -> column, of the type that `SCHEMA` says; another writer may have widened it."""
    found = set(file.schema_arrow.names)
    if "next_layers" not in found and "next_ids" in found:
        found.add("next_layers")  # the first files kept one layer, and did not say which
    missing = [name for name in SCHEMA.names if name not in found]
    if missing:
        raise TraceError(f"{path}: lacks column {missing[0]}; record it again")
    table = file.read(columns=SCHEMA.names)
    columns = {}
    for name in table.column_names:
        column, wanted = table.column(name), SCHEMA.field(name).type
        if name == "phase":
            column, wanted = column.cast(pa.string()), pa.string()
        try:
            columns[name] = column if column.type == wanted else column.cast(wanted)
        except pa.ArrowException:
            raise TraceError(
                f"{path}: column {name} holds {column.type}, not {wanted}; record it again"
            ) from None
    return columns


def _events(shape: Shape, columns: dict[str, Any]) -> Trace:
    starts, single = _single(shape, columns)
    ends = [*starts[1:].tolist(), len(columns["token"])][: len(starts)]
    lists = {name: _lists(name, columns[name]) for name in ("ids", "weights", "scores")}
    pairs = [_lists(f"foretold_{name}", columns[f"foretold_{name}"]) for name in ("ids", "weights")]
    ahead = _Ahead(columns)
    _check_experts(shape, columns)
    ids, weights, scores = lists["ids"], lists["weights"], lists["scores"]
    if ids is None or any(row is None for row in ids):
        if len(starts):
            raise _Damaged("column ids holds nulls")
        ids = []
    requests = _requests(columns["request"], starts, ends)
    trace = Trace(shape, [], single["sequence"])
    add = trace.events.append
    for number, (a, b) in enumerate(zip(starts.tolist(), ends, strict=True)):
        add(
            LayerEvent(
                step=single["step"][number],
                layer=single["layer"][number],
                phase=single["phase"][number],
                ids=ids[a:b],
                weights=_part(weights, a, b) or (),
                requests=requests[number],
                scores=_part(scores, a, b),
                lookahead=ahead.of(a, b, single["layer"][number]),
                foretold=_pair(pairs, a, b),
            )
        )
    return trace


def _single(shape: Shape, columns: dict[str, Any]) -> tuple[Any, dict[str, list[Any]]]:
    """The row at which each event begins, and the values that an event has once."""
    names = ("token", "sequence", "step", "layer")
    for name in (*names, "phase"):
        if columns[name].null_count:
            raise _Damaged(f"column {name} holds nulls")
    values = {name: columns[name].to_numpy() for name in names}
    phase = columns["phase"].combine_chunks().dictionary_encode()
    values["phase"] = phase.indices.to_numpy()
    token = values["token"]
    starts = np.flatnonzero(token == 0)
    number = np.cumsum(token == 0) - 1
    whole = len(token) == 0 or (
        token[0] == 0 and np.array_equal(token, np.arange(len(token)) - starts[number])
    )
    if not whole or any(
        (values[n] != values[n][starts][number]).any() for n in values if n != "token"
    ):
        raise _Damaged("the rows of an event are not beside each other, in order")
    if len(token) and not (0 <= values["layer"].min() <= values["layer"].max() < shape.layers):
        raise _Damaged(f"a row names a layer that is none of its {shape.layers}")
    single = {name: values[name][starts].tolist() for name in values if name != "token"}
    try:
        phases = [Phase(name) for name in phase.dictionary.to_pylist()]
    except ValueError as e:
        raise _Damaged(f"column phase: {e}") from None
    single["phase"] = [phases[code] for code in single["phase"]]
    return starts, single


def _check_experts(shape: Shape, columns: dict[str, Any]) -> None:
    """Every expert named is one of its layer, or `NOBODY`."""
    experts = np.array(shape.experts)
    layers, ids = columns["layer"].to_numpy(), columns["ids"]
    most = np.repeat(experts[layers], _lengths(ids)) if len(layers) else experts[:0]
    named = np.concatenate([chunk.flatten().to_numpy() for chunk in ids.chunks] or [most])
    if ((named < NOBODY) | (named >= most)).any():
        wrong = int(named[(named < NOBODY) | (named >= most)][0])
        raise _Damaged(f"a row names expert {wrong}, which its layer does not have")


def _lengths(column: Any) -> Any:
    """Entries of each row, 0 where it is null."""
    lengths = [c.value_lengths().fill_null(0).to_numpy() for c in column.chunks]
    return np.concatenate(lengths or [np.zeros(0, int)])


def _lists(name: str, column: Any) -> list[Any] | None:
    """A list column as Python lists, ``None`` for null; ``None`` where every row is null. Through
    flat arrays: a Python object per cell from Arrow itself takes ten times as long."""
    if column.null_count == len(column):
        return None
    rows: list[Any] = []
    for chunk in column.chunks:
        flat = chunk.flatten()
        if flat.null_count:
            raise _Damaged(f"column {name} holds nulls in its lists")
        lengths = chunk.value_lengths().fill_null(0).to_numpy()
        values, width = flat.to_numpy(), int(lengths.max(initial=0))
        if width and chunk.null_count == 0 and (lengths == width).all():
            rows += values.reshape(-1, width).tolist()
            continue
        entries, ends = values.tolist(), np.cumsum(lengths).tolist()
        part: list[Any] = [entries[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        for place in np.flatnonzero(chunk.is_null().to_numpy(zero_copy_only=False)).tolist():
            part[place] = None
        rows += part
    return rows


def _part(rows: list[Any] | None, a: int, b: int) -> list[Any] | None:
    """Rows a..b, or ``None`` where there is nothing."""
    return None if rows is None or rows[a] is None else rows[a:b]


def _pair(columns: Sequence[list[Any] | None], a: int, b: int) -> Any:
    ids, weights = (_part(rows, a, b) for rows in columns)
    return None if ids is None or weights is None else (ids, weights)


def _requests(column: Any, starts: Any, ends: Sequence[int]) -> list[Sequence[int]]:
    """The requests of each event; events of one token that have the same share one list, as the
    events of one forward do when they are recorded."""
    known: dict[int | None, Sequence[int]] = {None: ()}
    found: list[Sequence[int]] = []
    rows = column.to_pylist()
    for a, b in zip(starts.tolist(), ends, strict=True):
        first = rows[a]
        if b - a == 1 or first is None:
            if first not in known:
                known[first] = [first]
            found.append(known[first])
        else:
            found.append(rows[a:b])
    return found


class _Ahead:
    """The look-ahead of any event."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self._ids, self._weights = (
            _lists(f"next_{name}", columns[f"next_{name}"]) for name in ("ids", "weights")
        )
        layers = columns.get("next_layers")
        if layers is not None and self._ids is not None and self._only_next(columns):
            layers = None
        self._layers = None if layers is None else _lists("next_layers", layers)

    @staticmethod
    def _only_next(columns: dict[str, Any]) -> bool:
        """Whether all that was foreseen is of the next layer: then nothing has to be sorted."""
        layers = columns["next_layers"]
        flat = [chunk.flatten().to_numpy() for chunk in layers.chunks]
        after = np.repeat(columns["layer"].to_numpy() + 1, _lengths(layers))
        return np.array_equal(np.concatenate(flat), after)

    def of(self, a: int, b: int, layer: int) -> dict[int, tuple[list[Any], list[Any]]]:
        pair = _pair((self._ids, self._weights), a, b)
        if pair is None:
            return {}
        if self._layers is None:
            return {layer + 1: pair}
        found: dict[int, tuple[list[Any], list[Any]]] = {}
        for row, (layers, ids, weights) in enumerate(zip(self._layers[a:b], *pair, strict=True)):
            for later, expert, weight in zip(layers, ids, weights, strict=True):
                said, weighed = found.setdefault(later, ([], []))
                if len(said) == row:
                    said.append([])
                    weighed.append([])
                said[row].append(expert)
                weighed[row].append(weight)
        return found


# ----------------------------------------------------------------------------------- route CSVs


def import_csv(path: str | Path) -> Trace:
    """The public route format of BigMoeOnEdge: comment lines with the shape, then one line per
    (turn, phase, step, layer, rank). A prompt's tokens of one layer become one event; a turn is a
    sequence.

    ``expert_bytes`` comes from the head of the file: the column is 0 where the expert was resident.
    Layers without experts are not counted.
    """
    routes = _Routes()
    number = 1  # of the line at which it went wrong; the end counts as one
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                routes.take(line.strip())
                number += 1
        return routes.trace(Path(path).name)
    except OSError as e:
        raise TraceError(f"{path}: cannot be read: {e.strerror}") from e
    except UnicodeDecodeError:
        raise TraceError(f"{path}: not a text file; a route CSV is expected") from None
    except _Damaged as e:
        raise TraceError(f"{path}: line {number}: {e}") from None


_WORD = re.compile(r"(\w+)=(.*?)(?=\s+\w+=|$)")  # the path of a model may hold blanks
_NEEDED = ("turn", "phase", "step", "layer", "slot", "expert", "weight")


class _Routes:
    """A route CSV, line by line."""

    def __init__(self) -> None:
        self._version = ""
        self._about: dict[str, str] = {}
        self._sizes: dict[int, int] = {}
        self._places: list[int] | None = None  # of the needed columns
        self._moe: dict[int, int] = {}  # decoder layer -> MoE layer
        self._events: dict[tuple[int, int, int], LayerEvent] = {}
        self._turns: list[int] = []
        self._prompts: dict[int, int] = {}  # turn -> first step of its prompt
        self._experts = self._top_k = 0

    def take(self, line: str) -> None:
        if line.startswith("#"):
            self._head(line[1:].strip())
        elif line and self._places is None:
            self._begin(line)
        elif line:
            self._row(line)

    def _head(self, line: str) -> None:
        if line.startswith("route_trace"):
            self._version = line
            return
        told = dict(_WORD.findall(line))
        if "layer" in told:
            self._sizes[_whole(told, "layer")] = _whole(told, "expert_bytes")
        else:
            self._about.update(told)

    def _begin(self, line: str) -> None:
        """The line that names the columns: the head is complete."""
        if self._version != "route_trace v1":
            raise _Damaged("not a route CSV: '# route_trace v1' is expected before the columns")
        names = line.split(",")
        missing = [name for name in _NEEDED if name not in names]
        if missing:
            raise _Damaged(f"column {missing[0]} is not among {line[:80]!r}")
        self._places = [names.index(name) for name in _NEEDED]
        self._experts = _whole(self._about, "n_expert")
        self._top_k = _whole(self._about, "n_expert_used")
        with_experts = sorted(layer for layer, size in self._sizes.items() if size)
        self._moe = {layer: number for number, layer in enumerate(with_experts)}

    def _row(self, line: str) -> None:
        assert self._places is not None
        cells = line.split(",")
        try:
            *whole, text = (cells[place] for place in self._places)
            turn, phase, step, layer, rank, expert = map(int, whole)
            weight = float(text)
        except (ValueError, IndexError):
            raise _Damaged(f"not {','.join(_NEEDED)}: {line[:60]!r}") from None
        if phase not in (0, 1) or not math.isfinite(weight):
            raise _Damaged("phase is 0 (prompt) or 1 (decode) and weight a number")
        if layer not in self._moe:
            raise _Damaged(f"layer {layer} has no expert_bytes in the head")
        if not 0 <= expert < self._experts:
            raise _Damaged(f"there is no expert {expert} among {self._experts}")
        event = self._event(turn, phase, step, self._moe[layer])
        self._pair(event, rank, expert, weight)

    def _event(self, turn: int, phase: int, step: int, layer: int) -> LayerEvent:
        if phase == 0:
            step = self._prompts.setdefault(turn, step)
        key = turn, step, layer
        event = self._events.get(key)
        if event is None:
            kind = Phase.DECODE if phase else Phase.PREFILL
            event = self._events[key] = LayerEvent(step, layer, kind, [], [])
            self._turns.append(turn)
        return event

    def _pair(self, event: LayerEvent, rank: int, expert: int, weight: float) -> None:
        """One rank of one token; ranks come in order, and tokens whole."""
        ids: Any = event.ids
        weights: Any = event.weights
        have = len(ids[-1]) if ids else self._top_k
        if rank == 0 and have == self._top_k and not (ids and event.phase is Phase.DECODE):
            ids.append([])
            weights.append([])
        elif rank != have or rank == self._top_k:
            expected = have if have < self._top_k else 0
            raise _Damaged(f"slot {expected} of a new or begun token is expected, not {rank}")
        if expert in ids[-1]:
            raise _Damaged(f"expert {expert} is named twice by one token")
        ids[-1].append(expert)
        weights[-1].append(float(np.float32(weight)))

    def trace(self, name: str) -> Trace:
        """All of it, once the last line was taken."""
        if not self._events:
            raise _Damaged("not a route CSV: it ends without a row")
        for event in self._events.values():
            if len(event.ids[-1]) != self._top_k:
                raise _Damaged(f"the file ends within a token of step {event.step}")
        shape = Shape(
            model=Path(self._about.get("model", "imported")).stem,
            experts=(self._experts,) * len(self._moe),
            top_k=self._top_k,
            expert_bytes=tuple(self._sizes[layer] for layer in self._moe),
            format="as imported",
            source=name,
        )
        return Trace(shape, list(self._events.values()), self._turns)


def _whole(told: dict[str, str], name: str) -> int:
    """A number of the head that has to be there."""
    try:
        value = int(told[name])
    except KeyError:
        raise _Damaged(f"not a route CSV: the head does not tell {name}") from None
    except ValueError:
        raise _Damaged(f"{name} is {told[name]!r}, not a whole number") from None
    if value < 0:
        raise _Damaged(f"{name} is {value}, and cannot be negative")
    return value
