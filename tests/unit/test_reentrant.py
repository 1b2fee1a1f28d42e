"""A forward may be parked at the seam: fibers and threads get the answers they would get alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import greenlet
import pytest
import torch

from understudy import model as guest
from understudy.core import Forward, current_forward
from understudy.engine import load

LENGTHS = (3, 11, 1, 7)


@pytest.fixture
def model(tiny: Callable[..., Path]) -> Iterator[Any]:
    with load(tiny("qwen3_moe"), "1GiB", slots=6) as opened:
        yield opened


def integrity(model: Any) -> None:
    """Nobody holds anything."""
    runtime = model.understudy.runtime
    with runtime._lock:
        runtime.transfer.settle()
        runtime.director.book.check_integrity(idle=True)


class Parking:
    """A seam that hands control back to the hub before every experts call."""

    def __init__(self, seam: Any) -> None:
        self.seam = seam
        self.begin, self.end = seam.begin, seam.end
        self.parked = 0

    def __call__(self, *args: Any) -> Any:
        hub = greenlet.getcurrent().parent
        if hub is not None:
            self.parked += 1
            hub.switch("parked")
        return self.seam(*args)


def park(model: Any) -> Parking:
    seam = Parking(model.understudy.runtime)
    for module in guest.guests(model):
        module.seam = seam
    return seam


def test_fibers_of_different_lengths_interleave(model: Any, tokens: Callable[..., Any]) -> None:
    prompts = [tokens(n, seed=n) for n in LENGTHS]
    with torch.inference_mode():
        alone = [model(**p).logits for p in prompts]
        seam = park(model)
        found: dict[int, torch.Tensor] = {}

        def forward(i: int) -> None:
            found[i] = model(**prompts[i]).logits

        fibers = [greenlet.greenlet(lambda i=i: forward(i)) for i in range(len(prompts))]
        turns = 0
        while not all(f.dead for f in fibers):
            for fiber in fibers:
                if not fiber.dead:
                    fiber.switch()
                    turns += 1
                    integrity(model)  # parked forwards hold no pins
    layers = len(guest.guests(model))
    assert seam.parked == len(prompts) * layers
    assert turns == len(prompts) * (layers + 1)
    for i, expected in enumerate(alone):
        assert torch.equal(found[i], expected)


def test_padding_of_one_fiber_is_not_that_of_another(
    model: Any, tokens: Callable[..., Any]
) -> None:
    padded, full = tokens(2, 6, seed=1), tokens(6, 6, seed=2)  # equal shapes, different rows
    with torch.inference_mode():
        alone = [model(**p).logits for p in (padded, full)]
        park(model)
        found: list[Any] = [None, None]

        def forward(i: int, batch: Any) -> None:
            found[i] = model(**batch).logits

        fibers = [
            greenlet.greenlet(lambda i=i, b=b: forward(i, b)) for i, b in enumerate((padded, full))
        ]
        while not all(f.dead for f in fibers):
            for fiber in (f for f in fibers if not f.dead):
                fiber.switch()
    assert torch.equal(found[0], alone[0])
    assert torch.equal(found[1], alone[1])


def test_a_killed_fiber_leaves_nothing_behind(model: Any, tokens: Callable[..., Any]) -> None:
    prompt = tokens(5)
    with torch.inference_mode():
        expected = model(**prompt).logits
        seam = park(model)
        fiber = greenlet.greenlet(lambda: model(**prompt))
        fiber.switch()
        fiber.switch()
        fiber.throw(greenlet.GreenletExit)
        assert fiber.dead
        integrity(model)
        for module in guest.guests(model):
            module.seam = seam.seam
        assert torch.equal(model(**prompt).logits, expected)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", [0, 2])
def test_an_exception_in_the_middle_holds_no_pins_and_no_forward(
    model: Any,
    tokens: Callable[..., Any],
    layer: int,
    failure: type[BaseException],
) -> None:
    prompt = tokens(9)
    mlps = model.understudy.runtime.compute.mlps
    mlp, computed = mlps[layer], []

    class BreaksDown:
        """The real one, one expert per call, until the second."""

        def __getattr__(self, name: str) -> Any:
            return getattr(mlp, name)

        def most_native(self, *args: Any) -> int:
            return 0

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if computed:
                raise failure("in the middle of an event")
            computed.append(args)
            return mlp(*args, **kwargs)

    with torch.inference_mode():
        expected = model(**prompt).logits
        mlps[layer] = BreaksDown()
        with pytest.raises(failure):
            model(**prompt)
        integrity(model)
        assert current_forward.get() is None
        mlps[layer] = mlp
        assert torch.equal(model(**prompt).logits, expected)


def test_forwards_of_several_threads_do_not_mix(model: Any, tokens: Callable[..., Any]) -> None:
    prompts = [tokens(n, seed=n) for n in LENGTHS]
    with torch.inference_mode():
        alone = [model(**p).logits for p in prompts]
    found: dict[tuple[int, int], torch.Tensor] = {}

    def work(i: int) -> None:
        with torch.inference_mode():
            for again in range(3):
                found[i, again] = model(**prompts[i]).logits

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3 * len(prompts)
    assert all(torch.equal(logits, alone[i]) for (i, _), logits in found.items())
    integrity(model)


def test_one_thread_calls_two_models(
    model: Any, tiny: Callable[..., Path], tokens: Callable[..., Any]
) -> None:
    prompt = tokens(7)
    with load(tiny("mixtral"), "1GiB", slots=4) as other, torch.inference_mode():
        alone = [m(**prompt).logits for m in (model, other)]
        for m in (model, other):
            park(m)
        found: list[Any] = [None, None]

        def forward(i: int, m: Any) -> None:
            found[i] = m(**prompt).logits

        fibers = [
            greenlet.greenlet(lambda i=i, m=m: forward(i, m)) for i, m in enumerate((model, other))
        ]
        while not all(f.dead for f in fibers):
            for fiber in (f for f in fibers if not f.dead):
                fiber.switch()
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
        integrity(other)
    integrity(model)


def test_a_forward_inside_a_forward_gives_the_outer_one_back(
    model: Any, tiny: Callable[..., Path], tokens: Callable[..., Any]
) -> None:
    """A draft model asked from a hook of its target."""
    seen: list[Forward | None] = []
    with load(tiny("mixtral"), "1GiB", slots=4) as draft, torch.inference_mode():

        def ask(module: Any, args: Any, output: Any) -> None:
            before = current_forward.get()
            draft(**tokens(3))
            seen.extend([before, current_forward.get()])

        hook = model.model.layers[1].register_forward_hook(ask)
        found = model(**tokens(5)).logits
        hook.remove()
        without = model(**tokens(5)).logits
    assert seen[0] is not None
    assert seen[0] is seen[1]
    assert torch.equal(found, without)
