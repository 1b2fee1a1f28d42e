"""The kernels by which a device runs its own cache of experts: look up, choose victims, fetch.

Knows: tables of numbers, addresses, bytes. Does not know: streams and their fences, models, what an
expert computes, or who launches this (`driven` does).

One event is one (step, layer). Everything it needs is looked up before anything is evicted, and
nobody whom it needs is a victim. Each layer has a pool of slots of its own: with one pool for all,
the least recently used order cycles whenever the slots are fewer than one token's sweep.

    table   int32 [L, E]   expert -> its slot, or NOWHERE
    owner   int32 [S]      slot -> layer * E + expert, or NOBODY (free, or on its way)
    stamp   int64 [S]      time of last use; 0: never
    guard   int64 [S]      time at which a guess was found here and must not be a victim
    fresh   int32 [S]      1: brought by a guess and not used since
    pool    int32 [L, P]   the slots of each layer, the first ``size[layer]`` of them
    clock   int64 [1]      later than every stamp; a device that repeats one graph for every token
                           cannot be told the time
    a copy list            sources int64, targets int32, names int32 [64 each], length int32 [1]

What a call costs. `decide`, `guess` and `commit` are one program of one warp: a launch, a chain of
about seven dependent accesses to small tables that lie in the cache, N * N / 32 comparisons per
lane for N pairs (N = k for one token), and for each miss one minimum over the pool: P / 32 steps
per lane and two exchanges in each of five rounds. That is microseconds, while one missed expert
takes tens to hundreds over the link; nothing here looks at the slots of other layers. One warp is
also what makes it correct: no other warp can run ahead and overwrite what this one has yet to read.

Loops are ``while``: a bound that comes from memory cannot be a ``range`` in Triton's interpreter.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (a kernel's arguments are pointers and numbers of the device)

from __future__ import annotations

import triton
import triton.language as tl

NOBODY = tl.constexpr(-1)
NOWHERE = tl.constexpr(-1)
NEVER = tl.constexpr((1 << 63) - 1)

# Places in the array of counters; their meaning is that of `core.Counters`.
EVENTS = tl.constexpr(0)
HITS = tl.constexpr(1)
MISSES = tl.constexpr(2)
EVICTIONS = tl.constexpr(3)
DEMAND_BYTES = tl.constexpr(4)
ISSUED = tl.constexpr(5)
ISSUED_BYTES = tl.constexpr(6)
USED = tl.constexpr(7)
WASTED = tl.constexpr(8)
WASTED_BYTES = tl.constexpr(9)
VIOLATIONS = tl.constexpr(10)
COUNTERS = tl.constexpr(16)  # a power of two


@triton.jit(do_not_specialize=["layer", "pairs"])
def decide(
    ids,
    slots,
    layer,
    pairs,
    table,
    owner,
    stamp,
    fresh,
    pool,
    size,
    clock,
    addresses,
    sources,
    targets,
    length,
    counters,
    nbytes,
    EXPERTS: tl.constexpr,
    POOL: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """One event: ``ids`` [pairs] in, ``slots`` [pairs] and the copy list out. Whoever is missing
    owns a slot from here on; the bytes come with `gather`. ``nbytes``: of one expert."""
    now = tl.load(clock)
    i = tl.arange(0, PAIRS)
    expert = tl.load(ids + i, mask=i < pairs, other=NOBODY).to(tl.int32)
    wanted = expert >= 0
    # Several tokens may want one expert: the last of these pairs speaks for it.
    again = (expert[:, None] == expert[None, :]) & (i[:, None] < i[None, :])
    distinct = wanted & (tl.sum(again.to(tl.int32), axis=1) == 0)
    name = layer * EXPERTS + expert
    found = tl.load(table + name, mask=distinct, other=NOWHERE)
    hit = distinct & (found >= 0)
    miss = distinct & (found < 0)

    used = tl.load(fresh + found, mask=hit, other=0)
    tl.store(fresh + found, 0, mask=hit)
    tl.store(stamp + found, now + i, mask=hit)
    # Hits are the youngest now. The pool holds all that the event needs, so no hit has to leave.
    tl.debug_barrier()

    place = tl.arange(0, POOL)
    here = place < tl.load(size + layer)
    held = tl.load(pool + layer * POOL + place, mask=here, other=0)
    age = tl.load(stamp + held, mask=here, other=0)
    order = tl.cumsum(miss.to(tl.int32), axis=0) - 1
    missing = tl.sum(miss.to(tl.int32), axis=0)
    victim = _oldest(age, here, miss, order, missing, POOL)
    slot = tl.load(pool + layer * POOL + victim, mask=miss, other=0)

    gone = tl.load(owner + slot, mask=miss, other=NOBODY)
    lost = tl.load(fresh + slot, mask=miss, other=0)
    tl.store(table + gone, NOWHERE, mask=miss & (gone >= 0))
    tl.store(table + name, slot, mask=miss)
    tl.store(owner + slot, name, mask=miss)
    tl.store(fresh + slot, 0, mask=miss)
    tl.store(stamp + slot, now + i, mask=miss)
    tl.store(clock, now + pairs)
    tl.store(sources + order, tl.load(addresses + name, mask=miss, other=0), mask=miss)
    tl.store(targets + order, slot, mask=miss)
    tl.store(length, missing)
    tl.debug_barrier()  # every pair finds its expert now
    tl.store(slots + i, tl.load(table + name, mask=wanted, other=NOWHERE), mask=i < pairs)

    c = tl.arange(0, COUNTERS)
    wasted = tl.sum(lost, axis=0)
    more = tl.where(c == EVENTS, 1, 0)
    more += tl.where(c == HITS, tl.sum(hit.to(tl.int32), axis=0), 0)
    more += tl.where(c == MISSES, missing, 0)
    more += tl.where(c == EVICTIONS, tl.sum((gone >= 0).to(tl.int32), axis=0), 0)
    more += tl.where(c == USED, tl.sum(used, axis=0), 0)
    more += tl.where(c == WASTED, wasted, 0)
    more = more.to(tl.int64)
    more += tl.where(c == DEMAND_BYTES, missing.to(tl.int64) * nbytes, 0)
    more += tl.where(c == WASTED_BYTES, wasted.to(tl.int64) * nbytes, 0)
    tl.atomic_add(counters + c, more, mask=more != 0, sem="relaxed")


@triton.jit
def _oldest(age, may, wants, order, wanted, POOL: tl.constexpr):
    """For each pair that ``wants``, a place in the pool that ``may`` leave: for number ``order`` of
    ``wanted`` of them, the one that ranks ``order`` by age. No two ages with places are alike."""
    place = tl.arange(0, POOL)
    keys = tl.where(may, age * POOL + place, NEVER)
    chosen = tl.zeros_like(order)
    turn = 0
    while turn < wanted:
        oldest = tl.min(keys, axis=0)
        chosen = tl.where(wants & (order == turn), (oldest % POOL).to(tl.int32), chosen)
        keys = tl.where(keys == oldest, NEVER, keys)
        turn += 1
    return chosen


@triton.jit(do_not_specialize=["lines", "slot_lines"])
def gather(sources, targets, length, arena, lines, slot_lines, LINES: tl.constexpr):
    """The experts of a copy list, from host memory into their slots, by as many programs as there
    are. ``arena``: int32. A line is 16 bytes, what one lane loads at once; ``lines`` of a slab,
    ``slot_lines`` from slot to slot, LINES that a program has under way.

    The addresses are those of pinned memory, which the device can read like its own. Loads stay out
    of the first cache, since nobody reads these bytes twice; stores stay in the second, since the
    expert kernel comes next.
    """
    pieces = tl.cdiv(lines, LINES)
    pieces_in_all = tl.load(length) * pieces
    word = tl.arange(0, LINES * 4)
    piece = tl.program_id(0)
    while piece < pieces_in_all:
        which = piece // pieces
        at = (piece % pieces) * (LINES * 4) + word
        inside = at < lines * 4
        address = tl.load(sources + which).to(tl.pointer_type(tl.int32))
        source = tl.multiple_of(address, 16)
        target = arena + tl.load(targets + which).to(tl.int64) * slot_lines * 4
        bits = tl.load(source + at, mask=inside, cache_modifier=".cg")
        tl.store(target + at, bits, mask=inside)
        piece += tl.num_programs(0)


@triton.jit(do_not_specialize=["layer", "tokens", "k", "most"])
def guess(
    ids,
    layer,
    tokens,
    k,
    most,
    table,
    owner,
    stamp,
    guard,
    fresh,
    pool,
    size,
    clock,
    addresses,
    sources,
    targets,
    names,
    length,
    counters,
    nbytes,
    EXPERTS: tl.constexpr,
    POOL: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Up to ``most`` of the experts that ``ids`` [tokens, k] foresee for ``layer``, best ranks
    first, get a place in the copy list and the slots of the oldest that nobody foresees. Whoever
    leaves is gone at once; who comes is found only after `commit`.

    The slot keeps its age. A wrong guess is then the first to leave, and guesses that go on being
    wrong displace each other and not what is used.
    """
    now = tl.load(clock)
    i = tl.arange(0, PAIRS)
    pairs = tokens * k
    expert = tl.load(ids + (i % tokens) * k + i // tokens, mask=i < pairs, other=NOBODY)
    expert = expert.to(tl.int32)
    before = (expert[:, None] == expert[None, :]) & (i[:, None] > i[None, :])
    distinct = (expert >= 0) & (tl.sum(before.to(tl.int32), axis=1) == 0)
    name = layer * EXPERTS + expert
    found = tl.load(table + name, mask=distinct, other=NOWHERE)
    miss = distinct & (found < 0)
    tl.store(guard + found, now, mask=found >= 0)
    tl.debug_barrier()

    place = tl.arange(0, POOL)
    here = place < tl.load(size + layer)
    held = tl.load(pool + layer * POOL + place, mask=here, other=0)
    may = here & (tl.load(guard + held, mask=here, other=0) < now)
    order = tl.cumsum(miss.to(tl.int32), axis=0) - 1
    count = tl.minimum(tl.sum(miss.to(tl.int32), axis=0), tl.sum(may.to(tl.int32), axis=0))
    count = tl.minimum(count, most)
    comes = miss & (order < count)
    age = tl.load(stamp + held, mask=here, other=0)
    victim = _oldest(age, may, comes, order, count, POOL)
    slot = tl.load(pool + layer * POOL + victim, mask=comes, other=0)

    gone = tl.load(owner + slot, mask=comes, other=NOBODY)
    lost = tl.load(fresh + slot, mask=comes, other=0)
    tl.store(table + gone, NOWHERE, mask=comes & (gone >= 0))
    tl.store(owner + slot, NOBODY, mask=comes)
    tl.store(fresh + slot, 0, mask=comes)
    tl.store(sources + order, tl.load(addresses + name, mask=comes, other=0), mask=comes)
    tl.store(targets + order, slot, mask=comes)
    tl.store(names + order, name, mask=comes)
    tl.store(length, count)

    c = tl.arange(0, COUNTERS)
    wasted = tl.sum(lost, axis=0)
    more = tl.where(c == ISSUED, count, 0)
    more += tl.where(c == EVICTIONS, tl.sum((gone >= 0).to(tl.int32), axis=0), 0)
    more += tl.where(c == WASTED, wasted, 0)
    more = more.to(tl.int64)
    more += tl.where(c == ISSUED_BYTES, count.to(tl.int64) * nbytes, 0)
    more += tl.where(c == WASTED_BYTES, wasted.to(tl.int64) * nbytes, 0)
    tl.atomic_add(counters + c, more, mask=more != 0, sem="relaxed")


@triton.jit
def commit(targets, names, length, table, owner, fresh, LIST: tl.constexpr):
    """Their bytes have arrived: the experts of a guess can be found from here on."""
    i = tl.arange(0, LIST)
    came = i < tl.load(length)
    slot = tl.load(targets + i, mask=came, other=0)
    name = tl.load(names + i, mask=came, other=0)
    tl.store(owner + slot, name, mask=came)
    tl.store(fresh + slot, 1, mask=came)
    tl.store(table + name, slot, mask=came)


@triton.jit(do_not_specialize=["layer", "pairs"])
def verify(ids, slots, layer, pairs, owner, counters, EXPERTS: tl.constexpr, PAIRS: tl.constexpr):
    """Count the pairs whose slot does not belong to the expert asked for."""
    i = tl.arange(0, PAIRS)
    expert = tl.load(ids + i, mask=i < pairs, other=NOBODY).to(tl.int32)
    slot = tl.load(slots + i, mask=i < pairs, other=NOWHERE)
    belongs_to = tl.load(owner + slot, mask=slot >= 0, other=NOBODY)
    asked_for = tl.where(expert >= 0, layer * EXPERTS + expert, NOBODY)
    wrong = tl.sum((belongs_to != asked_for).to(tl.int64), axis=0)
    tl.atomic_add(counters + VIOLATIONS, wrong, sem="relaxed")
