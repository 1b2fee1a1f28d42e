"""A budget becomes a plan: so many slots, so much context, so many tokens per second expected.

Knows: how people write memory sizes, what this machine has free, how fast it reads, and how a
budget is divided. Every number in a `Plan` is bytes that the budget pays for.
Does not know: models, checkpoints, slots. It is given sizes and answers with sizes.
"""

from __future__ import annotations

import mmap
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from math import gcd
from pathlib import Path

from understudy.core import BudgetTooSmall, UnderstudyError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

MINIMUM_SLOTS = 2  # one expert is computed while the next one arrives

# What `auto` leaves to others: the interpreter, torch and transformers take about this much that
# is not in the budget, and a machine filled to the brim starts to swap.
RESERVE_BYTES = 700 * MIB
RESERVE_SHARE = 0.1

# What a decoder layer costs in PyTorch's eager mode whatever its size (0.4-1.0 ms measured on two
# x86 cores). Without it, the expectation for a small model would be a hundred times too high.
FRAME_SECONDS_PER_LAYER = 0.8e-3

# Of a step that tells the logprobs of prompts, which need logits at every position: no more than
# so many bytes, and no more than this share of the budget.
LOGITS_BYTES = 32 * MIB
LOGITS_SHARE = 1 / 16

# ------------------------------------------------------------------------------ sizes, as written

# A bare K, M, G, T is binary, as in `docker --memory 8G`; KB, MB, GB, TB are what disk makers mean.
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[a-z]*|%)", re.IGNORECASE)


def parse_memory(
    text: str | int, checkpoint_bytes: int, free: Callable[[], int] | None = None
) -> int:
    """``8GiB``, ``1.5GB``, ``50%`` (of the checkpoint), ``auto`` or a number, as bytes."""
    if isinstance(text, int):
        amount = text
    elif text.strip().lower() == "auto":
        return automatic_budget((free or free_memory)())
    else:
        amount = _parse_size(text.strip(), checkpoint_bytes)
    if amount <= 0:
        raise UnderstudyError(f"memory {text!r} is not more than nothing; try 8GiB, 50% or auto")
    return amount


def _parse_size(text: str, whole: int) -> int:
    match = _SIZE.fullmatch(text)
    unit = match["unit"].lower() if match else "?"
    if match is None or (unit != "%" and unit not in _UNITS):
        raise UnderstudyError(
            f"cannot read {text!r} as an amount of memory; write 8GiB, 512MiB, 1.5GB, 50% or auto"
        )
    scale = Fraction(whole, 100) if unit == "%" else _UNITS[unit]
    return int(Fraction(match["number"]) * scale)  # exact: no byte is lost to rounding


def automatic_budget(free: int) -> int:
    """What `auto` takes of ``free`` bytes: all but the reserve."""
    return max(0, free - max(RESERVE_BYTES, int(free * RESERVE_SHARE)))


def typed_size(nbytes: int) -> str:
    """``nbytes`` as `parse_memory` reads it: never less than ``nbytes``, at most 1 MiB more."""
    whole = -(-nbytes // MIB)
    return f"{whole // 1024}GiB" if whole and whole % 1024 == 0 else f"{whole}MiB"


def shown_size(nbytes: float) -> str:
    """``nbytes`` for reading: three digits, binary units."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if nbytes >= size:
            value = nbytes / size
            return f"{value:.{0 if value >= 99.95 or value == int(value) else 1}f} {unit}"
    return f"{int(nbytes)} bytes"


# -------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True, slots=True)
class Plan:
    """How a budget of ``total`` bytes is spent.

    ``slots`` of ``experts`` experts (of the whole model) are resident at a time. A slot is a little
    larger than the ``expert_bytes`` in it, because direct reads come in whole pages.
    """

    total: int
    dense: int
    kv: int
    staging: int
    activations: int
    predictors: int
    slot_bytes: int
    slots: int
    experts: int
    context: int
    expert_bytes: int
    tokens_per_second: float | None = None  # expected, None: nobody has measured the disk
    format_in_words: str = ""  # what the experts are in, where a person should be told
    kv_tokens: int = 0  # that the KV cache holds, of all sequences together
    kv_row_tokens: int = 0  # tokens' worth of it that a sequence takes whatever its length
    scored_positions: int = 1  # tokens of prompts whose logprobs one step of many may tell

    @property
    def used(self) -> int:
        """Bytes the plan really takes; less than ``total`` where everything fits."""
        fixed = self.dense + self.kv + self.staging + self.activations + self.predictors
        return fixed + self.slots * self.slot_bytes

    def expecting(self, tokens_per_second: float) -> Plan:
        """The same plan with an expectation written on it."""
        return replace(self, tokens_per_second=tokens_per_second)

    def with_slots(self, slots: int) -> Plan:
        """The same plan with another number of slots."""
        return replace(self, slots=slots)

    def line(self) -> str:
        """The plan in one line, for the person who waits."""
        share = 100 * self.slots / max(1, self.experts)
        parts = [
            f"plan: {self.slots} of {self.experts} experts resident ({share:.0f} %)",
            f"dense {shown_size(self.dense)}",
            f"KV {shown_size(self.kv)} for {self._tokens_in_words()}",
            f"{shown_size(self.used)} of {shown_size(self.total)} used",
        ]
        if self.format_in_words:
            parts.insert(1, self.format_in_words)
        if self.tokens_per_second is not None:
            parts.append(f"expected about {_rounded(self.tokens_per_second)} tokens/s")
        return ", ".join(parts)

    def _tokens_in_words(self) -> str:
        if self.kv_tokens <= self.context:
            return f"{self.context} tokens"
        return f"{self.kv_tokens} tokens, {self.context} at most in one answer"

    def as_dict(self) -> dict[str, int | float | str | None]:
        return {**asdict(self), "used": self.used}


def _rounded(rate: float) -> str:
    """An expectation deserves two digits, not five."""
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def fit(
    total: int,
    *,
    dense: int,
    kv: int,
    activations: int,
    slot_bytes: int,
    experts: int,
    context: int,
    expert_bytes: int = 0,
    staging: int = 0,
    predictors: int = 0,
    slots: int | None = None,
    name: str = "this model",
    option: str = "--memory",
    format_in_words: str = "",
) -> Plan:
    """Divide ``total``: what must be resident first, all that is left becomes slots.

    ``slots`` asks for that many instead of as many as fit (a benchmark compares equal caches).
    Raises `BudgetTooSmall` with the smallest amount that works.
    """
    fixed = dense + kv + activations + staging + predictors
    fewest = min(MINIMUM_SLOTS, experts) if slots is None else max(1, min(slots, experts))
    smallest = fixed + fewest * slot_bytes
    if total < smallest:
        holds = f"dense {shown_size(dense)}, KV {shown_size(kv)} for {context} tokens"
        raise BudgetTooSmall(
            f"{option[2:].replace('-', ' ')} {_as_given(total)} is too small for {name}: "
            f"{typed_size(smallest)} is the "
            f"smallest that works ({holds}, buffers {shown_size(fixed - dense - kv)}, "
            f"{_experts_in_words(fewest)} {shown_size(fewest * slot_bytes)}); "
            f"try {option} {typed_size(smallest)} or a smaller --max-context",
            smallest,
        )
    room = (total - fixed) // slot_bytes if slots is None else fewest
    return Plan(
        total=total,
        dense=dense,
        kv=kv,
        staging=staging,
        activations=activations,
        predictors=predictors,
        slot_bytes=slot_bytes,
        slots=min(room, experts),
        experts=experts,
        context=context,
        expert_bytes=expert_bytes or slot_bytes,
        format_in_words=format_in_words,
    )


def kv_budget(asked: str | int, one: int, sequences: int, left: int, checkpoint_bytes: int) -> int:
    """Bytes of the KV cache that ``sequences`` share, of which one takes ``one`` at its longest.

    ``auto``: enough for all of them at their longest, but no more than a quarter of what is
    ``left`` of the budget after dense weights and working memory, and enough for one in any case.
    Whoever finds no room waits; experts that find none are read again and again.
    """
    if asked == "auto":
        return min(one * sequences, max(one, left // 4))
    kv = parse_memory(asked, checkpoint_bytes)
    if kv < one:
        raise BudgetTooSmall(
            f"--kv-memory {asked} is less than one sequence takes at its longest; try "
            f"--kv-memory {typed_size(one)} or a smaller --max-context",
            one,
        )
    return kv


def scored_positions(total: int, vocabulary: int, sequences: int) -> int:
    """Positions of prompts whose logits one step may have, in a budget of ``total``: as many as
    ``sequences`` need for their next tokens anyway, and more where there is room."""
    if not vocabulary:
        return 1
    room = min(LOGITS_BYTES, int(LOGITS_SHARE * total) // 3)  # see `anatomy.activations`
    return max(sequences, room // (4 * vocabulary))


def _as_given(total: int) -> str:
    """The refused amount; rounded down, so that it never reads like the amount that works."""
    return f"{total // MIB}MiB" if total >= MIB else f"{total} bytes"


def _experts_in_words(count: int) -> str:
    return {1: "one expert", 2: "two experts"}.get(count, f"{count} experts")


def recommended_bytes(fixed: int, slot_bytes: int, experts: int, layers: int, top_k: int) -> int:
    """The smallest budget at which caching works well rather than merely works.

    Two tokens' experts must fit: below one token's sweep a global LRU cycles, and prefetch needs
    room for the next token beside this one. And half of the experts, where routing of trained
    models usually leaves under a fifth of the lookups to the disk.
    """
    return fixed + slot_bytes * min(experts, max(2 * layers * top_k, experts // 2))


def expected_tokens_per_second(
    plan: Plan, layers: int, top_k: int, bandwidth: float, memory_bandwidth: float = 0.0
) -> float:
    """One decode step, priced before it was ever run.

    ``layers`` MoE layers ask for ``top_k`` experts each. As if routing were uniform, a share of
    1 - slots/experts of them comes over the link at ``bandwidth`` bytes/s; all of them and the
    dense weights are read from memory once. The two overlap, so the larger one counts, and each
    layer adds its frame. Trained routing repeats itself and usually does better; short prompts
    and cold caches do worse.
    """
    touched = layers * top_k * plan.expert_bytes
    missing = touched * (1 - plan.slots / max(1, plan.experts))
    link = missing / bandwidth if bandwidth > 0 else 0.0
    memory = (plan.dense + touched) / memory_bandwidth if memory_bandwidth > 0 else 0.0
    return 1.0 / (max(link, memory) + layers * FRAME_SECONDS_PER_LAYER)


# ----------------------------------------------------------------------------- what memory is free


def _read_text(path: str) -> str | None:
    with suppress(OSError):
        return Path(path).read_text(encoding="ascii", errors="replace")
    return None


def free_memory(read: Callable[[str], str | None] = _read_text) -> int:
    """Bytes this process could still take: the machine's, or its cgroup's where that is less."""
    rooms = [_machine_free(read), *(most - used for most, used in _cgroups(read))]
    return max(0, min(rooms))


def total_memory(read: Callable[[str], str | None] = _read_text) -> int:
    """Bytes of memory that this machine has, whoever uses it."""
    fields = _fields(read("/proc/meminfo"))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return fields["MemTotal:"] * KIB if "MemTotal:" in fields else pages


def memory_limit(read: Callable[[str], str | None] = _read_text) -> int | None:
    """The smallest limit that a cgroup sets this process; None where the machine is the limit."""
    least = min((most for most, _ in _cgroups(read)), default=None)
    return least if least is not None and least < total_memory(read) else None


def _machine_free(read: Callable[[str], str | None]) -> int:
    fields = _fields(read("/proc/meminfo"))
    if "MemAvailable:" in fields:
        return fields["MemAvailable:"] * KIB
    # Not Linux: nobody says what is free, so take half of what there is.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _cgroups(read: Callable[[str], str | None]) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that nobody gives back) of this process's memory cgroup and of each one
    above it that has a limit."""
    for line in (read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, usage = "/sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount = "/sys/fs/cgroup/memory"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        for folder in _upwards(mount, path):
            most, now = _number(read(f"{folder}/{limit}")), _number(read(f"{folder}/{usage}"))
            if most is not None and now is not None:
                yield most, now - _page_cache(read(f"{folder}/memory.stat"))


def _upwards(mount: str, path: str) -> Iterator[str]:
    """The cgroup's folder, then its parents up to the mount.

    In a container the path may be the host's and not exist here; its own limit then stands at the
    mount, which is always tried last.
    """
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for length in range(len(parts), 0, -1):
        yield "/".join([mount, *parts[:length]])
    yield mount


def _page_cache(stat: str | None) -> int:
    """Bytes charged to a cgroup that the kernel gives back on demand."""
    fields = _fields(stat)
    if "total_inactive_file" in fields:  # v1 counts the groups below apart from the group itself
        return fields["total_inactive_file"] + fields.get("total_active_file", 0)
    return fields.get("inactive_file", 0) + fields.get("active_file", 0)


def _fields(text: str | None) -> dict[str, int]:
    """``name number [unit]`` lines, as /proc/meminfo and memory.stat have them."""
    rows = (line.split() for line in (text or "").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}


def _number(text: str | None) -> int | None:
    """A limit in bytes; None for ``max`` and for what cannot be read."""
    return int(text) if text is not None and text.strip().isdigit() else None


# ------------------------------------------------------------------------- how fast this machine is

PAGE = mmap.PAGESIZE
_DIRECT = getattr(os, "O_DIRECT", 0)  # absent outside Linux


def direct_io_works(path: str | os.PathLike[str]) -> bool:
    """Whether this file can be read past the page cache (tmpfs and some network disks refuse)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | _DIRECT)
    except OSError:
        return False
    try:
        with closing(mmap.mmap(-1, PAGE)) as page:
            os.preadv(descriptor, [page], 0)
        return bool(_DIRECT)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def disk_bandwidth(
    path: str | os.PathLike[str],
    threads: int = 4,
    block_bytes: int = 4 * MIB,
    total_bytes: int = 256 * MIB,
    direct: bool = True,
) -> float | None:
    """Bytes per second at which ``threads`` threads read blocks spread over an existing file.

    None where it cannot be measured: no such file, smaller than a block, direct reads refused.
    Buffered reads first ask the kernel to forget the file, so that they meet the disk.
    """
    block_bytes = max(PAGE, block_bytes // PAGE * PAGE)
    try:
        descriptor = os.open(path, os.O_RDONLY | (_DIRECT if direct else 0))
    except OSError:
        return None
    try:
        offsets = _spread(os.fstat(descriptor).st_size // block_bytes, total_bytes // block_bytes)
        if not offsets or (direct and not _DIRECT):
            return None
        if not direct:
            _forget(descriptor)
        starts = [offset * block_bytes for offset in offsets]
        seconds = _timed_reads(descriptor, starts, threads, block_bytes)
        return len(starts) * block_bytes / seconds
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _forget(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _spread(blocks: int, wanted: int) -> list[int]:
    """``wanted`` block numbers in leaps over a file of ``blocks``, each once where they suffice."""
    if blocks <= 0:
        return []
    leap = max(1, round(blocks * 0.618))
    while blocks > 1 and gcd(leap, blocks) != 1:
        leap += 1  # a leap without common divisor visits every block before any one twice
    return [(i * leap) % blocks for i in range(max(1, wanted))]


def _timed_reads(descriptor: int, offsets: list[int], threads: int, block_bytes: int) -> float:
    """Seconds that ``threads`` threads take for one read at each offset, first to last."""
    waiting = iter(offsets)
    turn, start = threading.Lock(), threading.Barrier(threads + 1)
    failures: list[OSError] = []

    def read_blocks() -> None:
        with closing(mmap.mmap(-1, block_bytes)) as block:
            block.write(bytes(block_bytes))  # touched now: page faults are not the disk's fault
            start.wait()
            while not failures:
                with turn:
                    offset = next(waiting, None)
                if offset is None:
                    return
                try:
                    os.preadv(descriptor, [block], offset)
                except OSError as error:
                    failures.append(error)

    crew = [threading.Thread(target=read_blocks, daemon=True) for _ in range(threads)]
    for reader in crew:
        reader.start()
    start.wait()
    began = time.perf_counter()
    for reader in crew:
        reader.join()
    if failures:
        raise failures[0]
    return time.perf_counter() - began


def memory_bandwidth(nbytes: int = 128 * MIB, repeats: int = 3) -> float:
    """Bytes per second at which torch reads memory: the best of a few sums.

    The buffer is larger than caches usually are, and written first: memory that was never touched
    is all one zero page and reads ten times too fast.
    """
    import torch

    numbers = torch.ones(nbytes // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - began)
    return nbytes / best
