"""A trace that is read is the trace that was written; foreign and damaged files are refused."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from understudy import trace
from understudy.core import NOBODY, LayerEvent, Phase
from understudy.trace import KEY, Shape, TraceError, import_csv, read, write

QWEN = "shared/data/traces/qwen3-30b-a3b/qwen.route.csv"  # beside or above the repository
SHAPE = Shape("toy", (6, 6, 6), 2, (10, 10, 12), "stored", "made up", 48, "2026-11-26")


def near(value: float) -> float:
    return float(np.float32(value))


def made_up(seed: int, deep: bool = False) -> list[LayerEvent]:
    """A prompt of some tokens, then single ones; with and without what is optional. ``deep``: some
    look two layers ahead, with fewer experts for the second."""
    rng = random.Random(seed)
    events = []
    for step in range(4):
        tokens = rng.randint(2, 5) if step == 0 else 1
        for layer in range(3):
            ids = [rng.sample(range(6), 2) for _ in range(tokens)]
            weights = [[near(rng.random()) for _ in range(2)] for _ in range(tokens)]
            event = LayerEvent(step, layer, Phase.DECODE if step else Phase.PREFILL, ids, weights)
            event.requests = [rng.randint(0, 1) for _ in range(tokens)] if seed % 4 else ()
            if rng.random() < 0.5:
                event.scores = [[near(rng.random()) for _ in range(6)] for _ in range(tokens)]
            if rng.random() < 0.5:
                event.foretold = ids[::-1], weights
            if layer < 2 and rng.random() < 0.5:
                event.lookahead = {layer + 1: (ids, weights[::-1])}
                if deep and layer == 0:
                    event.lookahead[2] = [row[:1] for row in ids], [row[:1] for row in weights]
            events.append(event)
    return events


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    for seed in range(20):
        texts = [made_up(3 * seed + n, deep=seed % 2 == 0) for n in range(3)]
        rows = write(tmp_path / "t.parquet", SHAPE, texts)
        found = read(tmp_path / "t.parquet")
        assert found.shape == SHAPE
        assert list(found.by_sequence()) == texts
        assert rows == sum(len(e.ids) for text in texts for e in text)
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_columns_that_nobody_asked_for_cost_nothing_to_read(tmp_path: Path) -> None:
    """Not a timed test: it shows that a long trace is read in pieces, not cell by cell."""
    events = [
        LayerEvent(s, layer, Phase.DECODE, [[0, 1]], [[0.5, 0.5]], [0])
        for s in range(2000)
        for layer in range(3)
    ]
    write(tmp_path / "t.parquet", SHAPE, [events])
    assert read(tmp_path / "t.parquet").events == events


def test_rows_of_several_groups_are_one_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row groups end anywhere between events; lists of later groups are not those of the first."""
    monkeypatch.setattr(trace, "ROWS", 3)
    texts = [made_up(n, deep=True) for n in (1, 2, 4)]
    write(tmp_path / "t.parquet", SHAPE, texts)
    assert pq.ParquetFile(tmp_path / "t.parquet").num_row_groups > 5
    assert list(read(tmp_path / "t.parquet").by_sequence()) == texts


def test_events_of_one_step_and_layer_stay_apart(tmp_path: Path) -> None:
    """Two prompts read in one forward each, both called step 0 by whoever recorded them."""
    events = [LayerEvent(0, 0, Phase.PREFILL, [[0, 1], [2, 3]], requests=[0, 0]) for _ in range(2)]
    events += [LayerEvent(0, 0, Phase.DECODE, [[NOBODY, 5]], [[0.0, 1.0]])]
    write(tmp_path / "t.parquet", SHAPE, [events])
    assert read(tmp_path / "t.parquet").events == events


def test_an_empty_trace(tmp_path: Path) -> None:
    assert write(tmp_path / "t.parquet", SHAPE, []) == 0
    found = read(tmp_path / "t.parquet")
    assert (found.shape, found.events, found.sequences) == (SHAPE, [], [])


def test_wider_columns_of_another_writer_are_read(tmp_path: Path) -> None:
    path, events = tmp_path / "t.parquet", made_up(1)
    write(path, SHAPE, [events])
    table = pq.read_table(path)
    wide = {"step": pa.int64(), "phase": pa.string(), "weights": pa.list_(pa.float64())}
    for name, kind in wide.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, table.column(name).cast(kind))
    pq.write_table(table, path)
    assert read(path).events == events


def test_files_that_name_no_layers_ahead_meant_the_next(tmp_path: Path) -> None:
    path, events = tmp_path / "t.parquet", made_up(1)
    assert any(event.lookahead for event in events)
    write(path, SHAPE, [events])
    pq.write_table(pq.read_table(path).drop_columns(["next_layers"]), path)
    assert read(path).events == events


def changed(table: pa.Table, name: str, values: list[object], kind: pa.DataType) -> pa.Table:
    """The table with other values in the first rows of one column."""
    column = [*values, *table.column(name).to_pylist()[len(values) :]]
    return table.set_column(table.column_names.index(name), name, pa.array(column, kind))


@pytest.mark.parametrize(
    ("name", "values", "kind", "complaint"),
    [
        ("ids", ["a"] * 99, pa.string(), "column ids holds string, not list<"),
        ("ids", [None], pa.list_(pa.int32()), "column ids holds nulls"),
        ("ids", [[0, None]], pa.list_(pa.int32()), "column ids holds nulls in its lists"),
        ("ids", [[0, 6]], pa.list_(pa.int32()), "names expert 6, which its layer does not have"),
        ("step", [None], pa.int32(), "column step holds nulls"),
        ("layer", [9], pa.int16(), "the rows of an event are not beside each other"),
        ("layer", [9] * 99, pa.int16(), "names a layer that is none of its 3"),
        ("token", [1], pa.int32(), "the rows of an event are not beside each other"),
        ("phase", ["warm-up"] * 99, pa.string(), "column phase: 'warm-up' is not a valid Phase"),
    ],
)
def test_columns_that_cannot_be_are_refused(
    tmp_path: Path, name: str, values: list[object], kind: pa.DataType, complaint: str
) -> None:
    path = tmp_path / "t.parquet"
    write(path, SHAPE, [made_up(1)])
    table = pq.read_table(path)
    pq.write_table(changed(table, name, values[: len(table)], kind), path)
    with pytest.raises(TraceError, match=complaint) as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("about", [b"{", b"[]", b'{"version": 1}', b'{"version": 1, "experts": 3}'])
def test_damaged_metadata_is_refused(tmp_path: Path, about: bytes) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({KEY: about}), path)
    with pytest.raises(TraceError, match=r"metadata is damaged|of version None"):
        read(path)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def breaks() -> object:
        yield made_up(1)
        raise RuntimeError("the model went away")

    with pytest.raises(RuntimeError):
        write(tmp_path / "t.parquet", SHAPE, breaks())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such trace"):
        read(tmp_path / "none")
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": [1]}), other)
    with pytest.raises(TraceError, match="not a trace"):
        read(other)
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({KEY: b'{"version": 9}'}), other)
    with pytest.raises(TraceError, match="version 9, and this program reads 1"):
        read(other)
    whole = tmp_path / "t.parquet"
    write(whole, SHAPE, [made_up(1)])
    table = pq.read_table(whole)
    pq.write_table(table.drop_columns(["weights"]), other)
    with pytest.raises(TraceError, match="lacks column weights"):
        read(other)
    content = whole.read_bytes()
    for kept in (0, 3, len(content) // 2, len(content) - 20):
        whole.write_bytes(content[:kept])
        with pytest.raises(TraceError, match="cannot be read as a trace"):
            read(whole)
    with pytest.raises(TraceError, match="cannot be read as a trace"):
        read(tmp_path)


# -------------------------------------------------------------------------------------------- CSV

HEAD = """# route_trace v1
# model=/data/Toy-30B.gguf arch=toy n_layer=2 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=100 dense_bytes=5
# layer=1 expert_bytes=120 dense_bytes=5
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
"""
ROWS = """0,0,0,0,0,3,0.5,0,100
0,0,0,0,1,1,0.25,0,100
0,0,1,0,0,2,0.5,0,100
0,0,1,0,1,3,0.5,1,0
0,0,0,1,0,0,1.0,0,120
0,0,0,1,1,1,0.0,0,120
0,1,2,0,0,3,0.5,1,0
0,1,2,0,1,0,0.5,0,100
"""


def test_a_prompt_of_a_route_csv_is_one_event_per_layer(tmp_path: Path) -> None:
    path = tmp_path / "route.csv"
    path.write_text(HEAD + ROWS)
    found = import_csv(path)
    assert found.shape.model == "Toy-30B"
    assert found.shape.experts == (4, 4)
    assert found.shape.expert_bytes == (100, 120)
    assert found.shape.all_bytes == 880
    told = [(e.step, e.layer, e.phase, e.ids, e.weights) for e in found.events]
    assert told == [
        (0, 0, Phase.PREFILL, [[3, 1], [2, 3]], [[0.5, 0.25], [0.5, 0.5]]),
        (0, 1, Phase.PREFILL, [[0, 1]], [[1.0, 0.0]]),
        (2, 0, Phase.DECODE, [[3, 0]], [[0.5, 0.5]]),
    ]
    write(tmp_path / "t.parquet", found.shape, found.by_sequence())
    assert [e.ids for e in read(tmp_path / "t.parquet").events] == [e.ids for e in found.events]


def test_a_prompt_with_fewer_tokens_in_its_last_layer(tmp_path: Path) -> None:
    """Engines drop the tokens that only the last layer does not need any more."""
    path = tmp_path / "route.csv"
    path.write_text(HEAD + ROWS)
    prompt = [e for e in import_csv(path).events if e.phase is Phase.PREFILL]
    assert [len(e.ids) for e in prompt] == [2, 1]


def test_layers_without_experts_are_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "route.csv"
    head = HEAD.replace("layer=0 expert_bytes=100", "layer=0 expert_bytes=0")
    path.write_text(head + "0,1,2,1,0,3,0.5,1,0\n0,1,2,1,1,0,0.5,0,100\n")
    found = import_csv(path)
    assert (found.shape.expert_bytes, [e.layer for e in found.events]) == ((120,), [0])


def test_turns_are_sequences_and_a_prompt_keeps_its_first_step(tmp_path: Path) -> None:
    path = tmp_path / "route.csv"
    path.write_text(HEAD + ROWS + "1,0,7,0,0,1,0.1,0,9\n1,0,7,0,1,2,0.1,0,9\n")
    found = import_csv(path)
    assert found.sequences == [0, 0, 0, 1]
    assert found.events[-1].step == 7
    assert found.events[-1].weights == [[near(0.1), near(0.1)]]


def test_columns_are_found_by_name_and_a_model_path_may_hold_blanks(tmp_path: Path) -> None:
    path = tmp_path / "route.csv"
    head = HEAD.replace("turn,phase", "note,turn,phase").replace("Toy-30B", "My Toy")
    path.write_text(head + "x,0,1,2,0,0,3,0.5,1,0\nx,0,1,2,0,1,0,0.25,0,100\n")
    found = import_csv(path)
    assert (found.shape.model, found.shape.top_k) == ("My Toy", 2)
    assert [(e.ids, e.weights) for e in found.events] == [([[3, 0]], [[0.5, 0.25]])]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "line 1: not a route CSV"),
        (HEAD, "line 6: not a route CSV: it ends without a row"),
        ("a,b\n1,2\n", "line 1: not a route CSV"),
        (HEAD.replace(" v1", " v2"), "line 5: not a route CSV: '# route_trace v1' is expected"),
        (HEAD.replace("n_expert=4 ", ""), "line 5: not a route CSV: the head does not tell n_exp"),
        (HEAD.replace("n_expert=4", "n_expert=4x"), "line 5: n_expert is '4x', not a whole number"),
        (HEAD.replace("expert_bytes=120", ""), "line 4: .* does not tell expert_bytes"),
        (HEAD.replace(",weight", ""), "line 5: column weight is not among"),
        (HEAD + "0,0,0,0,zero,3,0.5\n", "line 6: not turn,phase,step,layer,slot,expert,weight"),
        (HEAD + "0,0,0,0,0\n", "line 6: not turn,phase,step,layer,slot,expert,weight"),
        (HEAD + "0,0,0,0,0,3,nan,0,0\n", "line 6: phase is 0"),
        (HEAD + "0,2,0,0,0,3,0.5,0,0\n", "line 6: phase is 0"),
        (HEAD + "0,0,0,2,0,3,0.5,0,0\n", "line 6: layer 2 has no expert_bytes"),
        (HEAD + "0,0,0,0,0,4,0.5,0,0\n", "line 6: there is no expert 4 among 4"),
        (HEAD + "0,0,0,0,1,3,0.5,0,0\n", "line 6: slot 0 of a new or begun token"),
        (HEAD + ROWS + "0,1,2,0,2,2,0.5,0,0\n", "line 14: slot 0 of a new or begun token"),
        (HEAD + ROWS + "0,1,2,0,0,2,0.5,0,0\n", "line 14: slot 0 of a new or begun token"),
        (HEAD + "0,0,0,0,0,3,0.5,0,0\n0,0,1,0,0,3,0.5,0,0\n", "line 7: slot 1 of a new or begun"),
        (HEAD + "0,0,0,0,0,3,0.5,0,0\n0,0,0,0,1,3,0.5,0,0\n", "line 7: expert 3 is named twice"),
        (HEAD + ROWS + "0,1,3,0,0,2,0.5,0,0\n", "line 15: the file ends within a token of step 3"),
    ],
)
def test_a_bad_csv_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "route.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=complaint) as error:
        import_csv(path)
    assert "\n" not in str(error.value)


def test_the_public_trace_of_qwen3(tmp_path: Path) -> None:
    file = next((f / QWEN for f in Path(__file__).parents if (f / QWEN).is_file()), None)
    if file is None:
        pytest.skip(f"{QWEN} is not here")
    found = import_csv(file)
    prompt = [e for e in found.events if e.phase is Phase.PREFILL]
    assert (found.shape.layers, found.shape.top_k, set(found.shape.experts)) == (48, 6, {128})
    assert [len(e.ids) for e in prompt] == [28] * 47 + [1]
    assert len(found.events) - len(prompt) == 128 * 48
    assert {len(row) for e in found.events for row in e.ids} == {6}
    write(tmp_path / "t.parquet", found.shape, found.by_sequence())
    again = read(tmp_path / "t.parquet")
    assert (again.shape, again.events) == (found.shape, found.events)
