"""Routing traces: what a model's routers chose, token by token, in one Parquet file.

Knows: the columns, how events become rows and rows events, the public CSV route format. Does not
know: models, policies, who recorded.

One row per (sequence, step, MoE layer, token), in the order in which the events happened:

    sequence, step      int32    which text; which forward pass of the model
    layer               int16    MoE layers, counted from 0
    token               int32    row of the event: 0 while decoding, 0.. in a prompt
    request             int32    whose token
    phase               string   "prefill" or "decode"
    ids, weights        lists    the router's choice, one entry per rank, before any route transform
    scores              list     the router's probability of every expert        (null: not asked)
    foretold_ids, foretold_weights    what the layer before foresaw of this one  (null: nothing)
    next_ids, next_weights            what was foreseen here of the next layer   (null: nothing)

Metadata ``understudy_trace``: JSON with the format's version and the model's `Shape`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from understudy.core import LayerEvent, Phase, UnderstudyError

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
        ("next_ids", pa.list_(pa.int32())),
        ("next_weights", pa.list_(pa.float32())),
    ]
)


class TraceError(UnderstudyError):
    """The file is no trace, or a damaged one."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The model that was traced. ``experts`` and ``expert_bytes``: one number per MoE layer."""

    model: str
    experts: tuple[int, ...]
    top_k: int
    expert_bytes: tuple[int, ...]
    format: str = "stored"
    source: str = ""

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
    after = event.lookahead.get(event.layer + 1)
    single = {
        "sequence": sequence,
        "step": event.step,
        "layer": event.layer,
        "phase": event.phase.value,
    }
    for name, value in single.items():
        rows[name] += [value] * count
    rows["token"] += range(count)
    rows["request"] += list(event.requests) or [0] * count
    rows["ids"] += event.ids
    rows["weights"] += list(event.weights) or [None] * count
    rows["scores"] += event.scores if event.scores is not None else [None] * count
    for name, pair in (("foretold", event.foretold), ("next", after)):
        ids, weights = pair if pair is not None else ([None] * count, [None] * count)
        rows[f"{name}_ids"] += list(ids)
        rows[f"{name}_weights"] += list(weights)


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
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise TraceError(f"{path}: no such trace; record one with `understudy trace`") from None
    except (pa.ArrowException, OSError) as e:
        first = str(e).splitlines()[0]
        raise TraceError(f"{path}: cannot be read as a trace ({first}); record it again") from e
    shape = _shape(path, table.schema.metadata or {})
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise TraceError(f"{path}: lacks column {missing[0]}; record it again")
    return _events(shape, table)


def _shape(path: str | Path, metadata: Any) -> Shape:
    if KEY not in metadata:
        raise TraceError(f"{path}: not a trace; record one with `understudy trace`")
    told = json.loads(metadata[KEY])
    version = told.pop("version", None)
    if version != VERSION:
        raise TraceError(
            f"{path}: a trace of version {version}, and this program reads {VERSION}; record it "
            "again"
        )
    for name in ("experts", "expert_bytes"):
        told[name] = tuple(told[name])
    return Shape(**told)


def _events(shape: Shape, table: Any) -> Trace:
    """Rows of one (sequence, step, layer) are one event."""
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    sequence, step, layer = (columns[n].to_numpy() for n in ("sequence", "step", "layer"))
    # Layers of one step differ, and so do steps of one layer: a new event begins where any changes.
    new = np.flatnonzero((np.diff(sequence) != 0) | (np.diff(step) != 0) | (np.diff(layer) != 0))
    starts = [0, *(new + 1).tolist()] if len(table) else []
    ends = [*starts[1:], len(table)]
    lists = {n: _lists(columns[n]) for n in SCHEMA.names[6:]}
    phase = columns["phase"].to_pylist()
    request = columns["request"].to_pylist()
    sequence, step, layer = sequence.tolist(), step.tolist(), layer.tolist()
    trace = Trace(shape)
    for a, b in zip(starts, ends, strict=True):
        part = {name: rows[a:b] if rows is not None else None for name, rows in lists.items()}
        after = _pair(part, "next")
        trace.events.append(
            LayerEvent(
                step=step[a],
                layer=layer[a],
                phase=_PHASES[phase[a]],
                ids=part["ids"] or (),
                weights=part["weights"] or (),
                requests=request[a:b],
                scores=_whole(part["scores"]),
                lookahead={} if after is None else {layer[a] + 1: after},
                foretold=_pair(part, "foretold"),
            )
        )
        trace.sequences.append(sequence[a])
    return trace


_PHASES = {phase.value: phase for phase in Phase}


def _lists(column: Any) -> list[Any] | None:
    """A list column as Python lists, ``None`` for null; ``None`` where every row is null. Through
    one flat list: a Python object per cell from Arrow itself takes ten times as long."""
    if column.null_count == len(column):
        return None
    flat = column.flatten().to_numpy(zero_copy_only=False).tolist()
    ends = np.cumsum(np.where(column.is_valid(), column.value_lengths().fill_null(0), 0)).tolist()
    rows: list[Any] = [flat[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    if column.null_count:
        for place in np.flatnonzero(~column.is_valid().to_numpy(zero_copy_only=False)).tolist():
            rows[place] = None
    return rows


def _whole(rows: list[Any] | None) -> list[Any] | None:
    return None if rows is None or None in rows else rows


def _pair(part: dict[str, Any], name: str) -> tuple[list[Any], list[Any]] | None:
    ids, weights = _whole(part[f"{name}_ids"]), _whole(part[f"{name}_weights"])
    return None if ids is None or weights is None else (ids, weights)


# ----------------------------------------------------------------------------------- route CSVs


def import_csv(path: str | Path) -> Trace:
    """The public route format of BigMoeOnEdge: comment lines with the shape, then one line per
    (turn, phase, step, layer, rank). A prompt's tokens of one layer become one event.

    ``expert_bytes`` comes from the head of the file: the column is 0 where the expert was resident.
    """
    sizes: dict[int, int] = {}
    about: dict[str, str] = {}
    order: dict[tuple[int, int, int], LayerEvent] = {}
    turns: list[int] = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                _csv_line(path, number, line.strip(), about, sizes, order, turns)
    except OSError as e:
        raise TraceError(f"{path}: cannot be read: {e.strerror}") from e
    except UnicodeDecodeError:
        raise TraceError(f"{path}: not a text file; a route CSV is expected") from None
    if not order or not sizes or "n_expert" not in about:
        raise TraceError(f"{path}: not a route CSV: its head or its rows are missing")
    layers = max(sizes) + 1
    shape = Shape(
        model=Path(about.get("model", "imported")).stem,
        experts=(int(about["n_expert"]),) * layers,
        top_k=int(about["n_expert_used"]),
        expert_bytes=tuple(sizes[layer] for layer in range(layers)),
        format="as imported",
        source=Path(path).name,
    )
    return Trace(shape, list(order.values()), turns)


def _csv_line(
    path: str | Path, number: int, line: str, about: dict[str, str], sizes: dict[int, int],
    order: dict[tuple[int, int, int], LayerEvent], turns: list[int],
) -> None:  # fmt: skip
    if line.startswith("#"):
        told = dict(word.split("=", 1) for word in line[1:].split() if "=" in word)
        if "layer" in told:
            sizes[int(told["layer"])] = int(told["expert_bytes"])
        about.update(told)
        return
    if not line or line.startswith("turn,"):
        return
    try:
        turn, phase, step, layer, rank, expert = map(int, line.split(",")[:6])
        weight = float(line.split(",")[6])
    except (ValueError, IndexError):
        raise TraceError(
            f"{path}: line {number} is not turn,phase,step,layer,...: {line[:60]!r}"
        ) from None
    key = turn, -1 if phase == 0 else step, layer
    event = order.get(key)
    if event is None:
        kind = Phase.PREFILL if phase == 0 else Phase.DECODE
        event = order[key] = LayerEvent(0 if phase == 0 else step, layer, kind, [], [])
        turns.append(turn)
    if rank == 0:
        event.ids.append([])  # type: ignore[attr-defined]
        event.weights.append([])  # type: ignore[attr-defined]
    if not event.ids:
        raise TraceError(f"{path}: line {number}: rank {rank} comes before rank 0")
    event.ids[-1].append(expert)  # type: ignore[attr-defined]
    event.weights[-1].append(weight)  # type: ignore[attr-defined]
