"""The device that is not there: late copies, races told, recordings that run nothing."""

from __future__ import annotations

import gc
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pretend import MIB, NotRecordable, Pretend, Race
from torch.nn import functional as F

from understudy.experts.device import Device, DeviceFull, Event, PinningRefused

N = 1024


def counting(memory: torch.Tensor, start: int = 0) -> torch.Tensor:
    memory.copy_((torch.arange(memory.numel()) + start) % 251)
    return memory


def pair(device: Pretend) -> tuple[torch.Tensor, torch.Tensor]:
    """Device memory, and pinned memory with something to copy there."""
    return device.allocate(N), counting(device.pin(N))


@pytest.fixture(params=range(4))
def device(request: pytest.FixtureRequest) -> Pretend:
    return Pretend(seed=request.param)


def test_it_is_a_device() -> None:
    device: Device = Pretend()
    assert device.torch_device.type == "cpu"


# ---------------------------------------------------------------------------------------- memory


def test_memory_is_nan_until_something_was_copied() -> None:
    memory = Pretend().allocate(N)
    assert memory.view(torch.bfloat16).isnan().all() and memory.view(torch.float32).isnan().all()
    assert memory.data_ptr() % 256 == 0


def test_memory_comes_back_when_nobody_holds_it() -> None:
    device = Pretend(memory=4 * MIB)
    memory = device.allocate(3 * MIB)
    view = memory[: 2 * MIB]
    with pytest.raises(DeviceFull, match=r"1 MiB free, and 2 MiB .* smaller --device-memory"):
        device.allocate(2 * MIB)
    del memory
    assert device.free_bytes() == MIB and device.total_bytes() == 4 * MIB
    del view
    gc.collect()
    assert device.free_bytes() == 4 * MIB
    device.allocate(2 * MIB)


def test_it_can_be_full_before_it_says_so() -> None:
    device = Pretend(full_after=MIB)
    memory = device.allocate(MIB)
    with pytest.raises(DeviceFull):
        device.allocate(memory.numel())


def test_pinning_can_be_refused() -> None:
    device = Pretend(refuse_pinning_after=2 * N)
    memory = device.pin(N)
    assert memory.data_ptr() % 4096 == 0 and device.pinned_bytes == N
    with pytest.raises(PinningRefused):
        device.pin(N + 1)
    device.unpin(memory)
    device.unpin(memory)
    assert device.pinned_bytes == 0
    device.pin(2 * N)


# ------------------------------------------------------------------------------------ late copies


def test_a_copy_happens_when_the_compute_stream_waits_for_it(device: Pretend) -> None:
    to, source = pair(device)
    stream = device.stream()
    stream.copy(to, source)
    device.compute.wait(stream.record())
    device.reads(to)
    assert torch.equal(to, source)
    assert device.waits == 0 and device.copied_bytes == N


def test_a_copy_happens_when_the_host_waits_for_it(device: Pretend) -> None:
    to, source = pair(device)
    stream = device.stream()
    stream.copy(to, source)
    stream.record().synchronize()
    device.reads(to)
    assert torch.equal(to, source) and device.waits == 1


def test_an_event_is_done_in_the_end_and_stays_so() -> None:
    early = 0
    for seed in range(20):
        device = Pretend(seed=seed)
        to, source = pair(device)
        stream = device.stream()
        stream.copy(to, source)
        event = stream.record()
        asked = 1
        while not event.done():
            asked += 1
        assert asked < 10 and event.done() and torch.equal(to, source)
        device.reads(to)  # the host knows, and asks for this after it
        early += asked == 1
    assert 0 < early < 20


def test_a_copy_that_nobody_demands_is_mostly_late() -> None:
    late = 0
    for seed in range(20):
        device = Pretend(seed=seed)
        to, source = pair(device)
        device.stream().copy(to, source)
        assert device.fetch(to[:1]) in ([[255]], [[0]])  # not ordered before the compute stream
        late += device.queued() > 0
    assert 10 < late < 20


def test_waits_between_streams_order_copies(device: Pretend) -> None:
    to, source = pair(device)
    back = device.pin(N)
    there, home = device.stream(), device.stream(urgent=True)
    there.copy(to, source)
    home.wait(there.record())
    home.copy(back, to)
    home.record().synchronize()
    assert torch.equal(back, source)


def test_a_source_overwritten_early_is_told(device: Pretend) -> None:
    to, source = pair(device)
    stream = device.stream()
    stream.copy(to, source)
    event = stream.record()
    counting(source, 7)
    with pytest.raises(Race, match=r"pinned memory 1, .* overwritten by the host"):
        event.synchronize()


def test_an_ordinary_source_overwritten_early_is_copied_wrong() -> None:
    wrong = 0
    for seed in range(20):
        device = Pretend(seed=seed)
        to, source = device.allocate(N), counting(torch.empty(N, dtype=torch.uint8))
        stream, before = device.stream(), source.clone()
        stream.copy(to, source)
        event = stream.record()
        counting(source, 7)
        event.synchronize()
        wrong += not torch.equal(to, before)
    assert wrong > 10


def test_a_device_may_overwrite_what_it_copies_in_its_own_order(device: Pretend) -> None:
    to, source = pair(device)
    there, home = device.stream(), device.stream()
    for turn in range(4):
        there.copy(to[turn:], source[turn:])
        home.wait(there.record())
        home.copy(source[: N // 2], to[N // 2 :])
        there.wait(home.record())
    there.record().synchronize()
    assert source[0] == N // 2 % 251


def test_a_source_overwritten_after_the_fence_but_before_the_host_knows_is_told() -> None:
    device = Pretend()
    to, source = pair(device)
    stream = device.stream()
    stream.copy(to, source)
    event = stream.record()
    device.compute.wait(event)  # no wait of the host
    counting(source, 7)
    with pytest.raises(Race, match="overwritten"):
        device.fetch(to)


def test_a_source_may_change_once_the_host_knows(device: Pretend) -> None:
    to, source = pair(device)
    stream = device.stream()
    for start in range(5):
        counting(source, start)
        stream.copy(to, source)
        event = stream.record()
        event.synchronize()
        assert torch.equal(to, source)


def test_in_a_with_block_torch_finds_what_its_stream_waited_for(device: Pretend) -> None:
    to, source = pair(device)
    copies, other = device.stream(), device.stream()
    copies.copy(to, source)
    other.wait(copies.record())
    with other:
        assert device.compute is other
        device.reads(to)
        result = to + 1
    assert torch.equal(result, source + 1)
    with pytest.raises(Race):
        device.reads(to)  # the compute stream itself has waited for nothing


def test_timed_events_show_bandwidth() -> None:
    device = Pretend(bandwidth=1e6)
    to, source = pair(device)
    stream = device.stream()
    start = stream.record(timed=True)
    stream.copy(to, source)
    end = stream.record(timed=True)
    with pytest.raises(RuntimeError, match="not known to be done"):
        end.seconds_since(start)
    end.synchronize()
    assert end.seconds_since(start) == pytest.approx(N / 1e6, rel=0.01)


# ------------------------------------------------------------------------------------------ races


def test_reading_what_no_fence_brought_is_a_race(device: Pretend) -> None:
    to, source = pair(device)
    device.stream().copy(to[512:], source[512:])
    device.reads(to[:512])
    with pytest.raises(Race, match=r"device memory 1, bytes 512\.\.520.*test_pretend\.py:\d+"):
        device.reads(to[256:520])


def test_overwriting_what_compute_may_still_read_is_a_race(device: Pretend) -> None:
    to, source = pair(device)
    stream = device.stream()
    device.reads(to[:512])
    stream.copy(to[512:], source[512:])
    with pytest.raises(Race, match="not ordered after what the compute stream reads"):
        stream.copy(to[:512], source[:512])
    stream.wait(device.compute.record())
    stream.copy(to[:512], source[:512])


def test_an_event_recorded_before_the_reading_does_not_cover_it(device: Pretend) -> None:
    to, source = pair(device)
    stream = device.stream()
    event = device.compute.record()
    device.reads(to)
    stream.wait(event)
    with pytest.raises(Race):
        stream.copy(to, source)


@pytest.mark.parametrize("synchronise", ["event", "fetch", "done"])
def test_what_the_host_waited_for_orders_what_it_asks_next(
    device: Pretend, synchronise: str
) -> None:
    to, source = pair(device)
    stream = device.stream()
    device.reads(to)
    if synchronise == "event":
        device.compute.record().synchronize()
    elif synchronise == "fetch":
        device.fetch(torch.zeros(1))
    else:
        event = device.compute.record()
        while not event.done():
            pass
    stream.copy(to, source)


def test_two_streams_writing_the_same_are_a_race(device: Pretend) -> None:
    to, source = pair(device)
    one, other = device.stream(), device.stream()
    one.copy(to, source)
    with pytest.raises(Race):
        other.copy(to, source)


def test_copying_out_what_is_copied_in_is_a_race(device: Pretend) -> None:
    to, source = pair(device)
    one, other = device.stream(), device.stream()
    one.copy(to, source)
    with pytest.raises(Race):
        other.copy(device.pin(N), to)


def test_unpinning_under_a_copy_is_a_race(device: Pretend) -> None:
    to, source = pair(device)
    stream = device.stream()
    stream.copy(to, source)
    event = stream.record()
    with pytest.raises(Race, match="unpinned"):
        device.unpin(source)
    event.synchronize()
    device.unpin(source)


def test_a_ring_of_slots_with_all_its_fences_never_races(device: Pretend) -> None:
    """Fill, compute, fill again: the pattern of every user, many times over."""
    slots = device.allocate(3 * N).view(3, N)
    source = device.pin(8 * N).view(8, N)
    for expert in range(8):
        counting(source[expert], expert)
    stream = device.stream()
    read = [device.compute.record() for _ in range(3)]
    for turn in range(60):
        slot, expert = turn % 3, device.random.randrange(8)
        stream.wait(read[slot])
        stream.copy(slots[slot], source[expert])
        device.compute.wait(stream.record())
        device.reads(slots[slot])
        assert torch.equal(slots[slot], source[expert])
        read[slot] = device.compute.record()
    assert device.waits == 0


# ----------------------------------------------------------------------------------------- graphs


def step(x: torch.Tensor, w: torch.Tensor, cache: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Views, in-place operators, several results, composite operators, attention."""
    y = F.linear(x, w).softmax(-1)
    half, other = y.chunk(2, -1)
    values, ids = torch.topk(F.silu(half) * other, 3)
    cache.index_copy_(0, at, y.view(-1)[None, :8])
    at.add_(1)
    seen = F.scaled_dot_product_attention(cache[None], cache[None], cache[None])
    torch.add(values, 1.0, out=values)
    return values.sum() + ids.float().mean() + seen.expand(2, -1, -1).contiguous().sum()


@pytest.mark.parametrize("inference", [False, True])
def test_a_recording_runs_nothing_and_its_repetition_everything(inference: bool) -> None:
    torch.manual_seed(0)
    with torch.inference_mode(inference):
        x, w = torch.randn(4, 16), torch.randn(8, 16)
        cache, at = torch.zeros(6, 8), torch.zeros(1, dtype=torch.long)
        cache_too, at_too = cache.clone(), at.clone()
        graph = Pretend().graph()
        graph.begin()
        out = step(x, w, cache, at)
        graph.end()
        assert out.isnan() and at == 0 and not cache.any()
        address = out.data_ptr()
        for turn in range(4):
            x.fill_(turn / 3)
            graph.replay()
            assert torch.equal(out, step(x, w, cache_too, at_too))
            assert torch.equal(cache, cache_too) and at == turn + 1
        assert out.data_ptr() == address


def test_kernels_are_recorded_and_repeated() -> None:
    def double(grid: tuple[int, ...], x: torch.Tensor, by: int = 2) -> None:
        assert grid == (1,)
        x.mul_(by)

    device = Pretend()
    x = torch.ones(3)
    device.launch(double, [1], x)
    graph = device.graph()
    graph.begin()
    y = x + 1
    device.launch(double, [1], y, by=3)
    z = y - 1
    graph.end()
    assert device.launches == 1 and y.isnan().all()
    for _ in range(2):
        graph.replay()
        assert y.tolist() == [9] * 3 and z.tolist() == [8] * 3
    assert device.launches == 3


x = torch.arange(6.0)


@pytest.mark.parametrize(
    "refused",
    [
        lambda device: x.sum().item(),
        lambda device: x.tolist(),
        lambda device: x.cpu(),
        lambda device: bool((x > 0).any()),
        lambda device: torch.equal(x, x),
        lambda device: x.nonzero(),
        lambda device: x[x > 1],
        lambda device: torch.zeros(6).index_put_((x > 1,), x[2:]),
        lambda device: torch.rand(2),
        lambda device: F.dropout(x, 0.5),
        lambda device: torch.tensor([1, 2]),
        lambda device: torch.tensor(2.0, device=device.torch_device),
        lambda device: device.fetch(x),
        lambda device: device.allocate(N),
        lambda device: device.pin(N),
        lambda device: device.graph().begin(),
        lambda device: device.compute.record().synchronize(),
    ],
)
def test_what_a_capture_refuses(refused: Callable[[Pretend], Any]) -> None:
    device = Pretend()
    graph = device.graph()
    graph.begin()
    with pytest.raises(NotRecordable, match=r"while a graph is recorded \(at test_pretend"):
        refused(device)
    with pytest.raises(NotRecordable, match="invalid"):
        graph.end()
    assert torch.rand(2).tolist()  # nothing is left of it
    with pytest.raises(NotRecordable, match="before it was recorded"):
        graph.replay()


def test_a_recording_may_fill_a_place_with_one_number() -> None:
    graph = Pretend().graph()
    y = torch.zeros(6)
    graph.begin()
    y[x > 3] = torch.tensor(2.0)
    graph.end()
    graph.replay()
    assert y.tolist() == [0, 0, 0, 0, 2, 2]


def test_a_recording_forks_and_joins(device: Pretend) -> None:
    to, source = pair(device)
    side = device.stream()
    graph = device.graph()
    graph.begin()
    side.wait(device.compute.record())
    side.copy(to, source)
    with side:
        seen = to + 1
    device.compute.wait(side.record())
    device.reads(to)
    both = to + seen
    graph.end()
    for start in range(3):
        device.fetch(both)
        counting(source, start)
        graph.replay()
        assert torch.equal(both, source + source + 1)
    with pytest.raises(Race):
        device.stream().copy(to, source)


def test_a_repetition_meets_the_same_fences(device: Pretend) -> None:
    """A copy that no fence orders against what a graph reads."""
    to, source = pair(device)
    graph = device.graph()
    graph.begin()
    device.reads(to)
    out = to + 1
    graph.end()
    stream = device.stream()
    stream.copy(to, source)
    with pytest.raises(Race, match="the compute stream reads"):
        graph.replay()
    device.compute.wait(stream.record())
    graph.replay()
    assert torch.equal(out, source + 1)
    with pytest.raises(Race):
        stream.copy(to, source)
    stream.wait(device.compute.record())
    stream.copy(to, source)


def test_a_fork_that_is_not_joined_is_refused(device: Pretend) -> None:
    to, source = pair(device)
    side = device.stream()
    graph = device.graph()
    graph.begin()
    side.wait(device.compute.record())
    side.copy(to, source)
    with pytest.raises(NotRecordable, match="not joined"):
        graph.end()
    side.copy(to, source)  # an ordinary stream again
    side.record().synchronize()


def test_a_recording_does_not_wait_for_work_outside(device: Pretend) -> None:
    to, source = pair(device)
    side = device.stream()
    side.copy(to, source)
    outside = side.record()
    graph = device.graph()
    graph.begin()
    inside = device.compute.record()
    with pytest.raises(NotRecordable, match="outside"):
        device.compute.wait(outside)
    with pytest.raises(NotRecordable):
        graph.end()
    with pytest.raises(NotRecordable, match="nothing after its end"):
        side.wait(inside)


def test_torch_on_a_stream_outside_the_recording_is_refused(device: Pretend) -> None:
    graph = device.graph()
    graph.begin()
    with device.stream(), pytest.raises(NotRecordable, match="waits for no event"):
        torch.zeros(1)
    with pytest.raises(NotRecordable):
        graph.end()


def test_copies_of_others_go_on_beside_a_recording(device: Pretend) -> None:
    to, source = pair(device)
    side = device.stream()
    graph = device.graph()
    graph.begin()
    side.copy(to, source)
    y = torch.zeros(2) + 1
    event = side.record()
    graph.end()
    event.synchronize()
    assert torch.equal(to, source)
    graph.replay()
    assert y.tolist() == [1, 1]


def test_a_graph_notices_that_its_memory_was_freed() -> None:
    device = Pretend()
    graph, y = device.graph(), torch.ones(4)
    graph.begin()
    out = y[1:] * 2
    graph.end()
    graph.replay()
    assert out.tolist() == [2, 2, 2]
    del y
    with pytest.raises(Race, match=r"freed: torch\.float32 \(3,\) used at test_pretend"):
        graph.replay()


def test_a_second_graph_may_share_and_use_the_first() -> None:
    device = Pretend()
    x = torch.ones(2)
    first = device.graph()
    with pytest.raises(NotRecordable):
        device.graph(first)
    first.begin()
    y = x * 2
    first.end()
    second = device.graph(first)
    second.begin()
    z = y * 2
    second.end()
    first.replay()
    second.replay()
    assert z.tolist() == [4, 4]


def test_threads_that_hand_work_over_under_a_lock(device: Pretend) -> None:
    """One asks for copies, one computes: what a transfer queue with a thread of its own does."""
    slots, source = device.allocate(4 * N).view(4, N), device.pin(4 * N).view(4, N)
    for expert in range(4):
        counting(source[expert], expert)
    stream = device.stream()
    asked: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    used: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def copies() -> None:
        for turn in range(40):
            if turn >= 4:
                stream.wait(used.get(timeout=10))
            stream.copy(slots[turn % 4], source[turn * 3 % 4])
            asked.put((turn, stream.record()))

    thread = threading.Thread(target=copies)
    thread.start()
    for _ in range(40):
        turn, event = asked.get(timeout=10)
        device.compute.wait(event)
        device.reads(slots[turn % 4])
        assert torch.equal(slots[turn % 4], source[turn * 3 % 4])
        used.put(device.compute.record())
    thread.join()
