"""The sampler against the obvious version: every setting in the contract's order, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import TopPLogitsWarper

from understudy.batch import Ask, Sampling, TokenLogprob
from understudy.batch import sampling as module
from understudy.batch.sampling import NoToken, Sampler, logprobs_of
from understudy.core import UnderstudyError

SIZE = 12
PROMPT = (1, 2, 2, 3)
ANSWER = (2, 4, 4, 4)


class Allows:
    """A grammar that allows the same tokens for ever."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens
        self.accepted: list[int] = []
        self.complete = False

    def begin(self) -> Allows:
        return self

    def constrain(self, scores: torch.Tensor) -> None:
        allowed = scores[list(self.tokens)].clone()
        scores.fill_(-torch.inf)
        scores[list(self.tokens)] = allowed

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def ask_of(grammar: Any = None, **kwargs: Any) -> Ask:
    own = ("min_tokens", "stop_token_ids", "logprobs", "prompt")
    more = {key: kwargs.pop(key) for key in own if key in kwargs}
    return Ask(
        **{"prompt": PROMPT} | more, max_new_tokens=9, grammar=grammar, sampling=Sampling(**kwargs)
    )


def logits_of(seed: int, size: int = SIZE, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def obvious(logits: torch.Tensor, ask: Ask, answer: Sequence[int]) -> list[float]:
    """The chance of every token, by the book."""
    s, x = ask.sampling, [float(v) for v in logits]
    if ask.grammar is not None:
        x = [v if t in ask.grammar.tokens else -math.inf for t, v in enumerate(x)]  # type: ignore[attr-defined]
    x = [v + s.logit_bias.get(t, 0.0) for t, v in enumerate(x)]
    for t in {*ask.prompt, *answer}:
        x[t] = x[t] / s.repetition_penalty if x[t] > 0 else x[t] * s.repetition_penalty
    for t in set(answer):
        x[t] -= s.presence_penalty + s.frequency_penalty * list(answer).count(t)
    p = normal([math.exp(v / s.temperature) for v in x])
    ranked = sorted(range(len(p)), key=lambda t: -p[t])
    if s.top_k:
        p = normal([v if t in ranked[: s.top_k] else 0.0 for t, v in enumerate(p)])
    kept, mass = [], 0.0
    for t in ranked:
        kept.append(t)
        mass += p[t]
        if mass >= s.top_p:
            break
    p = normal([v if t in kept else 0.0 for t, v in enumerate(p)])
    return normal([v if v >= s.min_p * max(p) else 0.0 for v in p])


def normal(weights: list[float]) -> list[float]:
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"top_p": 0.0},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "presence_penalty": 0.7, "frequency_penalty": -0.4},
        {"logit_bias": {0: 3.0, 5: -100.0}},
        {"temperature": 1.5, "top_k": 8, "top_p": 0.8, "min_p": 0.1, "presence_penalty": 1.0},
        {"grammar": Allows(0, 3, 4, 9), "logit_bias": {1: 100.0}, "repetition_penalty": 0.5},
    ],
    ids=lambda how: "+".join(how) or "plain",
)
def test_tokens_are_drawn_as_often_as_they_should(how: dict[str, Any]) -> None:
    logits, draws = logits_of(3), 1500
    expected = obvious(logits, ask_of(**how), ANSWER)
    sampler = Sampler(ask_of(seed=11, **how), SIZE, {0})
    counts = [0] * SIZE
    for _ in range(draws):
        counts[sampler.pick(logits, ANSWER).token] += 1
    assert all(chance > 0 for chance, count in zip(expected, counts, strict=True) if count)
    distance = sum(abs(c / draws - e) for c, e in zip(counts, expected, strict=True)) / 2
    assert distance < 0.05


@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 1.0, 3.0, 10.0]),
    top_p=st.floats(0, 0.999),
    banned=st.integers(0, 90),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_sorting_few_tokens_finds_the_same_nucleus(
    seed: int, scale: float, top_p: float, banned: int
) -> None:
    scores = logits_of(seed, 100, scale)[None]
    scores[0, :banned] = -torch.inf
    ids, some = module._nucleus(scores, top_p)
    whole = torch.full_like(scores, -torch.inf)
    whole[0, slice(None) if ids is None else ids] = some[0]
    chances = scores.softmax(-1)
    expected = TopPLogitsWarper(top_p)(None, scores)
    # Where sums of rounded numbers decide, one token more or less is as right.
    differing = chances[0, whole[0].isfinite() != expected[0].isfinite()]
    border = chances[0][expected[0].isfinite()].min()
    assert len(differing) <= 1
    assert all(
        abs(float(chance / border) - 1) < 1e-2 or float(chance) < 1e-6 for chance in differing
    )
    assert torch.equal(whole[whole.isfinite()], scores[whole.isfinite()])


def test_a_seed_belongs_to_its_answer() -> None:
    def tokens(company: int) -> list[int]:
        samplers = [Sampler(ask_of(seed=5 + i), SIZE, {0}) for i in range(1 + company)]
        found: list[int] = []
        for step in range(20):
            picked = [sampler.pick(logits_of(step), found) for sampler in samplers]
            found.append(picked[0].token)
        return found

    assert tokens(0) == tokens(3)
    unseeded = [Sampler(ask_of(), SIZE, {0}) for _ in range(2)]
    drawn = [[s.pick(torch.zeros(SIZE), ()).token for _ in range(30)] for s in unseeded]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_greedy_takes_the_first_of_the_best(temperature: float) -> None:
    logits = torch.zeros(SIZE)
    logits[[7, 4, 9]] = 2.5
    sampler = Sampler(ask_of(temperature=temperature), SIZE, {0})
    assert sampler.pick(logits, ()).token == 4


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_are_left_as_they_are(temperature: float) -> None:
    logits = logits_of(1)
    before = logits.clone()
    ask = ask_of(
        grammar=Allows(1, 2), temperature=temperature, logit_bias={1: 2.0}, top_p=0.5, min_tokens=3,
        repetition_penalty=1.2, presence_penalty=0.5, logprobs=2,
    )  # fmt: skip
    Sampler(ask, SIZE, {0}).pick(logits, ANSWER)
    assert torch.equal(logits, before)


def test_logprobs_are_the_models_own() -> None:
    logits = logits_of(2)
    raw = logits.log_softmax(-1)
    ask = ask_of(temperature=0, logit_bias={5: 50.0}, logprobs=3)
    picked = Sampler(ask, SIZE, {0}).pick(logits, ANSWER)
    assert picked.token == 5
    assert picked.logprob == pytest.approx(float(raw[5]), abs=1e-5)
    best = raw.topk(3)
    assert [t for t, _ in picked.top] == best.indices.tolist()
    assert [p for _, p in picked.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert Sampler(ask_of(temperature=0, logprobs=0), SIZE, {0}).pick(logits, ()).top == ()
    assert math.isnan(Sampler(ask_of(temperature=0), SIZE, {0}).pick(logits, ()).logprob)


def test_prompt_logprobs_come_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.stack([logits_of(i) for i in range(7)])
    tokens = [3, 1, 4, 1, 5, 9, 2]
    whole = logprobs_of(logits, tokens, 4)
    monkeypatch.setattr(module, "SLICE", 2 * SIZE)
    assert logprobs_of(logits, tokens, 4) == whole
    raw = logits.log_softmax(-1)
    for i, entry in enumerate(whole):
        assert isinstance(entry, TokenLogprob) and entry.token == tokens[i]
        assert entry.logprob == pytest.approx(float(raw[i, tokens[i]]), abs=1e-5)
        assert len(entry.top) == 4
    assert logprobs_of(logits[:0], [], 4) == ()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_ends_before_min_tokens(temperature: float) -> None:
    logits = torch.zeros(SIZE)
    logits[[0, 7]] = 30.0
    ask = ask_of(temperature=temperature, min_tokens=2, stop_token_ids=(7, 99), seed=1)
    sampler = Sampler(ask, SIZE, {0})
    assert sampler.pick(logits, ()).token not in (0, 7)
    assert sampler.pick(logits, (1,)).token not in (0, 7)
    assert sampler.pick(logits, (1, 1)).token in (0, 7)


def test_a_repeated_prompt_token_is_penalised_and_not_counted() -> None:
    logits = torch.ones(SIZE)
    first = Sampler(ask_of(temperature=0, repetition_penalty=2.0, prompt=(0, 1)), SIZE, set())
    assert first.pick(logits, ()).token == 2
    assert first.pick(logits, (2,)).token == 3  # a sampler remembers what it has read
    assert first.pick(logits, (2, 3)).token == 4
    second = Sampler(ask_of(temperature=0, presence_penalty=2.0, prompt=(0, 1)), SIZE, set())
    assert second.pick(logits, ()).token == 0
    assert second.pick(logits, (0,)).token == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.5}, {"presence_penalty": 1.0}, {"top_k": 2}])
def test_scores_that_are_no_numbers_are_an_error(
    temperature: float, bad: float, more: dict[str, Any]
) -> None:
    logits = logits_of(1)
    logits[5] = bad
    with pytest.raises(NoToken, match="not numbers"):
        Sampler(ask_of(temperature=temperature, **more), SIZE, {0}).pick(logits, ANSWER)
    with pytest.raises(NoToken, match="not numbers"):
        logprobs_of(logits[None], [1], 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_allowed_is_an_error(temperature: float) -> None:
    with pytest.raises(NoToken, match="not numbers"):
        Sampler(ask_of(temperature=temperature), SIZE, {0}).pick(torch.full((SIZE,), -math.inf), ())
    only_the_end = ask_of(grammar=Allows(0), temperature=temperature, min_tokens=3)
    with pytest.raises(NoToken, match="nothing may follow"):
        Sampler(only_the_end, SIZE, {0}).pick(logits_of(1), ())


def test_the_grammar_hears_of_every_token() -> None:
    grammar = Allows(4, 5)
    sampler = Sampler(ask_of(grammar=grammar, logit_bias={6: 100.0}), SIZE, {0})
    picked = [sampler.pick(logits_of(i), ()).token for i in range(10)]
    assert grammar.accepted == picked and set(picked) <= {4, 5}
    assert not sampler.complete
    grammar.complete = True
    assert sampler.complete


def test_a_bias_on_no_token_is_refused() -> None:
    with pytest.raises(UnderstudyError, match=r"logit_bias.* 12"):
        Sampler(ask_of(logit_bias={12: 1.0}), SIZE, {0})
