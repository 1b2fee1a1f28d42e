"""Logits of one position -> the next token of one answer.

Knows: transformers' logits processors, OpenAI's and vLLM's meaning of each setting, randomness.
Does not know: the batch, text, what a grammar says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from understudy.batch import Ask, Sampling, TokenLogprob
from understudy.core import UnderstudyError

COLDEST = 1e-5  # below it a temperature is greedy: logits divided by less overflow
SLICE = 2**20  # logits that prompt logprobs look at together: 4 MiB

Step = Callable[[Tensor, Sequence[int]], Tensor]  # (scores [V], the answer so far) -> scores [V]


class NoToken(UnderstudyError):
    """No token can be picked: the scores are no numbers, or none is allowed."""


class Sampler:
    """Picks the tokens of one answer. Its randomness is its own."""

    def __init__(self, ask: Ask, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._ask, self._vocab_size = ask, vocab_size
        self._matcher = None if ask.grammar is None else ask.grammar.begin()
        self._steps = self._steps_of(eos_ids)
        self._draw = None if ask.sampling.temperature < COLDEST else _Draw(ask.sampling)

    @property
    def complete(self) -> bool:
        """The grammar lets nothing but the end follow: the answer is over."""
        return self._matcher is not None and self._matcher.complete

    def pick(self, logits: Tensor, answer: Sequence[int]) -> TokenLogprob:
        """``logits`` [V] float32, left as they are; ``answer``: the tokens picked before. The
        logprob is NaN where the ask wants none."""
        if self._draw is None and not self._steps:
            token = int(logits.argmax())  # of equals the lowest id; of NaN and numbers a NaN
            if not math.isfinite(float(logits[token])):
                raise _no_numbers(len(answer))
        else:
            token = self._pick_with_care(logits, answer)
        if self._matcher is not None:
            self._matcher.accept(token)
        if self._ask.logprobs is None:
            return TokenLogprob(token, math.nan)
        return logprobs_of(logits[None], [token], self._ask.logprobs)[0]

    def _pick_with_care(self, logits: Tensor, answer: Sequence[int]) -> int:
        if not math.isfinite(float(logits.max())):
            raise _no_numbers(len(answer))
        if not self._steps:
            assert self._draw is not None
            return self._draw(logits)
        scores = logits.clone()
        for step in self._steps:
            scores = step(scores, answer)
        best = int(scores.argmax())
        if scores[best] == -torch.inf:
            raise NoToken(
                f"token {len(answer) + 1} of the answer: nothing may follow; the grammar, "
                "logit_bias, min_tokens and ignore_eos contradict each other"
            )
        return best if self._draw is None else self._draw(scores)

    def _steps_of(self, eos_ids: Collection[int]) -> list[Step]:
        """What changes the scores before the temperature, in the contract's order. Bans come
        first: -inf survives whatever is added to it or multiplied with it."""
        ask, sampling = self._ask, self._ask.sampling
        steps: list[Step] = []
        if self._matcher is not None:
            steps.append(self._constrain)
        ends = [t for t in {*eos_ids, *ask.stop_token_ids} if 0 <= t < self._vocab_size]
        if ask.min_tokens and ends:
            steps.append(_NoEndBefore(ask.min_tokens, ends))
        if sampling.logit_bias:
            steps.append(_Bias(sampling, self._vocab_size))
        if sampling.repetition_penalty != 1.0:
            steps.append(_Repetition(ask))
        if sampling.presence_penalty or sampling.frequency_penalty:
            steps.append(_Counted(sampling))
        return steps

    def _constrain(self, scores: Tensor, answer: Sequence[int]) -> Tensor:
        assert self._matcher is not None
        self._matcher.constrain(scores)
        return scores


def logprobs_of(logits: Tensor, tokens: Sequence[int], top: int) -> tuple[TokenLogprob, ...]:
    """About ``tokens`` [n] by ``logits`` [n, V], row by row; in slices, so memory stays small."""
    rows = max(1, SLICE // logits.shape[1])
    found: list[TokenLogprob] = []
    for start in range(0, len(tokens), rows):
        found += _logprobs(logits[start : start + rows], tokens[start : start + rows], top)
    return tuple(found)


def _logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    total = logits.logsumexp(-1, keepdim=True)
    if not bool(total.isfinite().all()):
        raise NoToken(f"logprobs: {_CURE}")
    ids = torch.tensor(tokens, device=logits.device)[:, None]
    own = (logits.gather(1, ids) - total)[:, 0].tolist()
    if not top:
        return [TokenLogprob(t, p) for t, p in zip(tokens, own, strict=True)]
    values, places = logits.topk(min(top, logits.shape[1]), dim=-1)
    tops = zip(places.tolist(), (values - total).tolist(), strict=True)
    return [
        TokenLogprob(t, p, tuple(sorted(zip(*best, strict=True), key=lambda x: (-x[1], x[0]))))
        for t, p, best in zip(tokens, own, tops, strict=True)
    ]


# --------------------------------------------------------------------------- before the temperature


class _NoEndBefore:
    """min_tokens."""

    def __init__(self, tokens: int, ends: Sequence[int]) -> None:
        self._tokens, self._ends = tokens, list(ends)

    def __call__(self, scores: Tensor, answer: Sequence[int]) -> Tensor:
        if len(answer) < self._tokens:
            scores[self._ends] = -torch.inf
        return scores


class _Bias:
    """logit_bias. transformers' own class adds a row of the vocabulary's length per token."""

    def __init__(self, sampling: Sampling, vocab_size: int) -> None:
        outside = [t for t in sampling.logit_bias if not 0 <= t < vocab_size]
        if outside:
            raise UnderstudyError(
                f"logit_bias: there is no token {outside[0]}; they end at {vocab_size - 1}"
            )
        self._ids = torch.tensor(list(sampling.logit_bias))
        self._values = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)

    def __call__(self, scores: Tensor, answer: Sequence[int]) -> Tensor:
        scores[self._ids.to(scores.device)] += self._values.to(scores.device)
        return scores


class _Repetition:
    """repetition_penalty: once for every token that the prompt or the answer has, as in vLLM."""

    def __init__(self, ask: Ask) -> None:
        self._penalise = RepetitionPenaltyLogitsProcessor(float(ask.sampling.repetition_penalty))
        self._ids = torch.tensor(sorted(set(ask.prompt)), dtype=torch.long)
        self._known = set(ask.prompt)
        self._read = 0

    def __call__(self, scores: Tensor, answer: Sequence[int]) -> Tensor:
        new = set(answer[self._read :]) - self._known
        self._read = len(answer)
        if new:
            self._known |= new
            self._ids = torch.cat([self._ids, torch.tensor(list(new))])
        penalised: Tensor = self._penalise(self._ids.to(scores.device)[None], scores[None])[0]
        return penalised


class _Counted:
    """presence_penalty and frequency_penalty: they count the answer's tokens, not the prompt's."""

    def __init__(self, sampling: Sampling) -> None:
        self._presence, self._frequency = sampling.presence_penalty, sampling.frequency_penalty
        self._counts: dict[int, int] = {}
        self._read = 0

    def __call__(self, scores: Tensor, answer: Sequence[int]) -> Tensor:
        for token in answer[self._read :]:
            self._counts[token] = self._counts.get(token, 0) + 1
        self._read = len(answer)
        if self._counts:
            ids = torch.tensor(list(self._counts), device=scores.device)
            counts = torch.tensor(list(self._counts.values()), device=scores.device)
            scores[ids] -= self._frequency * counts + self._presence
        return scores


# ------------------------------------------------------------------------------- from it to a token


class _Draw:
    """Temperature, top_k, top_p and min_p; then one random number decides."""

    def __init__(self, sampling: Sampling) -> None:
        self._seed = sampling.seed
        self._dice = torch.Generator()  # on the CPU, so that a seed means the same everywhere
        if sampling.seed is None:
            self._dice.seed()
        else:
            self._dice.manual_seed(sampling.seed)
        self._warm = TemperatureLogitsWarper(float(sampling.temperature))
        self._top_k = TopKLogitsWarper(sampling.top_k) if sampling.top_k > 0 else None
        self._top_p = sampling.top_p if sampling.top_p < 1 else None
        self._min_p = MinPLogitsWarper(sampling.min_p) if sampling.min_p > 0 else None

    def __call__(self, scores: Tensor) -> int:
        scores = self._warm(None, scores[None])
        if self._top_k is not None:
            scores = self._top_k(None, scores)
        ids = None  # all
        if self._top_p is not None:
            ids, scores = _nucleus(scores, self._top_p)
        if self._min_p is not None:
            scores = self._min_p(None, scores)
        place = self._throw(scores[0])
        return place if ids is None else int(ids[place])

    def _throw(self, scores: Tensor) -> int:
        """Inverse transform sampling: one random number, where `torch.multinomial` throws one per
        token (20 times as long at 150,000 tokens)."""
        up_to = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        thrown = torch.rand((), dtype=torch.float64, generator=self._dice).to(scores.device)
        place = int(torch.searchsorted(up_to, thrown * up_to[-1], right=True))
        # The product may be rounded up to the whole; the first to reach that is the last with any.
        return place if place < len(up_to) else int(torch.searchsorted(up_to, up_to[-1]))


def _nucleus(scores: Tensor, top_p: float) -> tuple[Tensor | None, Tensor]:
    """top_p over ``scores`` [1, V]: token ids [n] (``None``: all), and the scores [1, n] of those.

    top_p drops the unlikeliest tokens as long as they hold 1 - top_p or less together. So of n
    tokens all that hold less than (1 - top_p) / n are dropped, and need not be sorted; the same is
    true of those that stay, with what is left of 1 - top_p, and so on while that helps. The rest
    is sorted, by transformers, with the top_p that means the same among them.
    """
    chances = scores[0].softmax(-1)
    whole = mass = float(chances.sum(dtype=torch.float64))
    ids = None
    while True:
        spare = mass - top_p * whole  # may be dropped yet
        stay = (chances >= 0.99 * spare / len(chances)).nonzero()[:, 0]  # 0.99: sums are rounded
        if len(stay) > 0.9 * len(chances):
            break
        ids, chances = stay if ids is None else ids[stay], chances[stay]
        mass = float(chances.sum(dtype=torch.float64))
    some = scores if ids is None else scores[:, ids]
    return ids, TopPLogitsWarper(min(1.0, top_p * whole / mass))(None, some)


_CURE = (
    "the model's scores are not numbers (NaN or infinity); its weights are damaged or overflow "
    "their type: try --dtype float32"
)


def _no_numbers(place: int) -> NoToken:
    return NoToken(f"token {place + 1} of the answer: {_CURE}")
