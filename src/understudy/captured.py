"""One decode step of a guest model, recorded once and repeated without the host's time.

Knows: transformers' generate, the seam, a cache at addresses that stay. Does not know: experts, or
more about a device than that it gives out graphs.

A decode step is some dozens of small operations per layer, and asking for them takes the host
longer than doing them takes the device. So the step is recorded, cut where experts are asked:

    graph 0 -> seam of layer 0 -> graph 1 -> seam of layer 1 -> ... -> last graph -> logits

A seam that needs nothing of the host (``capturable``) is recorded with the rest: one graph.

A graph repeats the same work at the same addresses. So token and position are copied to where it
reads them, and the KV cache, `Kept`, has room for the whole context and knows its length on the
device. What else a family decides on the host makes it unfit, and shows in one of two ways: the
device refuses to record what the host must wait for, and a recorded step is compared with eager
ones, at other lengths than its own, before it is used. `NotCaptured` says why a model stays eager.

Nothing runs while a step is recorded, but what transformers counts on the host moves on. So
whatever rehearsals leave in the cache is thrown away: it is reset, in place, before each use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from understudy.core import Forward, current_forward
from understudy.model import Seam, announcer, guests, quiet, text_config
from understudy.steady_cache import Kept, NotCaptured

__all__ = ["Kept", "NotCaptured", "Step"]

PROMPT, STEPS = 4, 4  # tokens of a rehearsal: read at once, then answered one by one
# Of the largest logit: in a graph a kernel may be another one, and round elsewhere.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.03}
ATTENTION = ("sdpa", "eager")  # others do not leave out the empty end of a static cache


class Graph(Protocol):
    def begin(self) -> None: ...
    def end(self) -> None: ...
    def replay(self) -> None: ...


class Device(Protocol):
    """What a recording needs of `experts.device.Device`."""

    def graph(self, shares: Any = None) -> Any: ...


# ---------------------------------------------------------------------------------------- recording


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a step stops for the experts of MoE layer ``layer``: what they are asked with, where
    their answer belongs, and what the hooks of `model.attach` have put into the `Forward`."""

    layer: int
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    out: torch.Tensor
    router_args: dict[int, tuple[Any, Any]]
    residuals: dict[int, tuple[Any, Any]]


class _StandIn:
    """The experts of a rehearsal: their answer depends on all they are asked with."""

    def __call__(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return (hidden * (weights * (ids % 3 + 1)).sum(-1, keepdim=True)).to(hidden.dtype)

    def begin(self, forward: Forward) -> None: ...
    def end(self, forward: Forward) -> None: ...


class _Recording(_StandIn):
    """The experts while a step is recorded: every call is a cut."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.graphs: list[Graph] = []
        self.cuts: list[Cut] = []

    def run(self, model: Any, kwargs: Mapping[str, Any]) -> Any:
        """The answer of one recorded forward; its tensors are written again at every replay."""
        with model._announce((), kwargs):
            self._begin_graph()
            try:
                out = model.forward(**kwargs)
            except BaseException:
                with suppress(Exception):  # the first error says more than what it broke
                    self.graphs[-1].end()
                raise
            self.graphs[-1].end()
            return out

    def _begin_graph(self) -> None:
        graph = self.device.graph(self.graphs[-1] if self.graphs else None)
        graph.begin()
        self.graphs.append(graph)

    def __call__(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        self.graphs[-1].end()
        forward = current_forward.get()
        assert forward is not None
        out = torch.zeros_like(hidden)  # outside of all graphs: none of them may take its memory
        noted = forward.router_args, forward.residuals
        self.cuts.append(Cut(layer, hidden, ids, weights, out, *noted))
        self._begin_graph()
        return out


class _Witness:
    """Before a model, as a recorded step would be: notes what `generate` asks of a decode step."""

    asked: Mapping[str, Any] | None = None

    def applies(self, kwargs: Mapping[str, Any]) -> bool:
        if kwargs["past_key_values"].tokens:
            self.asked = dict(kwargs)
        return False


@contextmanager
def _rehearsal(model: Any, seam: Any) -> Iterator[Callable[[Any], None]]:
    """While inside, the experts are who was given last, and forwards are announced to no seam: no
    expert is read for a rehearsal. A capturable seam is part of what is tried, and stays."""

    def play(experts: Any) -> None:
        for guest in guests(model):
            guest.seam = experts

    before = [(guest, guest.seam) for guest in guests(model)]
    announce, captured = model._announce, model._captured
    model._announce = announcer(seam if _capturable(seam) else _StandIn())
    try:
        yield play
    finally:
        model._announce, model._captured = announce, captured
        for guest, own in before:
            guest.seam = own


def _capturable(seam: Any) -> bool:
    return bool(getattr(seam, "capturable", False))


def _answer(model: Any, cache: Kept) -> torch.Tensor:
    """[1 + STEPS, vocabulary]: the logits of a short answer. Resets the cache before."""
    cache.reset()
    ids = torch.arange(1, PROMPT + 1, device=model.device).unsqueeze(0)
    with quiet():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, disable_compile=True,
            max_new_tokens=1 + STEPS, do_sample=False, eos_token_id=None, pad_token_id=0,
            logits_processor=[_count_on], return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    return torch.cat(out.logits)


def _count_on(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Lets the next number be the next token, whatever the model prefers: small models repeat
    themselves, and then what an earlier step left behind looks right."""
    dictated = torch.full_like(scores, -torch.inf)
    dictated[:, ids.shape[1] + 1] = 0.0
    return dictated


# ----------------------------------------------------------------------------------------- the step


class Step:
    """A recorded decode step of one sequence. Put before a model as ``model._captured``.

    ``steps``: repeated so far. ``exact``: whether its rehearsal answered bit for bit as eager."""

    def __init__(self, cache: Kept, asked: Mapping[str, Any], seam: Any) -> None:
        """``asked``: what `generate` calls a decode step with; ``seam``: who answers at cuts."""
        self.cache, self.seam = cache, seam
        self.steps, self.exact = 0, False
        self._inputs = {n: v.clone() for n, v in asked.items() if isinstance(v, torch.Tensor)}
        self._asked = {**asked, **self._inputs}
        for name, value in asked.items():
            if not isinstance(value, torch.Tensor | bool | int | float | str | Kept | None):
                raise NotCaptured(f"generate asks for a step with {name}, which is no plain value")
        self._graphs: list[Graph] = []
        self._cuts: list[Cut] = []
        self._lent = threading.Lock()

    @classmethod
    def record(
        cls, model: Any, device: Device, seam: Seam, context: int, *, cache: Kept | None = None
    ) -> Step:
        """``model``: attached, eager, with its plan. ``seam``: who will answer at cuts.
        ``context``: the tokens that the plan was made for; room for all of them is taken now, but
        for a ``cache`` of another step of the same model. Raises `NotCaptured`, and the model is as
        it was."""
        config = text_config(model.config)
        if config._attn_implementation not in ATTENTION:
            raise NotCaptured(f"{config._attn_implementation} attention needs another cache")
        if context <= PROMPT + STEPS:
            raise NotCaptured(f"{context} tokens of context are too few to try it")
        with torch.no_grad(), _rehearsal(model, seam) as play:
            try:
                cache = Kept(config, context) if cache is None else cache
                step = cls._rehearsed(model, device, seam, cache, play)
            except NotCaptured:
                raise
            except Exception as e:  # whatever a family, a recording and a driver may raise
                raise NotCaptured(f"it cannot be recorded: {_line(e)}") from e
        step.cache.reset()
        step.seam, step.steps = seam, 0
        return step

    @classmethod
    def _rehearsed(
        cls, model: Any, device: Device, seam: Seam, cache: Kept, play: Callable[[Any], None]
    ) -> Step:
        """Eager, then recorded, then compared."""
        whole = _capturable(seam)
        experts = seam if whole else _StandIn()
        play(experts)
        model._captured = witness = _Witness()
        expected = _answer(model, cache)
        if witness.asked is None:
            raise NotCaptured("generate asks for no single tokens")
        step = cls(cache, witness.asked, experts)
        recording = _Recording(device)
        play(experts if whole else recording)
        step._keep(recording, recording.run(model, step._asked))
        play(experts)
        model._captured = step
        step._check(expected, _answer(model, cache), TOLERANCE[model.dtype])
        return step

    def _keep(self, recording: _Recording, out: Any) -> None:
        """``out``: the answer of the recorded forward."""
        unknown = [n for n in out if n not in ("logits", "past_key_values")]
        if unknown or out.get("past_key_values") is not self.cache:
            raise NotCaptured(f"it answers with {', '.join(unknown) or 'another cache'}")
        self._graphs, self._cuts = recording.graphs, recording.cuts
        self._logits, self._output = out.logits, type(out)

    def _check(self, expected: torch.Tensor, found: torch.Tensor, tolerance: float) -> None:
        if self.steps < STEPS:
            raise NotCaptured("generate does not ask for every step in the same way")
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= tolerance:
            raise NotCaptured(f"the recorded step answers differently, by {error:.1%}")
        self.exact = error == 0

    @contextmanager
    def lend(self) -> Iterator[Kept | None]:
        """The cache, empty, for one request. ``None`` while another request has it: that one runs
        eager, with a cache of its own."""
        if not self._lent.acquire(blocking=False):
            yield None
            return
        try:
            self.cache.reset()
            yield self.cache
        finally:
            self._lent.release()

    def applies(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether this forward is the recorded one: its cache, not empty, and the same asked."""
        return (
            kwargs.get("past_key_values") is self.cache
            and self.cache.tokens > 0
            and kwargs.keys() == self._asked.keys()
            and all(_same(kwargs[name], value) for name, value in self._asked.items())
        )

    def __call__(self, kwargs: Mapping[str, Any]) -> Any:
        """What the model answers: logits [1, 1, vocabulary] and the cache. The seam is asked with
        tensors that the next step writes again."""
        for name, held in self._inputs.items():
            held.copy_(kwargs[name])
        forward = current_forward.get()
        for graph, cut in zip(self._graphs, self._cuts, strict=False):
            graph.replay()
            if forward is not None:
                forward.router_args, forward.residuals = cut.router_args, cut.residuals
            cut.out.copy_(self.seam(cut.layer, cut.hidden, cut.ids, cut.weights))
        self._graphs[-1].replay()
        self.cache.count()
        self.steps += 1
        return self._output(logits=self._logits.clone(), past_key_values=self.cache)


def _same(given: Any, recorded: Any) -> bool:
    """What a forward is given; of tensors only the kind must be as recorded."""
    if isinstance(given, torch.Tensor) and isinstance(recorded, torch.Tensor):
        return given.shape == recorded.shape and given.dtype == recorded.dtype
    return type(given) is type(recorded) and bool(given == recorded)


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
