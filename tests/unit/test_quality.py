"""The exam beside plain transformers, and policies that are exact, lossy, idle and lying."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from understudy import quality, tasks
from understudy.bench import ON_DEMAND, Policy
from understudy.core import LayerEvent, UnderstudyError
from understudy.policies import Exactness, RouteTransform
from understudy.policies.residency import Residency
from understudy.quality import Exam, Session, Text, controls, prompt_sets, questions, session
from understudy.registry import ROUTES

PROMPT, SCORED = 20, 12
SETTINGS = (("slots", 24), ("max_context", 128), ("threads", 1), ("kernel", "torch"))


def nothing(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough text for five pieces of two domains each."""
    dice = np.random.default_rng(0)
    words = ["".join(dice.choice(list("etaoinshrdlu"), dice.integers(2, 8))) for _ in range(600)]
    file = tmp_path_factory.mktemp("texts") / "book.txt"
    file.write_text(" ".join(words))
    return file


@pytest.fixture(scope="module")
def opened(
    speaking_model: Path, book: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Session]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNDERSTUDY_CACHE", str(tmp_path_factory.mktemp("cache")))
        exam = Exam(
            str(speaking_model), "100%", (str(book),), prompt=PROMPT, scored=SCORED, problems=2,
            settings=SETTINGS,
        )  # fmt: skip
        with session(exam, nothing) as found:
            yield found


# ------------------------------------------------------------------------------------- material


def by_words(text: str) -> Any:
    """A tokenizer that makes a number of each word."""
    from types import SimpleNamespace

    return SimpleNamespace(input_ids=[int(word) for word in text.split()])


def counted(numbers: int) -> str:
    return " ".join(str(n) for n in range(1000, 1000 + numbers))


def test_pieces_share_nothing_and_begin_with_a_whole_word() -> None:
    found = prompt_sets(by_words, {"a": counted(100), "b": counted(70)}, sets=5, prompt=4, scored=6)
    assert [(one.domain, one.number) for one in found[:3]] == [("a", 0), ("b", 0), ("a", 1)]
    assert all(len(one.ids) == 4 + 6 + 1 and one.scored == 6 for one in found)
    of_a = [n for one in found if one.domain == "a" for n in one.ids]
    assert len(of_a) == len(set(of_a))
    assert min(of_a) >= 1000  # half a word would be a smaller number


def test_a_short_text_is_refused() -> None:
    with pytest.raises(UnderstudyError, match="a: too short for 5 pieces of 21 tokens"):
        prompt_sets(by_words, {"a": counted(100)}, sets=5, prompt=4, scored=16)


def test_fewer_than_five_sets_are_refused() -> None:
    with pytest.raises(UnderstudyError, match="--sets must be at least 5"):
        prompt_sets(by_words, {"a": counted(100)}, sets=4, prompt=1, scored=1)


def test_questions_of_every_kind_are_held_out_and_repeatable() -> None:
    found = questions(6, seed=0)
    assert [found.count(one) for one in found] == [1] * len(found)
    assert {one.task: 6 for one in found} == dict.fromkeys(tasks.LEVELS, 6)
    assert len(found) == 6 * len(tasks.LEVELS)
    assert all(tasks.held_out(one.prompt) for one in found)
    assert {one.level for one in found if one.task == "recall"} == {2, 4, 8, 12, 16}
    assert found == questions(6, seed=0)
    assert questions(0, seed=0) == []


# -------------------------------------------------------------------------------------- scoring


def test_steps_score_what_plain_transformers_scores(opened: Session, speaking_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(speaking_model).eval()
    for scored in opened.baseline.texts:
        ids = torch.tensor([scored.text.ids])
        with torch.no_grad():
            chances = plain(ids).logits[0, :-1].log_softmax(-1)
        expected = -chances.gather(1, ids[0, 1:, None])[-SCORED:, 0]
        assert scored.nll == pytest.approx(expected.double().numpy(), abs=2e-4)


def test_the_exact_run_is_at_no_distance_from_itself(opened: Session) -> None:
    v = opened.baseline_verdict()
    assert v.policy == "on-demand"
    assert (v.delta_nll.mean, v.delta_nll.low, v.delta_nll.high, v.kl.mean) == (0, 0, 0, 0)
    assert v.same_top1.mean == 1
    assert v.tokens == 5 * SCORED
    assert v.nll == pytest.approx(np.concatenate([t.nll for t in opened.baseline.texts]).mean())


def test_rounding_otherwise_is_no_broken_promise_and_no_loss(opened: Session) -> None:
    rounded = replace(opened.baseline_verdict(), exact=False, equivalent=True, identical=False)
    assert not (rounded.lossy or rounded.broken or rounded.never_acted or rounded.uncounted)
    assert Policy.parse("lrfu+cpu-split").equivalent
    assert not Policy.parse("lrfu+buddy").equivalent and not Policy.parse("lrfu").equivalent


@pytest.mark.parametrize("name", ["understudy", "no-cache", "lfu+popularity"])
def test_lossless_policies_differ_in_nothing(opened: Session, name: str) -> None:
    v = opened.judge(Policy.parse(name), nothing)
    assert v.exact and v.identical and not v.broken
    assert (v.delta_nll.mean, v.delta_nll.low, v.delta_nll.high, v.kl.mean) == (0, 0, 0, 0)
    assert v.solved["all"].delta.mean == 0
    assert v.changed == 0
    assert v.bytes > 0


DROP = Policy.parse("buddy:stand_in=drop:percentile=0:beta=1.1:rho=1")


def test_a_lossy_policy_is_measured_and_counted(opened: Session) -> None:
    v = opened.judge(DROP, nothing)
    assert not v.exact and not v.identical and not v.broken
    assert v.kl.mean > 0
    assert v.substituted == 0
    assert 0.5 < v.skipped <= 4  # one expert of one token in each of four layers, at most
    assert 0 < v.skipped_mass < v.skipped / 2  # the lighter one of two
    assert v.skipped == pytest.approx(sum(p.changed for p in v.pieces) / v.tokens)
    assert v.bytes == pytest.approx(sum(p.bytes for p in v.pieces) / v.tokens)


def test_pieces_are_enough_to_work_the_figures_out_again(opened: Session) -> None:
    v = opened.judge(DROP, nothing)
    assert [(p.domain, p.set, p.tokens) for p in v.pieces] == [
        ("book", n, SCORED) for n in range(5)
    ]
    for name in ("delta_nll", "kl", "same_top1"):
        total = sum(x for p in v.pieces for x in getattr(p, name))
        assert getattr(v, name).mean == pytest.approx(total / v.tokens)
    assert v.nll_by_domain["book"] == v.delta_nll
    assert v.nll == pytest.approx(opened.baseline_verdict().nll + v.delta_nll.mean)


def test_the_same_exam_gives_the_same_figures(opened: Session) -> None:
    first, again = opened.judge(DROP, nothing), opened.judge(DROP, nothing)
    free = {"stall": 0, "seconds": 0}  # the clock is not part of the exam
    assert replace(first, **free) == replace(again, **free)


def test_a_control_is_held_to_a_count(opened: Session) -> None:
    free = opened.judge(DROP, nothing)
    held = opened.judge(DROP, nothing, rate=free.changed / 2)
    assert held.changed == pytest.approx(free.changed / 2, rel=0.2)


def test_a_lossy_policy_that_never_acts_is_found_out(opened: Session) -> None:
    v = opened.judge(Policy.parse("buddy:stand_in=drop:percentile=0:rho=0"), nothing)
    assert v.never_acted and not v.broken and not v.uncounted


class SaysItIsExact(RouteTransform):
    """Runs the experts in the order 0, 1 whatever was asked, and declares nothing."""

    exactness = Exactness.BIT_EXACT

    def transform(self, event: LayerEvent, book: Residency) -> LayerEvent:
        return replace(event, ids=[[0, 1] for _ in event.ids], weights=list(event.weights))


class ChangesWeights(RouteTransform):
    exactness = Exactness.LOSSY

    def transform(self, event: LayerEvent, book: Residency) -> LayerEvent:
        halves = [[w / 2 for w in row] for row in event.weights]
        return replace(event, ids=[list(row) for row in event.ids], weights=halves)


@pytest.fixture
def strange_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"honest": SaysItIsExact, "halves": ChangesWeights}
    monkeypatch.setattr(ROUTES, "_objects", {**ROUTES._objects, **known})


def test_a_policy_that_lies_is_broken(opened: Session, strange_routes: None) -> None:
    assert opened.judge(Policy.parse("honest"), nothing).broken


def test_changed_weights_are_not_taken_for_nothing(opened: Session, strange_routes: None) -> None:
    v = opened.judge(Policy.parse("halves"), nothing)
    assert v.uncounted and not v.never_acted
    assert v.changed == 0 < v.kl.mean


def test_two_policies_are_compared_on_the_same_tokens(opened: Session) -> None:
    drop, exact = opened.judge(DROP, nothing), opened.baseline_verdict()
    assert quality.paired(drop, exact) == drop.delta_nll
    assert quality.paired(exact, drop).mean == pytest.approx(-drop.delta_nll.mean)
    assert quality.paired(drop, drop).high == 0


# ----------------------------------------------------------------------------------- exact match


class Parrot:
    """Answers what it is told to, token by token of one letter each."""

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def encode(self, text: str) -> list[str]:
        return list(text)

    def generate(self, prompt: str, *, max_new_tokens: int) -> Any:
        from types import SimpleNamespace

        assert prompt == "Question: sort b a\nAnswer:"
        return SimpleNamespace(text=self.answer[:max_new_tokens])


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" a b", True),
        (" a b\nQu", True),
        ("\na b", True),
        (" a b c", False),
        ("", False),
        (" b a", False),
    ],
)
def test_an_answer_is_right_or_not(answer: str, right: bool) -> None:
    problem = tasks.Problem("sort", 2, "sort b a", "a b")
    assert quality.solved(Parrot(answer), problem) is right  # type: ignore[arg-type]


def test_solved_problems_are_paired_by_kind() -> None:
    asked = [tasks.Problem(task, 1, "", "") for task in ("add", "add", "sort", "sort")]
    found = quality._solved(asked, [1, 1, 0, 1], [1, 0, 0, 1])
    assert (found["all"].right, found["all"].right_exact, found["all"].delta.mean) == (
        0.5, 0.75, -0.25,
    )  # fmt: skip
    assert (found["add"].problems, found["add"].delta.mean) == (2, -0.5)
    assert (found["sort"].delta.low, found["sort"].delta.high) == (0, 0)
    assert quality._solved([], [], []) == {}


# -------------------------------------------------------------------------------------- controls


def test_controls_keep_everything_but_who_stands_in() -> None:
    policy = Policy.parse("lru+next-gate+buddy:rho=2:stand_in=similar:beta=0.7")
    random, drop = controls(policy)
    assert random.name == f"{policy.name} (random)"
    assert random.route == "buddy:stand_in=random:rho=2:beta=0.7"
    assert drop.route == "buddy:stand_in=drop:rho=2:beta=0.7"
    for control in (random, drop):
        assert replace(control, name=policy.name, route=policy.route) == policy


def test_what_needs_no_control_gets_none() -> None:
    for name in ("understudy", "verified", "buddy-random", "buddy-drop"):
        assert controls(Policy.parse(name)) == []


def test_a_share_of_memory_means_the_same_for_fewer_bits(speaking_model: Path) -> None:
    exam = Exam(str(speaking_model), "50%").in_bytes()
    stored = sum(f.stat().st_size for f in speaking_model.glob("*.safetensors"))
    assert exam.memory == pytest.approx(stored / 2, rel=0.01)


def test_fewer_bits_are_packed_once_and_judged(
    opened: Session, speaking_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path))
    labels: list[str] = []

    def bar(label: str) -> Callable[[int, int], None]:
        labels.append(label)
        return nothing

    folder = quality.packed(str(speaking_model), "int8", bar)
    assert quality.packed(str(speaking_model), "int8", bar) == folder
    assert labels == ["packing int8"]
    v = opened.judge(replace(ON_DEMAND, name="all int8"), nothing, str(folder))
    assert v.format and not v.exact and not v.broken and not v.never_acted and not v.uncounted
    assert 0 < v.kl.mean < 0.05
    assert v.bytes < 0.7 * opened.baseline_verdict().bytes


# ------------------------------------------------------------------------------- the kept logits


def test_the_exact_run_s_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path))
    text = Text("a", 0, tuple(range(6)), prompt=2)
    rows = torch.arange(8.0).view(4, 2)
    with quality.exact_run([text, text]) as exact:
        exact.keep(0, rows)
        exact.keep(1, rows + 100)
        assert torch.equal(exact.of(0), rows)
        assert torch.equal(exact.of(1), rows + 100)
        assert list(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_said_before_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path))
    text = Text("a", 0, tuple(range(1 << 20)), prompt=2)
    wide = torch.zeros(1).expand(text.scored + 1, 1 << 40)
    with (
        quality.exact_run([text]) as exact,
        pytest.raises(UnderstudyError, match="make room there"),
    ):
        exact.keep(0, wide)
