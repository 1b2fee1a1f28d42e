"""One decode step of a guest model, recorded once and repeated without the host's time.

Knows: transformers' generate, its static caches, the seam. Does not know: experts, or more about a
device than that it gives out graphs.

A decode step is some dozens of small operations per layer, and asking for them takes the host
longer than the device needs to do them. So the step is recorded, cut where experts are asked:

    graph 0 -> seam of layer 0 -> graph 1 -> seam of layer 1 -> ... -> last graph -> logits

A seam that needs nothing of the host (``capturable``) is recorded with the rest: one graph.

A graph repeats the same work at the same addresses. So token and position are copied to where it
reads them, and the KV cache has room for the whole context and its length on the device: `Kept`.
Whatever else a family decides on the host while it runs makes it unfit, and is found in one of two
ways: a device refuses to record what the host waits for, and a recorded step is compared with
eager ones, at other lengths than its own, before it is used. `NotCaptured` says why a model stays
eager.

On a real device nothing runs while a step is recorded, though transformers' counters move; on a
device that is not there everything runs. So nothing that a recording leaves in the cache is kept:
it is reset, in place, before anybody uses it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import (
    DummyLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionLayer,
    StaticCache,
    StaticIndexedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from understudy.core import Forward, Phase, current_forward
from understudy.model import Seam, guests, quiet, text_config

PROMPT, STEPS = 4, 4  # tokens of a rehearsal: read, then answered one by one
TOLERANCE = 0.03  # of the largest logit; the same work in a graph may round elsewhere
ATTENTION = ("sdpa", "eager")  # others cannot leave out the empty end of a static cache

DECIDING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

Ask = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # see `Seam`


class NotCaptured(Exception):
    """This model stays eager; the text says why."""


class Graph(Protocol):
    def begin(self) -> None: ...
    def end(self) -> None: ...
    def replay(self) -> None: ...


class Device(Protocol):
    """What a recording needs of `experts.device.Device`."""

    def graph(self, shares: Any = None) -> Any: ...


# ------------------------------------------------------------------------------------- the KV cache


class Window(StaticSlidingWindowLayer):
    """transformers' sliding window, with a single token added by the same work whether the window
    is full or not; transformers decides that on the host."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if key_states.shape[-2] > 1:
            found: tuple[torch.Tensor, torch.Tensor]
            found = super().update(key_states, value_states, *args, **kwargs)
            self.cumulative_length.fill_(self.cumulative_length_int)  # not kept once it is full
            return found
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        last = self.max_cache_len - 1
        full = (self.cumulative_length > last).long()
        order = (torch.arange(last + 1, device=self.device) + full).clamp(max=last)
        place = self.cumulative_length.clamp(max=last).view(1)
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            held.copy_(held.index_select(2, order))
            held.index_copy_(2, place, new)
        self.cumulative_length.add_(1)
        self.cumulative_length_int += 1
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        if query_length > 1:
            return super().get_mask_sizes(query_length)  # type: ignore[no-any-return]
        return self.max_cache_len, (self.cumulative_length - self.max_cache_len + 1).clamp(min=0)


# Layers whose decode step is the same work at any length.
STEADY = (
    StaticLayer, Window, StaticIndexedLayer, LinearAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer, DummyLayer,
)  # fmt: skip


class Kept(StaticCache):
    """Room for ``context`` tokens of one sequence at addresses that stay. ``tokens``: how many it
    holds, known without asking the device. Raises `NotCaptured` for families it cannot serve."""

    makes_masks = (
        True  # in the forward, from lengths on the device: `generate` need not prepare any
    )

    def __init__(self, config: Any, context: int) -> None:
        try:
            super().__init__(config=config, max_cache_len=context)
        except KeyError as e:
            raise NotCaptured(f"transformers has no static cache for layers of type {e}") from e
        self.layers = [
            Window(context, layer.max_cache_len)
            if type(layer) is StaticSlidingWindowLayer
            else layer
            for layer in self.layers
        ]
        for layer in self.layers:
            if type(layer) not in STEADY:
                raise NotCaptured(f"what a {type(layer).__name__} does depends on its length")
        attention = [i for i, x in enumerate(self.layers) if isinstance(x, StaticLayer)]
        if not attention:
            raise NotCaptured("no layer has attention")
        self._first, self.tokens = attention[0], 0

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx == self._first:
            self.tokens += key_states.shape[-2]
        found: tuple[torch.Tensor, torch.Tensor]
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return found

    def count(self) -> None:
        """A token was added by a graph: what the host knows of it."""
        self.tokens += 1
        for layer in self.layers:
            if isinstance(layer, Window):
                layer.cumulative_length_int += 1

    def reset(self) -> None:
        """Empty, in place."""
        super().reset()
        self.tokens = 0


# ---------------------------------------------------------------------------------------- recording


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a step stops for the experts of MoE layer ``layer``: what they are asked with, where
    their answer belongs, and what the hooks of `model.attach` had put into the `Forward`."""

    layer: int
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    out: torch.Tensor
    router_args: dict[int, tuple[Any, Any]]
    residuals: dict[int, tuple[Any, Any]]


class _NoDecisions(TorchDispatchMode):
    """Refuses what a graph cannot repeat: numbers that the host reads, and shapes that depend on
    numbers. A real device refuses these too, later and in other words."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not DECIDING.isdisjoint(function.tags) and not _picks_by_place(function, args):
            raise NotCaptured(f"it decides by numbers that the device computes ({function})")
        return function(*args, **(kwargs or {}))


def _picks_by_place(function: Any, args: Any) -> bool:
    """Indexing, and not by a mask."""
    masks = torch.bool, torch.uint8
    return function is torch.ops.aten.index.Tensor and not any(
        place is not None and place.dtype in masks for place in args[1]
    )


class _Recording:
    """Stands for the experts while a step is recorded: every call is a cut."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.graphs: list[Graph] = []
        self.cuts: list[Cut] = []
        self._rules = ExitStack()

    def begin(self) -> None:
        graph = self.device.graph(self.graphs[-1] if self.graphs else None)
        graph.begin()
        self.graphs.append(graph)
        self._rules.enter_context(_NoDecisions())

    def end(self) -> None:
        self._rules.close()
        self.graphs[-1].end()

    def __call__(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        self.end()
        forward = current_forward.get()
        assert forward is not None
        out = torch.zeros_like(hidden)  # outside of all graphs: none of them may take its memory
        at = (forward.router_args, forward.residuals)
        self.cuts.append(Cut(layer, hidden, ids, weights, out, *at))
        self.begin()
        return out

    def run(self, model: Any, kwargs: Mapping[str, Any]) -> Any:
        """The answer of one recorded forward; its tensors are written again at every replay."""
        token = current_forward.set(Forward(0, Phase.DECODE, requests=[0]))
        try:
            self.begin()
            try:
                out = model.forward(**kwargs)
            except BaseException:
                with suppress(Exception):  # the first error says more than what it broke
                    self.end()
                raise
            self.end()
            return out
        finally:
            current_forward.reset(token)


class _Witness:
    """Before a model, as a recorded step would be: notes what `generate` asks of a decode step."""

    asked: Mapping[str, Any] | None = None

    def applies(self, kwargs: Mapping[str, Any]) -> bool:
        if kwargs["input_ids"].shape[-1] == 1:
            self.asked = dict(kwargs)
        return False


def _stand_in(
    layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Experts of a rehearsal: their answer depends on all they are asked with."""
    return (hidden * (weights * (ids % 3 + 1)).sum(-1, keepdim=True)).to(hidden.dtype)


@contextmanager
def _rehearsal(model: Any, seam: Seam) -> Iterator[Callable[[Ask], None]]:
    """While inside, forwards are announced to nobody, and the experts are who was given last: no
    expert is read for a rehearsal. Afterwards ``seam`` again."""

    def play(ask: Any) -> None:
        for guest in guests(model):
            guest.seam = ask

    announce, model._announce = model._announce, None
    try:
        yield play
    finally:
        model._announce, model._captured = announce, None
        play(seam)


def _answer(model: Any, cache: Kept) -> torch.Tensor:
    """[1 + STEPS, vocabulary]: the logits of a short answer. Resets the cache before."""
    cache.reset()
    ids = torch.arange(1, PROMPT + 1, device=model.device).unsqueeze(0)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with quiet():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, disable_compile=True,
            max_new_tokens=1 + STEPS, return_dict_in_generate=True, output_logits=True,
            logits_processor=[_count_on], **settings,
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
    """A recorded decode step of one sequence. Put before a model as ``model._captured``."""

    def __init__(self, cache: Kept, asked: Mapping[str, Any], ask: Ask) -> None:
        """``asked``: what `generate` calls a decode step with; ``ask``: who answers at cuts."""
        self.cache, self.ask = cache, ask
        self.steps = 0  # repeated so far
        rest = {n: v for n, v in asked.items() if n != "past_key_values"}
        self._inputs = {n: v.clone() for n, v in rest.items() if isinstance(v, torch.Tensor)}
        self._constants = {n: v for n, v in rest.items() if n not in self._inputs}
        for name, value in self._constants.items():
            if not isinstance(value, bool | int | float | str | None):
                raise NotCaptured(f"a step is called with {name}, which changes with every token")
        self._graphs: list[Graph] = []
        self._cuts: list[Cut] = []
        self._lent = threading.Lock()

    @classmethod
    def record(
        cls, model: Any, device: Device, seam: Seam, context: int, cache: Kept | None = None
    ) -> Step:
        """``model``: attached to ``seam``. ``context``: tokens that memory was planned for; room for
        them is taken now. Raises `NotCaptured`, and the model is as it was."""
        config = text_config(model.config)
        if config._attn_implementation not in ATTENTION:
            raise NotCaptured(f"attention {config._attn_implementation!r} needs another cache")
        if context <= PROMPT + STEPS:
            raise NotCaptured(f"{context} tokens of context are too few to try it")
        with torch.no_grad(), _rehearsal(model, seam) as play:
            try:
                return cls._rehearsed(model, device, seam, cache or Kept(config, context), play)
            except NotCaptured:
                raise
            except Exception as e:  # whatever a family, a recording and a driver may raise
                raise NotCaptured(f"it cannot be recorded: {_line(e)}") from e

    @classmethod
    def _rehearsed(
        cls, model: Any, device: Device, seam: Seam, cache: Kept, play: Callable[[Ask], None]
    ) -> Step:
        """Eager, recorded, compared."""
        whole = getattr(seam, "capturable", False)
        ask: Ask = seam if whole else _stand_in
        play(ask)
        model._captured = witness = _Witness()
        expected = _answer(model, cache)
        if witness.asked is None:
            raise NotCaptured("its tokens are not generated one by one")
        step = cls(cache, witness.asked, ask)
        recording = _Recording(device)
        play(ask if whole else recording)
        step._keep(recording, recording.run(model, step._kwargs()))
        play(ask)
        model._captured = step
        step._check(expected, _answer(model, cache))
        cache.reset()
        step.ask, step.steps = seam, 0
        return step

    def _keep(self, recording: _Recording, out: Any) -> None:
        """``out``: of the recorded forward."""
        unknown = [n for n in out if n not in ("logits", "past_key_values")]
        if unknown or out.get("past_key_values") is not self.cache:
            raise NotCaptured(f"it answers with {', '.join(unknown) or 'another cache'}")
        self._graphs, self._cuts = recording.graphs, recording.cuts
        self._logits, self._output = out.logits, type(out)

    def _check(self, expected: torch.Tensor, found: torch.Tensor) -> None:
        if self.steps != STEPS:
            raise NotCaptured("generate asks for every step in another way")
        error = (found - expected).abs().max()
        if not error <= TOLERANCE * expected.abs().max():
            raise NotCaptured("the recorded step answers differently")

    def _kwargs(self) -> dict[str, Any]:
        return {"past_key_values": self.cache, **self._inputs, **self._constants}

    # -------------------------------------------------------------------------------- in its place

    @contextmanager
    def lend(self) -> Iterator[Kept | None]:
        """The cache, empty, for one request. ``None`` while another request has it: that one is
        answered eagerly, from a cache of its own."""
        if not self._lent.acquire(blocking=False):
            yield None
            return
        try:
            self.cache.reset()
            yield self.cache
        finally:
            self._lent.release()

    def applies(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether this forward is the recorded one: same cache, not empty, same arguments."""
        return (
            kwargs.get("past_key_values") is self.cache
            and self.cache.tokens > 0
            and len(kwargs) == 1 + len(self._inputs) + len(self._constants)
            and all(_alike(kwargs.get(name), held) for name, held in self._inputs.items())
            and all(n in kwargs and _equal(kwargs[n], v) for n, v in self._constants.items())
        )

    def __call__(self, kwargs: Mapping[str, Any]) -> Any:
        """What the model answers: logits [1, 1, vocabulary] and the cache. The experts are asked
        with tensors that the next step writes again."""
        for name, held in self._inputs.items():
            held.copy_(kwargs[name])
        forward = current_forward.get()
        for graph, cut in zip(self._graphs, self._cuts, strict=False):
            graph.replay()
            if forward is not None:
                forward.router_args, forward.residuals = cut.router_args, cut.residuals
            cut.out.copy_(self.ask(cut.layer, cut.hidden, cut.ids, cut.weights))
        self._graphs[-1].replay()
        self.cache.count()
        self.steps += 1
        return self._output(logits=self._logits.clone(), past_key_values=self.cache)


def _alike(given: Any, held: torch.Tensor) -> bool:
    same = isinstance(given, torch.Tensor) and given.shape == held.shape
    return same and given.dtype == held.dtype


def _equal(given: Any, value: Any) -> bool:
    return type(given) is type(value) and bool(given == value)


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
