"""``trace`` for real: recorded on the small reference model, imported, summarised, refused."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from understudy import trace as traces
from understudy.cli import main
from understudy.core import LayerEvent, Phase
from understudy.trace import Shape, read, write

FINE = Path(__file__).parents[2] / "models" / "fine"
LAYERS, EXPERTS, TOP_K = 10, 32, 4  # of FINE
SMALL = ("--max-context", "96", "--threads", "1", "--frame", "eager")
TIGHT = (*SMALL, "--slots", "25%")
QWEN = "shared/data/traces/qwen3-30b-a3b/qwen.route.csv"  # beside or above the repository

CSV = """# route_trace v1
# model=/data/Toy-30B.gguf arch=toy n_layer=2 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=100 dense_bytes=5
# layer=1 expert_bytes=120 dense_bytes=5
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,0,0,3,0.5,0,100
0,0,0,0,1,1,0.25,0,100
0,0,1,0,0,2,0.5,0,100
0,0,1,0,1,3,0.5,1,0
0,1,2,0,0,3,0.5,1,0
0,1,2,0,1,0,0.5,0,100
"""

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def understudy(capsys: pytest.CaptureFixture[str]) -> Command:
    """A command line -> (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def record(understudy: Command, tmp_path: Path) -> Callable[..., traces.Trace]:
    """``record(...)``: the trace of two pieces of text, 12 + 9 tokens each."""
    if not FINE.is_dir():
        pytest.skip("models/fine is not here")

    def run(*arguments: str) -> traces.Trace:
        path = tmp_path / "t.parquet"
        code, out, err = understudy(
            *("trace", str(FINE), "-o", str(path), "--sequences", "2", "-p", "12"),
            *("--tokens", "9", "--json", *arguments),
        )
        assert code == 0, err
        # The last token of the answer is never fed back.
        assert last(out)["rows"] == 2 * LAYERS * (12 + 8)
        return read(path)

    return run


def last(out: str) -> Any:
    return json.loads(out.splitlines()[-1])


# ---------------------------------------------------------------------------------- recording


def test_what_the_routers_chose_is_recorded(record: Callable[..., traces.Trace]) -> None:
    found = record("--scores", *TIGHT)
    shape = found.shape
    assert (shape.model, shape.experts, shape.top_k) == ("fine", (EXPERTS,) * LAYERS, TOP_K)
    config = json.loads((FINE / "config.json").read_text())
    assert (shape.hidden, shape.date) == (config["hidden_size"], date.today().isoformat())
    assert [e.layer for e in found.events] == 2 * 9 * list(range(LAYERS))
    assert found.sequences == [text for text in (0, 1) for _ in range(9 * LAYERS)]
    for text in found.by_sequence():
        tokens = [len(e.ids) for e in text]
        assert tokens == [12] * LAYERS + [1] * 8 * LAYERS
        assert [e.phase is Phase.PREFILL for e in text] == [n == 12 for n in tokens]
    for event in found.events:
        assert event.scores is not None
        for ids, weights, scores in zip(event.ids, event.weights, event.scores, strict=True):
            assert sum(scores) == pytest.approx(1, abs=1e-3)
            others = [scores[e] for e in range(EXPERTS) if e not in ids]
            assert min(scores[e] for e in ids) >= max(others)  # this family takes the likeliest
            chosen = sum(scores[e] for e in ids)
            assert list(weights) == pytest.approx([scores[e] / chosen for e in ids], abs=0.01)


def routes(trace: traces.Trace) -> list[tuple[int, int, Any, Any]]:
    return [(e.step, e.layer, e.ids, e.weights) for e in trace.events]


def test_the_text_decides_and_not_the_memory(record: Callable[..., traces.Trace]) -> None:
    """Little memory and enough, with and without what is kept beside the choice."""
    tight = record(*TIGHT)
    roomy = record("--no-lookahead", "--memory", "100%", *SMALL)
    assert [e[1:] for e in routes(tight)] == [e[1:] for e in routes(roomy)]
    assert not any(e.lookahead or e.scores for e in roomy.events)


@pytest.mark.parametrize(
    "settings", [TIGHT, (*SMALL, "--memory", "100%"), (*TIGHT, "--predictor", "last-token")]
)
def test_look_ahead_is_complete_whoever_asked_for_it(
    record: Callable[..., traces.Trace], settings: tuple[str, ...]
) -> None:
    """The engine asks only where a miss can happen; the trace has it for every event."""
    events = record("--depth", "2", *settings).events
    right = asked = 0
    for place, event in enumerate(events):
        assert sorted(event.lookahead) == [
            later for later in (event.layer + 1, event.layer + 2) if later < LAYERS
        ]
        for later, (ids, weights) in event.lookahead.items():
            assert [len(row) for row in ids] == [len(row) for row in weights]
            truth = events[place + later - event.layer]
            assert (truth.layer, len(truth.ids)) == (later, len(ids))
            pairs = list(zip(ids, truth.ids, strict=True))
            right += sum(len({*said} & {*true}) for said, true in pairs)
            asked += TOP_K * len(pairs)
    assert right / asked > 3 * TOP_K / EXPERTS  # it foresees, and of the layer that it names


def test_the_text_is_the_files(record: Callable[..., traces.Trace], tmp_path: Path) -> None:
    """The same text in a plain file, a packed one and JSON lines is routed alike."""
    text = "A short story about a fox who wanted to learn how to count. " * 12
    plain, packed, lines = (tmp_path / name for name in ("a.txt", "b.txt.xz", "c.jsonl"))
    plain.write_text(text)
    packed.write_bytes(lzma.compress(text.encode()))
    lines.write_text(json.dumps({"id": 1, "question": text}) + "\n")
    same = [routes(record("--data", str(file), *TIGHT)) for file in (plain, packed, lines)]
    assert same[0] == same[1] == same[2]
    plain.write_text(text[::-1])
    assert routes(record("--data", str(plain), *TIGHT)) != same[0]


def test_scores_that_nobody_can_tell_are_refused(
    understudy: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not FINE.is_dir():
        pytest.skip("models/fine is not here")
    from understudy.experts.lookahead import Lookahead

    monkeypatch.setattr(Lookahead, "chances", lambda self, forward, layer: None)
    output = str(tmp_path / "t.parquet")
    code, _, err = understudy(
        *("trace", str(FINE), "-o", output, "--sequences", "1", "-p", "4", "--tokens", "2"),
        *("--scores", *TIGHT),
    )
    assert (code, err.count("error:")) == (2, 1)
    assert "MoE layer 0 has no router that can be asked for its scores" in err
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------ importing, summarising


def test_a_csv_is_imported_and_summarised(understudy: Command, tmp_path: Path) -> None:
    source, path, picture = (tmp_path / name for name in ("r.csv", "t.parquet", "t.png"))
    source.write_text(CSV)
    code, out, _ = understudy("trace", "--import", str(source), "-o", str(path), "--json")
    assert (code, last(out)) == (0, {"trace": str(path), "events": 2, "rows": 3})
    assert read(path).events == traces.import_csv(source).events

    code, out, _ = understudy("trace", "--summary", str(path), "--plot", str(picture), "--json")
    assert (code, picture.read_bytes()[:4]) == (0, b"\x89PNG")
    answer = last(out)
    assert answer["shape"]["model"] == "Toy-30B"
    (layer,) = answer["layers"]
    assert (layer["layer"], layer["tokens"], layer["used"]) == (0, 3, 1.0)
    # {3, 1}, {2, 3}, {3, 0}: each pair of neighbours has 3 in common.
    assert (layer["overlap"], layer["overlap_any"], layer["overlap_uniform"]) == (0.5, 0.5, 0.5)
    assert layer["gap"] == [1.0, 1.0]
    assert answer["overall"]["layer"] is None
    assert answer["overall"]["overlap"] == 0.5


def test_what_is_not_known_is_a_dash_and_no_number(understudy: Command, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    shape = Shape("toy", (4,), 2, (1,))
    write(path, shape, [[LayerEvent(0, 0, Phase.DECODE, [[0, 1]], [[0.5, 0.5]])]])
    code, out, err = understudy("trace", "--summary", str(path), "--json")
    assert (code, last(out)["overall"]["gap"]) == (0, [None, None])
    assert "NaN" not in out
    assert "nan" not in err
    row = next(line.split() for line in err.splitlines() if line.startswith("0 "))
    assert row[1:6] == ["1", "50.0", "%", "-", "-"]


def test_the_public_trace_of_qwen3_is_summarised(understudy: Command, tmp_path: Path) -> None:
    file = next((f / QWEN for f in Path(__file__).parents if (f / QWEN).is_file()), None)
    if file is None:
        pytest.skip(f"{QWEN} is not here")
    path = tmp_path / "t.parquet"
    assert understudy("trace", "--import", str(file), "-o", str(path))[0] == 0
    code, out, _ = understudy("trace", "--summary", str(path), "--json")
    answer = last(out)
    assert (code, len(answer["layers"])) == (0, 48)
    assert [one["tokens"] for one in answer["layers"]] == [156] * 47 + [129]
    overall = answer["overall"]
    assert overall["overlap_uniform"] == pytest.approx(6 / 128)
    assert overall["overlap"] > overall["overlap_any"] > overall["overlap_uniform"]
    assert overall["partners"] > overall["partners_popular"] > overall["partners_uniform"]


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "name a MODEL to record, --import a CSV, or --summary a trace"),
        (("-o", "t.parquet"), "name a MODEL to record"),
        (("model",), "name the trace to write with -o"),
        (("--import", "r.csv"), "name the trace to write with -o"),
        (("model", "--summary", "t"), "MODEL and --summary are different jobs"),
        (("--import", "r.csv", "--summary", "t"), "--import and --summary are different jobs"),
        (("--summary", "t", "-o", "u"), "--summary writes no trace"),
        (("model", "-o", "t", "--plot", "t.png"), "--plot draws what --summary reads"),
        (("--import", "none.csv", "-o", "t"), "none.csv: cannot be read: No such file"),
        (("--import", "bad.csv", "-o", "t"), "bad.csv: line 1: not a route CSV"),
        (("--import", "bad.csv", "-o", "none/t"), "cannot write none/t: name a file in a folder"),
        (("--import", "bad.csv", "-o", "."), "cannot write .: name a file in a folder"),
        (("--summary", "none.parquet"), "none.parquet: no such trace"),
        (("--summary", "bad.csv"), "bad.csv: cannot be read as a trace"),
        (("--summary", "empty.parquet"), "empty.parquet: holds no events"),
        (("--summary", "one.parquet", "--plot", "none/t.png"), "cannot write none/t.png"),
        (("model", "-o", "t", "--data", "none.txt"), "cannot read none.txt"),
        (("model", "-o", "t", "--predictor", "nextgate"), "no predictor named 'nextgate'"),
    ],
)
def test_trace_refuses_what_cannot_work(
    understudy: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.csv").write_text("a,b\n1,2\n")
    shape = Shape("toy", (4,), 2, (1,))
    write("empty.parquet", shape, [])
    write("one.parquet", shape, [[LayerEvent(0, 0, Phase.DECODE, [[0, 1]], [[0.5, 0.5]])]])
    before = sorted(tmp_path.iterdir())
    code, _, err = understudy("trace", *arguments)
    assert (code, err.count("error:")) == (2, 1)
    assert complaint in err
    assert sorted(tmp_path.iterdir()) == before


def test_a_text_that_is_too_short_is_refused(understudy: Command, tmp_path: Path) -> None:
    if not FINE.is_dir():
        pytest.skip("models/fine is not here")
    text, output = tmp_path / "short.txt", tmp_path / "t.parquet"
    text.write_text("too short")
    code, _, err = understudy("trace", str(FINE), "--data", str(text), "-o", str(output), *TIGHT)
    assert (code, output.exists()) == (2, False)
    assert "short: too short for 4 pieces of 256 tokens" in err
