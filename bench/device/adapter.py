"""The engine as this benchmark calls it: the one file to mend when its interface moves.

Knows: `Engine`, its options, its counters, the expert and gather kernels. Does not know: cells,
rounds, tables. What this version of the engine cannot do yet is told by name (`lacking`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch

from bench.device.figures import Turn
from bench.device.ways import Way
from understudy import engine as engines
from understudy.core import Counters, UnderstudyError
from understudy.engine import Engine, Generation, Options
from understudy.experts.device import Device, Event
from understudy.experts.device.slab import Slab
from understudy.registry import require

KNOWN = frozenset(field.name for field in fields(Options))
# What an engine without a device does anyway, so that it need not be asked for.
IMPLIED = {"decode": "host"}
HEADROOM = 3 << 30  # bytes of the device beside weights and slots: workspaces, graphs, the KV cache


@dataclass(frozen=True, slots=True)
class Spot:
    """Where engines run. ``device``: ``cuda``, ``cuda:1``, or ``cpu`` for a try without one."""

    device: str = "cuda"

    @property
    def accelerated(self) -> bool:
        return self.device != "cpu"

    def options(self, need: int) -> dict[str, Any]:
        """``need``: bytes of dense weights and slots on the device."""
        if not self.accelerated:
            return {}
        return {"device": self.device, "device_memory": need + HEADROOM, "memory": "auto"}


def lacking(way: Way, spot: Spot) -> str | None:
    """Why this version of the engine cannot go this way."""
    if spot.accelerated and "device" not in KNOWN:
        return "this version of Understudy has no device tier"
    for name, value in way.options.items():
        if name not in KNOWN and IMPLIED.get(name) != value:
            return f"this version of Understudy has no option {name}"
    if way.driven == "device" and not spot.accelerated:
        return "needs an accelerator"
    names = {k: v for k, v in way.options.items() if k in ("route", "resolver")}
    try:
        require("lru", "none", **names)
    except UnderstudyError as e:
        return str(e)
    if way.options.get("resolver", "fetch") != "fetch" and not spot.accelerated:
        return "needs an accelerator"
    return None


def open_engine(
    source: Any, way: Way, spot: Spot, *, slots: int | str, need: int, beside: Engine | None = None,
    **settings: Any,
) -> Engine:  # fmt: skip
    """``slots``: on the device; ``settings``: further options. ``beside``: an engine of the same
    source that stays open, whose host memory is used instead of pinning all experts again."""
    options = {k: v for k, v in way.options.items() if k in KNOWN}
    with nullcontext() if beside is None else _lent(beside):
        return Engine(source, slots=slots, **{**spot.options(need), **options, **settings})


@contextmanager
def _lent(lender: Engine) -> Iterator[None]:
    """While inside, an engine that is opened borrows the host tier of ``lender``. Nobody writes to
    one that holds every expert, and engines of a benchmark take turns, so it may be shared; no user
    needs that, so the engine has no option for it."""
    from understudy import on_device

    own = on_device.OnDevice._host
    tier = lender.model.understudy.runtime.compute.host
    assert tier.holds_all
    on_device.OnDevice._host = lambda *args: _Borrowed(tier)  # type: ignore
    try:
        yield
    finally:
        on_device.OnDevice._host = own  # type: ignore[method-assign]


class _Borrowed:
    """A host tier that its borrower cannot close."""

    def __init__(self, tier: Any) -> None:
        self._tier = tier

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tier, name)

    def __contains__(self, expert: object) -> bool:
        return expert in self._tier

    def close(self) -> None: ...


def open_device(spot: Spot) -> Device | None:
    if not spot.accelerated:
        return None
    from understudy.on_device import open_device

    return open_device(spot.device)


# ----------------------------------------------------------------------------------- one answer


@dataclass(frozen=True, slots=True)
class Answer:
    """``logits`` [tokens, vocabulary] on the CPU, where they were asked for."""

    turn: Turn
    logits: torch.Tensor | None


def answer(
    engine: Engine, device: Device | None, prompt: Sequence[int], dictated: Sequence[int],
    keep_logits: bool = False,
) -> Answer:  # fmt: skip
    """Read ``prompt``, then continue with the dictated tokens."""
    with _Marks(device) as marks:
        generation = engine.generate(
            list(prompt),
            max_new_tokens=len(dictated),
            ignore_eos=True,
            dictated=dictated,
            keep_logits=keep_logits,
        )
    logits = None
    if generation.logits is not None:
        logits = torch.stack([step.cpu() for step in generation.logits])
    return Answer(_turn(generation, marks.seconds, engine.plan.expert_bytes), logits)


def _turn(generation: Generation, device_seconds: float | None, expert_bytes: int) -> Turn:
    decode: Counters = generation.decode_counters
    prompt: Counters = generation.counters - decode
    steps = len(generation.tokens) - 1
    return Turn(
        steps=steps,
        seconds=generation.tpot * steps,
        ttft=generation.ttft,
        device_seconds=device_seconds,
        read_bytes=decode.bytes_read,
        needed_bytes=max(0, decode.bytes_read - decode.wasted_bytes),
        cpu_bytes=getattr(decode, "computed_in_place", 0) * expert_bytes,
        lookups=decode.lookups,
        hits=decode.hits,
        late=decode.late,
        stall_seconds=decode.stall_seconds,
        prompt_bytes=prompt.bytes_read,
    )


class _Marks:
    """Inside, every token that an engine hands out leaves a mark in the device's stream: the time
    between the first and the last is that of the decode steps by the device's own clock."""

    def __init__(self, device: Device | None) -> None:
        self._device = device
        self._marks: list[Event] = []

    def __enter__(self) -> _Marks:
        self._original, marks = engines._Listener, self

        class Marking(engines._Listener):
            def put(self, value: torch.Tensor) -> None:
                super().put(value)
                if len(self.times) > 0:
                    marks.mark()

        if self._device is not None:
            engines._Listener = Marking  # type: ignore[misc]
        return self

    def __exit__(self, *exc: object) -> None:
        engines._Listener = self._original  # type: ignore[misc]

    def mark(self) -> None:
        assert self._device is not None
        self._marks.append(self._device.compute.record(timed=True))

    @property
    def seconds(self) -> float | None:
        if len(self._marks) < 2:
            return None
        self._marks[-1].synchronize()
        return self._marks[-1].seconds_since(self._marks[0])


def routed(engine: Engine, prompt: Sequence[int]) -> set[tuple[int, int]]:
    """(layer, expert) of everybody the prompt asks for."""
    engine.start_recording()
    engine.generate(list(prompt), max_new_tokens=1, ignore_eos=True)
    events = engine.stop_recording()
    return {(event.layer, expert) for event in events for expert in event.needed()}


def notes(engine: Engine) -> Mapping[str, Any]:
    """What the engine says it is, for the record of the run."""
    policies = engine.model.understudy.policies
    kept = ("kernel", "frame", "decode", "device", "speculating", "lookahead_unavailable")
    return {name: str(policies[name]) for name in kept if policies.get(name)}


# ------------------------------------------------------------------------------------ the kernels

MOST_MOVES = 64  # experts of one list of the gather kernel


def expert_kernel(
    device: Device, slab: Slab, format: str, dtype: torch.dtype, arena: torch.Tensor, pairs: int
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """x [1, H], slots int32 [1, k], weights [1, k] -> [1, H], over slots of ``slab.nbytes``, with
    the tiles that the engine would use. ``pairs``: k."""
    from understudy.experts.device import swiglu, tuning

    where = device, slab, format, dtype, arena, slab.nbytes
    compiled = device.torch_device.type != "cpu"  # an interpreter would measure itself
    tiles = tuning.choose(tuning.Trial(*where, pairs)).tiles if compiled else None
    return swiglu.Swiglu(*where, pairs, tiles=tiles).few  # type: ignore[no-any-return]


def gather_rate(
    device: Device, arena: torch.Tensor, nbytes: int, addresses: Sequence[int]
) -> tuple[float, str]:
    """Bytes per second with the amount of the device that the engine would choose, and which."""
    from understudy.experts.device import reach

    found = reach.rates(device, arena, nbytes, addresses, nbytes)
    chosen = reach.smallest_of_the_quick(found)
    return found[chosen], str(chosen)
