"""The other accounting: by hand, and against the curve that was published with the Qwen3 trace."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from unit.policies.traces import event, singles

from understudy.core import LayerEvent, Phase
from understudy.simulate import Sizes, published, replay
from understudy.simulate.sweep import PUBLISHED_NAMES

QWEN = Path("shared/data/traces/qwen3-30b-a3b")  # beside the checkout, or beside its parent
FOUND = next((p / QWEN for p in Path(__file__).parents if (p / QWEN).is_dir()), None)
ONE = Sizes((8,), (10,))


def test_a_cache_that_holds_all_misses_everybody_once() -> None:
    found = published(singles([0, 1, 0, 1]), sizes=ONE, budget=20, evictor="lru-global")
    assert (found.lookups, found.hits, found.bytes_read) == (4, 2, 20)


def test_an_event_may_exceed_the_budget_while_it_runs() -> None:
    # Belady keeps 0 although 1 and 2 fill the budget by themselves: nobody makes room beforehand.
    trace = [event(0, 0), event(0, 1, 2), event(0, 0)]
    theirs = published(trace, sizes=ONE, budget=20, evictor="belady")
    assert theirs.hits == 0  # but what an event used may not leave at its end
    theirs = published(trace, sizes=ONE, budget=30, evictor="belady")
    assert theirs.hits == 1
    trace = [event(0, 0), event(0, 1), event(0, 2), event(0, 0)]
    theirs = published(trace, sizes=ONE, budget=20, evictor="belady")
    assert theirs.hits == 1 == replay(trace, slots=2, layers=1, evictor="belady").hits


def test_the_event_itself_is_counted_before_somebody_leaves() -> None:
    # With one expert of room: at the end of its event, 1 has as many uses as 0 and stays.
    found = published(singles([0, 0, 1, 1]), sizes=ONE, budget=10, evictor="lfu")
    assert found.hits == 2


def test_experts_of_different_sizes_share_the_bytes() -> None:
    mixed = Sizes((4, 4), (10, 30))
    trace = [event(0, 0), event(0, 1), event(1, 0), event(0, 0), event(0, 1)]
    assert published(trace, sizes=mixed, budget=50, evictor="lru-global").hits == 2
    # One that comes pushes out both, oldest first, where one byte is missing.
    assert published(trace, sizes=mixed, budget=39, evictor="lru-global").hits == 0


def test_prompt_and_answer_are_counted_apart() -> None:
    prompt = LayerEvent(0, 0, Phase.PREFILL, ids=[[0], [1], [0]])
    found = published([prompt, event(0, 1)], sizes=ONE, budget=80, evictor="lru-global")
    assert (found.lookups, found.decode_lookups, found.decode_hits) == (3, 1, 1)
    assert (found.hit_rate, found.hit_rate_decode) == (1 / 3, 1.0)


def qwen() -> tuple[Sizes, list[LayerEvent]]:
    """The recorded routing, as its own few lines of reading see it."""
    nbytes: dict[int, int] = {}
    rows: dict[tuple[int, int, int], dict[int, list[int]]] = {}
    assert FOUND is not None
    with (FOUND / "qwen.route.csv").open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("# layer="):
                head = dict(word.split("=") for word in line[2:].split())
                nbytes[int(head["layer"])] = int(head["expert_bytes"])
            elif line[0].isdigit():
                _, phase, step, layer, _, expert = map(int, line.split(",")[:6])
                key = phase, step if phase else 0, layer
                rows.setdefault(key, {}).setdefault(step, []).append(expert)
    events = [
        LayerEvent(step, layer, Phase.DECODE if phase else Phase.PREFILL, list(tokens.values()))
        for (phase, step, layer), tokens in sorted(rows.items())
    ]
    return Sizes((128,) * len(nbytes), tuple(nbytes[i] for i in range(len(nbytes)))), events


@pytest.mark.skipif(FOUND is None, reason="the Qwen3 trace is not here (shared/data/traces)")
@pytest.mark.parametrize("policy", PUBLISHED_NAMES)
def test_the_published_curve(policy: str) -> None:
    sizes, events = qwen()
    assert FOUND is not None
    with (FOUND / "qwen-curve.csv").open(encoding="utf-8", newline="") as file:
        lines = [row for row in csv.DictReader(file) if row["policy"] == policy]
    assert len(lines) == 11
    for line in lines:
        budget = int(line["budget_mib"]) << 20
        found = published(events, sizes=sizes, budget=budget, evictor=PUBLISHED_NAMES[policy])
        assert 100 * found.hit_rate == pytest.approx(float(line["hit_pct_cum"]), abs=0.01)
        assert 100 * found.hit_rate_decode == pytest.approx(float(line["hit_pct_decode"]), abs=0.01)
        assert found.bytes_read / 2**20 == pytest.approx(float(line["read_mib"]), rel=1e-3)
