"""How much Python does one MoE layer of a decode step cost, when nothing is computed or moved?

    python bench/overhead.py [--models fine,coarse] [--steps 200] [--repeats 5] [--smoke] [--json]

The seam is called directly with the routing of real text; the experts' kernels are replaced by
nothing. What remains is the engine's own: the event, the decision, the book, the kernel's
arguments, the sum over ranks. Then the opposite: whole decode steps whose experts answer zero.

    resident             every expert is there for good, as where the model fits
    missing              slots for a third of the experts, speculation off: a load lands the moment
                         it is asked for, so victims are chosen and slots change hands, but nothing
                         is read
    missing + guesses    the same, and the next layer's router is asked, as in a real step
    device, ...          the same three with a device that computes and copies in no time: what the
                         host spends to decide and to ask, without what a driver takes for launches,
                         copies and events
    frame, eager         attention, norms, routers, the head: everything but experts and seam
    frame, compiled      the same, decoder layers compiled

The last line is JSON. Microseconds per MoE layer and decode step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import card as cards
from bench import show
from bench.device.nothing import Nothing
from understudy import bench as own_bench
from understudy import demo, on_device
from understudy import model as guest
from understudy.core import (
    ExpertId,
    Forward,
    LayerEvent,
    Phase,
    UnderstudyError,
    current_forward,
)
from understudy.engine import Engine, inspect
from understudy.experts.compute import Batch, Fused
from understudy.policies.predict import SelfSwitch
from understudy.policies.residency import Slot

RESIDENT, MISSING, GUESSING = "resident", "missing", "missing + guesses"
FRAMES = {"frame, eager": "eager", "frame, compiled": "compiled"}
SHARE = 0.33  # of the experts, where some are missing
COLUMNS = (
    ("model", lambda r: r["model"]),
    ("variant", lambda r: r["variant"]),
    ("us per layer", lambda r: f"{r['us']:.1f}"),
    ("min-max", lambda r: f"{r['us_min']:.1f}-{r['us_max']:.1f}"),
)


@contextmanager
def no_compute() -> Iterator[None]:
    """The kernels answer at once, and outputs are whatever lay in memory. All that is done for a
    kernel beforehand, and the sum over ranks, are left as they are."""
    kernels = [(Fused, "__call__"), (Batch, "_compute")]
    kept = [getattr(owner, name) for owner, name in kernels]
    for owner, name in kernels:
        setattr(owner, name, lambda self, *args, **kwargs: None)
    try:
        yield
    finally:
        for (owner, name), method in zip(kernels, kept, strict=True):
            setattr(owner, name, method)


@contextmanager
def no_transfer(engine: Engine) -> Iterator[None]:
    """Loads land at once."""
    runtime = engine.model.understudy.runtime
    transfer, book = runtime.transfer, runtime.director.book

    def land(loads: Sequence[tuple[ExpertId, Slot]], *, as_they_lie: bool = False) -> None:
        for expert, _ in loads:
            book.launch(expert)
            book.land(expert)

    transfer.demand_all, transfer.speculate = land, lambda guesses: None
    try:
        yield
    finally:
        del transfer.demand_all, transfer.speculate


def decode_events(engine: Engine, steps: int) -> list[LayerEvent]:
    """Routing of real text, the prompt's events left out. Fills every slot on the way."""
    (prompt,) = own_bench.prompts(engine, 1, 512)
    engine.start_recording()
    engine.generate(prompt, max_new_tokens=steps + 1, ignore_eos=True)
    events = engine.stop_recording()
    _make_resident(engine)
    return [event for event in events if event.phase is Phase.DECODE]


def _make_resident(engine: Engine) -> None:
    """Ask every layer for every expert once."""
    runtime, width = engine.model.understudy.runtime, _hidden(engine)
    for layer, module in enumerate(engine.model.understudy.anatomy.modules):
        ids = torch.arange(module.num_experts)[:, None]
        x = torch.zeros(module.num_experts, width, dtype=engine.model.dtype)
        runtime(layer, x, ids, torch.ones_like(ids, dtype=x.dtype))


def _hidden(engine: Engine) -> int:
    return int(engine.model.config.hidden_size)


def steps_of(events: Sequence[LayerEvent]) -> list[list[tuple[int, torch.Tensor, torch.Tensor]]]:
    """Per step, per layer: the arguments of the seam."""
    steps: dict[int, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    for event in events:
        call = (event.layer, torch.tensor(event.ids), torch.tensor(event.weights))
        steps.setdefault(event.step, []).append(call)
    return list(steps.values())


def seconds_per_layer(engine: Engine, steps: Sequence[Any], routers: bool) -> float:
    """Call the seam for every step and layer; mean seconds of one call."""
    runtime = engine.model.understudy.runtime
    x = torch.zeros(1, _hidden(engine), dtype=engine.model.dtype)
    calls, spent = 0, 0.0
    for number, step in enumerate(steps):
        forward = Forward(step=number, phase=Phase.DECODE, requests=(0,))
        if routers:
            forward.router_args = {layer: ((x,), {}) for layer, _, _ in step}
        token = current_forward.set(forward)
        runtime.begin(forward)
        started = time.perf_counter()
        for layer, ids, weights in step:
            runtime(layer, x, ids, weights)
        spent += time.perf_counter() - started
        calls += len(step)
        runtime.end(forward)
        current_forward.reset(token)
    return spent / calls


def resident(model: Path, steps: int, repeats: int) -> tuple[list[float], list[Any]]:
    """Seconds of a layer whose experts are all there, one number per turn; and the steps."""
    found = inspect(model)
    memory = found.smallest_memory + found.experts * found.slot_bytes
    with Engine(model, memory=memory) as engine, torch.inference_mode():
        calls = steps_of(decode_events(engine, steps))
        before = engine.model.understudy.counters
        with no_compute():
            turns = [seconds_per_layer(engine, calls, routers=False) for _ in range(repeats + 1)]
        moved = (engine.model.understudy.counters - before).bytes_read
    if moved:
        raise UnderstudyError(f"{moved} bytes were read where every expert should be resident")
    return turns, calls


def missing(model: Path, calls: Sequence[Any], repeats: int, guesses: bool) -> list[float]:
    """Seconds of a layer that misses, one number per turn. ``guesses``: routers are asked."""
    found = inspect(model)
    memory = found.smallest_memory + int(SHARE * found.experts) * found.slot_bytes
    with Engine(model, memory=memory) as engine, torch.inference_mode():
        engine.model.understudy.runtime.director.switch = SelfSwitch(
            enabled=guesses, adaptive=False
        )
        with no_compute(), no_transfer(engine):
            turns = [seconds_per_layer(engine, calls, routers=guesses) for _ in range(repeats + 1)]
        if not engine.model.understudy.counters.misses:
            raise UnderstudyError("nothing was missed where most experts should be absent")
    return turns


def on_a_device(
    model: Path, calls: Sequence[Any], repeats: int
) -> Iterator[tuple[str, list[float]]]:
    """The same three, the experts being a device's that takes no time."""
    on_device.OPENERS["nothing"] = lambda asked: Nothing()
    where = {"device": "nothing", "kernel": "triton", "frame": "eager", "memory": "1GiB"}
    third = max(2, int(SHARE * inspect(model).experts))
    for name, slots, guesses in ((RESIDENT, None, False), (MISSING, third, False),
                                 (GUESSING, third, True)):  # fmt: skip
        with Engine(model, slots=slots, **where) as engine, torch.inference_mode():
            engine.model.understudy.runtime.director.switch = SelfSwitch(
                enabled=guesses, adaptive=False
            )
            turns = [seconds_per_layer(engine, calls, routers=guesses) for _ in range(repeats + 1)]
        yield f"device, {name}", turns


def frame(model: Path, kind: str, steps: int, repeats: int) -> list[float]:
    """Seconds of a whole decode step per MoE layer when experts answer zero, one per turn."""
    with Engine(model, memory="100%", frame=kind) as engine, torch.inference_mode():
        lm, turns = engine.model, []
        guests = guest.guests(lm)
        for module in guests:
            module.seam = lambda layer, x, ids, weights: torch.zeros_like(x)
        (prompt,) = own_bench.prompts(engine, 1, 256)
        for _ in range(repeats + 1):
            cache = lm(input_ids=torch.tensor([prompt]), use_cache=True).past_key_values
            token = torch.tensor([prompt[:1]])
            started = time.perf_counter()
            for _ in range(steps):
                lm(input_ids=token, past_key_values=cache, use_cache=True)
            turns.append((time.perf_counter() - started) / steps / len(guests))
    return turns


def measure(model: Path, steps: int, repeats: int) -> list[dict[str, Any]]:
    """The rows of one model; the first turn warms up."""
    taken: dict[str, list[float]] = {}
    taken[RESIDENT], calls = resident(model, steps, repeats)
    taken[MISSING] = missing(model, calls, repeats, guesses=False)
    taken[GUESSING] = missing(model, calls, repeats, guesses=True)
    if find_spec("triton") is not None:
        taken |= dict(on_a_device(model, calls, repeats))
    for name, kind in FRAMES.items():
        taken[name] = frame(model, kind, steps, repeats)
    return [_row(model.name, name, turns[1:]) for name, turns in taken.items()]


def _row(model: str, variant: str, turns: Sequence[float]) -> dict[str, Any]:
    us = [1e6 * seconds for seconds in turns]
    return {
        "model": model, "variant": variant, "skipped": None, "rounds": len(us),
        "us": round(median(us), 2), "us_min": round(min(us), 2), "us_max": round(max(us), 2),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="fine,coarse")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="fewer steps")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    if "--smoke" in sys.argv:
        parser.set_defaults(steps=50, repeats=3)
    options = parser.parse_args()
    try:
        folders = {name: demo.models_folder() / name for name in options.models.split(",")}
        card = cards.card(folders, f"{options.steps} steps, {options.repeats} turns")
        cards.show(card)
        rows = [
            row
            for folder in folders.values()
            for row in measure(folder, options.steps, options.repeats)
        ]
    except UnderstudyError as error:
        show.say(f"error: {error}")
        return 2
    if not options.json:
        print(show.table(rows, COLUMNS))
    print(json.dumps({"rows": rows, "card": card}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
