"""A trace that is read is the trace that was written; foreign and damaged files are refused."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from understudy.core import LayerEvent, Phase
from understudy.trace import KEY, Shape, TraceError, import_csv, read, write

SHARED = Path(__file__).parents[3] / "shared" / "data" / "traces" / "qwen3-30b-a3b"
SHAPE = Shape("toy", (6, 6, 6), 2, (10, 10, 12), "stored", "made up")


def near(value: float) -> float:
    return float(np.float32(value))


def made_up(seed: int) -> list[LayerEvent]:
    """A prompt of some tokens, then single ones; with and without what is optional."""
    rng = random.Random(seed)
    events = []
    for step in range(4):
        tokens = rng.randint(2, 5) if step == 0 else 1
        for layer in range(3):
            ids = [rng.sample(range(6), 2) for _ in range(tokens)]
            weights = [[near(rng.random()) for _ in range(2)] for _ in range(tokens)]
            event = LayerEvent(step, layer, Phase.DECODE if step else Phase.PREFILL, ids, weights)
            event.requests = [rng.randint(0, 1) for _ in range(tokens)]
            if rng.random() < 0.5:
                event.scores = [[near(rng.random()) for _ in range(6)] for _ in range(tokens)]
            if rng.random() < 0.5:
                event.foretold = ids[::-1], weights
            if layer < 2 and rng.random() < 0.5:
                event.lookahead = {layer + 1: (ids, weights[::-1])}
            events.append(event)
    return events


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    for seed in range(20):
        texts = [made_up(3 * seed + n) for n in range(3)]
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
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(TraceError, match="cannot be read as a trace"):
        read(whole)


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


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not a route CSV"),
        (HEAD, "not a route CSV"),
        (HEAD + "0,0,0,0,zero,3,0.5\n", "line 6 is not turn,phase,step"),
        (HEAD + "0,0,0,0,1,3,0.5,0,0\n", "line 6: rank 1 comes before rank 0"),
    ],
)
def test_a_bad_csv_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "route.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=complaint):
        import_csv(path)


def test_the_public_trace_of_qwen3() -> None:
    if not SHARED.is_dir():
        pytest.skip("shared/data/traces is not here")
    found = import_csv(SHARED / "qwen.route.csv")
    prompt = [e for e in found.events if e.phase is Phase.PREFILL]
    assert (found.shape.layers, found.shape.top_k, set(found.shape.experts)) == (48, 6, {128})
    assert [len(e.ids) for e in prompt] == [28] * 47 + [1]
    assert len(found.events) - len(prompt) == 128 * 48
    assert {len(row) for e in found.events for row in e.ids} == {6}
