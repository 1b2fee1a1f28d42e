"""Rows as fibers get the answers they would get alone, share their experts, and leave nothing."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import greenlet
import pytest
import torch
from pretend import Pretend

from understudy import model as guest
from understudy import on_device
from understudy.batch import Chunk, Row, parking
from understudy.batch import fibers as under_test
from understudy.batch.fibers import Fibers, LostRow, Unbatchable
from understudy.core import Phase, ReadFailed, current_forward
from understudy.engine import load
from understudy.frame import CompiledLayer

TOLERANCE = 3e-6  # of the largest logit; fp32, other batches
FINE = Path(__file__).parents[2] / "models" / "fine"
PROMPTS = ([7, 9, 40, 22, 31, 8, 15, 16, 77], [50, 11, 12], [33], [7, 9, 40, 22, 31, 90])


@pytest.fixture
def model(tiny: Callable[..., Path]) -> Iterator[Any]:
    with load(tiny("qwen3_moe"), "1GiB", slots=6) as opened:
        yield opened


@pytest.fixture
def seats(model: Any) -> Fibers:
    return Fibers(model, capacity=1000)


def integrity(model: Any) -> None:
    """Nobody holds anything."""
    runtime = model.understudy.runtime
    with runtime._lock:
        runtime.transfer.settle()
        runtime.director.book.check_integrity(idle=True)


def enter(seats: Fibers, prompt: Sequence[int], room: int = 40, **options: Any) -> Row:
    row = Row(str(prompt), list(prompt), **options)
    seats.admit(row)
    assert seats.reserve(row, room - row.done)
    return row


def rest(row: Row, logits: Any = "last") -> Chunk:
    return Chunk(row, len(row.tokens) - row.done, logits)


def answer(seats: Fibers, rows: Sequence[Row], steps: int) -> list[list[torch.Tensor]]:
    """Greedy: the logits of every step, for each row."""
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    for _ in range(steps):
        for row, logits, out in zip(
            rows, found, seats.forward([rest(r) for r in rows]), strict=True
        ):
            assert out is not None
            logits.append(out[0])
            row.tokens.append(int(out[0].argmax()))
    return found


def alone(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """[T, V]: what the model says about all positions, in a plain forward."""
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return found


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


@pytest.fixture
def fibers(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Every fiber that a test makes, and its greenlet."""
    made: list[weakref.ref[Any]] = []

    class Seen(parking.Fiber):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.extend([weakref.ref(self), weakref.ref(self._greenlet)])

    monkeypatch.setattr(under_test, "Fiber", Seen)
    return made


def gone(things: Sequence[weakref.ref[Any]]) -> bool:
    gc.collect()
    return all(thing() is None for thing in things)


# ------------------------------------------------------------------------------ the same answers


def test_rows_join_leave_and_read_in_chunks_and_answer_as_alone(model: Any, seats: Fibers) -> None:
    first, second, third, late = (enter(seats, p) for p in PROMPTS)
    assert seats.forward([Chunk(first, 4, "none")]) == [None]
    mixed = seats.forward([Chunk(first, 2, "none"), rest(second), rest(third)])
    assert mixed[0] is None
    for row, out in zip((second, third), mixed[1:], strict=True):
        assert out is not None
        row.tokens.append(int(out[0].argmax()))
    answer(seats, [third, first, second], 3)
    seats.release(second)
    answer(seats, [late, first, third], 4)
    for row in (first, third, late):
        for place in range(len(row.tokens) - 4, len(row.tokens)):
            assert row.tokens[place] == int(alone(model, row.tokens[:place])[-1].argmax())
    assert first.done == len(first.tokens) - 1
    integrity(model)


@pytest.mark.parametrize("kind", ["none", "last", "all"])
def test_logits_are_given_as_asked(model: Any, seats: Fibers, kind: Any) -> None:
    rows = [enter(seats, p) for p in PROMPTS]
    expected = {"none": 0, "last": 1, "all": 1000}[kind]
    for row, out in zip(rows, seats.forward([rest(r, kind) for r in rows]), strict=True):
        wanted = alone(model, row.tokens)[-expected:]
        assert out is None if kind == "none" else close(out, wanted)
        assert out is None or out.shape == wanted.shape


def test_logits_of_a_model_in_bf16_are_in_fp32(tiny: Callable[..., Path]) -> None:
    with load(tiny("mixtral", "bfloat16"), "1GiB", slots=4) as model:
        seats = Fibers(model, capacity=100)
        (out,) = seats.forward([rest(enter(seats, PROMPTS[0]))])
        assert out is not None and out.dtype == torch.float32


def test_the_model_can_be_called_meanwhile(model: Any, seats: Fibers) -> None:
    before = alone(model, PROMPTS[0])
    row = enter(seats, PROMPTS[1])
    answer(seats, [row], 2)
    assert torch.equal(alone(model, PROMPTS[0]), before)
    nested: list[torch.Tensor] = []

    def from_the_middle_of_a_step(*_: Any) -> None:
        hook.remove()
        nested.append(alone_outside(model, PROMPTS[0]))

    norm = model.model.layers[1].post_attention_layernorm
    hook = norm.register_forward_hook(from_the_middle_of_a_step)
    answer(seats, [row], 1)
    assert torch.equal(nested[0], before)
    seats.close()
    assert all(g.seam is model.understudy.runtime for g in guest.guests(model))
    assert torch.equal(alone(model, PROMPTS[0]), before)


def alone_outside(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """As another thread would: in no fiber of ours."""
    found: list[torch.Tensor] = []
    greenlet.greenlet(lambda: found.append(alone(model, tokens))).switch()
    return found[0]


@pytest.mark.slow
def test_compiled_layers_run_as_fibers_too() -> None:
    answers = []
    for kind in ("eager", "compiled"):
        with load(FINE, "100%", frame=kind, dtype="float32") as model:
            seats = Fibers(model, capacity=1000)
            rows = [enter(seats, p) for p in PROMPTS]
            answers.append(torch.cat([torch.stack(a) for a in answer(seats, rows, 4)]))
    assert (answers[0] - answers[1]).abs().max() <= 1e-4 * answers[0].abs().max()


def test_rows_on_a_device_with_a_recorded_step(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(on_device.OPENERS, "pretend", lambda asked: Pretend(memory=2 << 30))
    device = {"device": "pretend", "kernel": "torch", "max_context": 64, "slots": 6}
    with load(tiny("qwen3_moe"), "1GiB", **device) as model:
        assert model.understudy.policies["frame"] == "recorded"
        seats = Fibers(model, capacity=1000)
        rows = [enter(seats, p) for p in PROMPTS]
        for row, logits in zip(rows, answer(seats, rows, 3), strict=True):
            assert close(logits[-1], alone(model, row.tokens[:-1])[-1])
        integrity(model)


def test_layers_that_torch_calls_are_refused(model: Any) -> None:
    layer = object.__new__(CompiledLayer)
    layer.code = SimpleNamespace(program=None)  # type: ignore[assignment]
    model.model.layers[0].forward = layer
    with pytest.raises(Unbatchable, match="frame='eager'"):
        Fibers(model, capacity=100)


# -------------------------------------------------------------------------------- shared experts


def test_what_several_rows_need_is_loaded_once(model: Any, seats: Fibers) -> None:
    layers = len(guest.guests(model))
    rows = [enter(seats, p) for p in PROMPTS]
    seats.forward([rest(r) for r in rows])
    for row in rows:
        row.tokens.append(row.tokens[-1])
    model.understudy.start_recording()
    before = model.understudy.counters
    seats.forward([rest(r) for r in rows])
    counted, events = model.understudy.counters - before, model.understudy.stop_recording()
    needed = sum(len({e for token in event.ids for e in token}) for event in events)
    assert (counted.steps, counted.tokens, counted.events) == (1, len(rows), layers)
    assert counted.lookups == needed < sum(len(t) for event in events for t in event.ids)
    assert [event.layer for event in events] == list(range(layers))
    assert {event.step for event in events} == {events[0].step}


def test_a_cold_step_misses_the_union_and_nothing_else(tiny: Callable[..., Path]) -> None:
    with load(tiny("qwen3_moe"), "1GiB", slots=32, predictor="none") as model:
        seats = Fibers(model, capacity=1000)
        model.understudy.start_recording()
        seats.forward([rest(enter(seats, p)) for p in PROMPTS])
        events = model.understudy.stop_recording()
        union = {(event.layer, e) for event in events for token in event.ids for e in token}
        assert model.understudy.counters.misses == len(union)


def test_events_say_which_row_a_token_is_of_and_what_kind_of_step(
    model: Any, seats: Fibers
) -> None:
    rows = [enter(seats, p) for p in PROMPTS[:3]]
    model.understudy.start_recording()
    seats.forward([rest(rows[0])])
    rows[0].tokens.append(5)
    seats.forward([rest(rows[1]), rest(rows[0]), rest(rows[2])])
    for row in rows[1:]:
        row.tokens.append(5)
    seats.forward([rest(rows[1]), rest(rows[2])])
    events = [e for e in model.understudy.stop_recording() if e.layer == 1]
    assert [list(e.requests) for e in events] == [[0] * 9, [0, 0, 0, 1, 2], [0, 1]]
    assert [e.phase for e in events] == [Phase.PREFILL, Phase.PREFILL, Phase.DECODE]


def test_later_routers_are_asked_about_all_rows(tiny: Callable[..., Path]) -> None:
    with load(
        tiny("qwen3_moe"), "1GiB", slots=6, predictor="next-gate", self_switch=False
    ) as model:
        seats = Fibers(model, capacity=1000)
        model.understudy.start_recording()
        seats.forward([rest(enter(seats, p)) for p in PROMPTS])
        together = model.understudy.stop_recording()
        model.understudy.start_recording()
        for prompt in PROMPTS:
            alone(model, prompt)
        apart = model.understudy.stop_recording()
        assert seats.apart == {}
        layers = len(guest.guests(model))
        for layer in range(layers - 1):
            foreseen = together[layer].lookahead[layer + 1][0]
            expected = [ids for e in apart[layer::layers] for ids in e.lookahead[layer + 1][0]]
            assert list(map(list, foreseen)) == list(map(list, expected))


def test_what_routers_cannot_be_told_together_is_left_out_and_said(
    model: Any, seats: Fibers
) -> None:
    def give_state(router: Any, args: Any) -> None:
        forward = current_forward.get()
        assert forward is not None
        forward.router_args = {1: (args, {"state": object()})}

    hook = model.model.layers[1].mlp.gate.register_forward_pre_hook(give_state)
    rows = [enter(seats, p) for p in PROMPTS]
    model.understudy.start_recording()
    answer(seats, rows, 2)
    events = model.understudy.stop_recording()
    hook.remove()
    assert seats.apart == {1: "its router is given something of each row's own: object"}
    assert all(not event.lookahead for event in events if event.layer == 1)
    assert rows[0].tokens[9] == int(alone(model, PROMPTS[0])[-1].argmax())


def test_arguments_of_routers_are_merged_along_the_tokens() -> None:
    merged = parking.merged
    a, b, weight = torch.randn(1, 3, 4), torch.randn(1, 2, 4), torch.randn(6)
    ids = [torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5]])]
    calls = [
        ((x, None, i), {"flat": x[0], "weight": weight}) for x, i in zip((a, b), ids, strict=True)
    ]
    (x, none, i), kwargs = merged(calls, [3, 2])
    assert x.shape == (1, 5, 4) and none is None and i.tolist() == [[1, 2, 3, 4, 5]]
    assert torch.equal(kwargs["flat"], torch.cat([a[0], b[0]])) and kwargs["weight"] is weight
    for parts in (
        [(a,), (b, b)],  # called in different ways
        [{"x": a}, {"y": b}],
        [a, None],
        [a, a[0]],
        [torch.randn(1, 2, 4), b],  # not one line per token
        [torch.randn(1, 3, 5), b],  # wider than the other
        [torch.tensor(1), torch.tensor(2)],
        [1, 2],
    ):
        with pytest.raises(parking.NotMerged):
            merged(parts, [3, 2])


# ---------------------------------------------------------------------------------------- the room


def test_room_is_reserved_given_back_and_never_exceeded(model: Any) -> None:
    seats = Fibers(model, capacity=20, kept=0)
    first, second = Row("a", [1] * 9), Row("b", [2] * 9)
    for row in (first, second):
        assert seats.admit(row) == 0
    assert seats.reserve(first, 12) and seats.used == 12
    assert not seats.reserve(second, 9) and seats.used == 12
    assert seats.reserve(second, 8) and seats.reserve(second, 3) and seats.used == 20
    seats.forward([Chunk(first, 9, "none")])
    assert seats.reserve(first, 3) and not seats.reserve(first, 4)
    for _ in range(2):
        seats.release(first)
    assert (seats.used, first.done, first.state) == (8, 0, None)
    assert seats.reserve(second, 20)


def test_a_row_that_costs_something_by_itself_still_fits_the_whole_context(model: Any) -> None:
    context = model.understudy.plan.context
    seats = Fibers(model, capacity=context, row_tokens=context // 4)
    row = Row("a", [1])
    seats.admit(row)
    assert seats.used == 0
    assert seats.reserve(row, 4) and seats.used == context // 4 + 3
    assert seats.reserve(row, context) and seats.used == context


# ---------------------------------------------------------------------------------------- prefixes


def test_a_beginning_that_is_known_is_copied_and_not_computed(model: Any, seats: Fibers) -> None:
    shared = list(range(20, 32))
    donor = enter(seats, [*shared, 3])
    seats.forward([rest(donor)])
    running = Row("b", [*shared, 4, 5])
    assert seats.admit(running) == running.done == 12 and seats.used == 40 + 12
    seats.release(donor)
    assert seats.reserve(running, 10)
    left = enter(seats, [*shared, 3, 6])
    assert left.done == 13
    again = enter(seats, shared)
    assert again.done == 11, "one token at least must be computed"
    model.understudy.start_recording()
    outs = seats.forward([rest(running), rest(left), rest(again)])
    assert len(model.understudy.stop_recording()[0].ids) == 2 + 1 + 1
    for row, out in zip((running, left, again), outs, strict=True):
        assert out is not None and close(out[0], alone(model, row.tokens)[-1])
    copied, theirs = (r.state.cache.layers[0].keys for r in (running, left))
    assert torch.equal(copied[:, :, :12], theirs[:, :, :12])
    assert copied.data_ptr() != theirs.data_ptr()


def test_who_must_compute_everything_neither_takes_nor_gives(seats: Fibers) -> None:
    donor = enter(seats, PROMPTS[0])
    seats.forward([rest(donor)])
    assert enter(seats, PROMPTS[0], shares_prefix=False).done == 0
    fresh = [61, 62, 63, 64]
    private = enter(seats, fresh, shares_prefix=False)
    seats.forward([rest(private)])
    seats.release(private)
    assert enter(seats, fresh).done == 0


def test_beginnings_are_kept_while_nobody_needs_the_room(model: Any) -> None:
    seats = Fibers(model, capacity=30, kept=3)

    def come_and_go(first: int) -> int:
        row = enter(seats, [first] * 8, room=8)
        found = row.done
        seats.forward([rest(row)])
        seats.release(row)
        return found

    assert [come_and_go(t) for t in (11, 12, 13, 11, 14)] == [0, 0, 0, 7, 0]
    assert seats.used == 0
    assert [kept.tokens[0] for kept in seats._left] == [13, 11, 14], "the least used one went"
    row = enter(seats, [15] * 10, room=20)
    assert [kept.tokens[0] for kept in seats._left] == [14]
    assert seats.reserve(row, 30) and not seats._left


# ------------------------------------------------------------------------------------- what breaks


class Failure(Exception):
    pass


def fails_at(model: Any, layer: int, error: BaseException, call: int) -> Any:
    """Attention of ``layer`` raises when it is called so many times."""
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise error

    return model.model.layers[layer].self_attn.register_forward_pre_hook(hook)


@pytest.mark.parametrize("error", [Failure(), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_row_that_breaks_ends_its_step_and_nothing_else(
    model: Any,
    seats: Fibers,
    layer: int,
    error: BaseException,
    fibers: list[weakref.ref[Any]],
) -> None:
    rows = [enter(seats, p) for p in PROMPTS]
    others, spectator = rows[:3], rows[3]
    answer(seats, rows, 1)
    caches = [weakref.ref(row.state.cache) for row in others]
    hook = fails_at(model, layer, error, call=2)
    with pytest.raises(type(error)):
        seats.forward([rest(row) for row in others])
    hook.remove()
    error.__traceback__ = None
    assert len(fibers) == 2 * (4 + 3) and gone(fibers), "who waited has ended"
    assert gone(caches)
    assert current_forward.get() is None
    integrity(model)
    with pytest.raises(LostRow, match="start it again"):
        seats.forward([rest(others[0])])
    for row in others:
        seats.release(row)
        seats.admit(row)
        assert seats.reserve(row, 30)
    answer(seats, [*others, spectator], 2)
    for row in (*others, spectator):
        assert row.tokens[-1] == int(alone(model, row.tokens[:-1])[-1].argmax())


@pytest.mark.parametrize("where", [1, 4, 9])
def test_ctrl_c_in_the_middle_of_a_step_leaves_nothing_held(
    model: Any, seats: Fibers, where: int
) -> None:
    """In a row's router, or in the event of all."""
    calls = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == where:
            signal.raise_signal(signal.SIGINT)

    director = model.understudy.runtime.director
    decide = director.decide
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_pre_hook(interrupt)
    director.decide = lambda event: interrupt() or decide(event)
    rows = [enter(seats, p) for p in PROMPTS[:3]]
    with pytest.raises(KeyboardInterrupt):
        answer(seats, rows, 3)
    integrity(model)
    assert all(row.state.lost for row in rows) and current_forward.get() is None


def test_a_read_that_fails_fails_the_step(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))
    weights = folder / "model.safetensors"
    with load(folder, "1GiB", slots=6, direct_io=False) as model:
        seats = Fibers(model, capacity=1000)
        rows = [enter(seats, p) for p in PROMPTS]
        answer(seats, rows, 1)
        os.truncate(weights, weights.stat().st_size // 2)
        with pytest.raises(ReadFailed):
            answer(seats, rows, 5)
        integrity(model)
        assert all(row.state.lost for row in rows)
        for row in rows:
            seats.release(row)
        assert seats.used == 0 and not seats._left, "a lost cache is no beginning"


def test_a_row_may_leave_in_the_middle_of_its_answer(model: Any, seats: Fibers) -> None:
    rows = [enter(seats, p) for p in PROMPTS[:3]]
    answer(seats, rows, 2)
    cache = weakref.ref(rows[1].state.cache)
    seats._most_kept = 0
    seats.release(rows[1])
    assert gone([cache])
    answer(seats, [rows[0], rows[2]], 2)
    assert rows[2].tokens[-1] == int(alone(model, rows[2].tokens[:-1])[-1].argmax())


def test_no_step_leaves_fibers_behind(seats: Fibers, fibers: list[weakref.ref[Any]]) -> None:
    rows = [enter(seats, p) for p in PROMPTS]
    answer(seats, rows, 3)
    assert len(fibers) == 2 * 3 * len(rows) and gone(fibers)
    assert seats.forward([]) == []
