"""The nouns every room shares, and the tree of errors.

Knows: what an expert, an event, a plan and a counter are: plain values and their arithmetic.
Does not know: files, tensors, threads, clocks, transformers. Imports the standard library only.

Units, everywhere: bytes are integers, times are seconds as floats, bandwidths are bytes per second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, NamedTuple

# --------------------------------------------------------------------------------------- errors


class UnderstudyError(Exception):
    """Anything a user can cause or cure. Its text is one line that names the cure."""


class CheckpointError(UnderstudyError):
    """The checkpoint cannot be run as it lies on disk: missing, damaged, not a MoE, pickled, ..."""


class UnsupportedFamily(CheckpointError):
    """The model family has no experts interface, or stores its experts in a way we cannot read."""


class QuantizedExperts(CheckpointError):
    """The experts are stored in a format that is not supported yet (MXFP4, FP8, int4, ...)."""


class BudgetTooSmall(UnderstudyError):
    """The memory budget cannot hold the dense weights and two experts. Carries what would do."""

    def __init__(self, message: str, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


class ContextTooLong(UnderstudyError):
    """The prompt and the new tokens do not fit the context that was planned for."""


class NotEnoughDisk(UnderstudyError):
    """A file that would be written does not fit on its disk. Nothing was written."""


class UnknownName(UnderstudyError):
    """No policy, predictor or evictor of that name. The text suggests the nearest one."""


class ReadFailed(UnderstudyError):
    """An expert could not be read: disk error, or its file changed or shrank while running."""


class NotInThisModel(UnderstudyError):
    """Asked of a loaded model what only a fully resident one can do (save, cast, train)."""


# ------------------------------------------------------------------------------------- the experts

STORED = "stored"  # the format of experts whose numbers are bf16, fp16 or fp32


class ExpertId(NamedTuple):
    """One expert of one MoE layer.

    ``layer`` counts MoE layers in the order of the forward pass, from 0; it is not the index of the
    decoder layer (hybrids have decoder layers without experts).
    """

    layer: int
    expert: int


class Tier(Enum):
    """Where bytes can lie, slowest first."""

    DISK = "disk"
    HOST = "host"
    DEVICE = "device"


class ByteRange(NamedTuple):
    """``nbytes`` bytes at ``offset`` of file number ``file`` of a checkpoint."""

    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A strided view of one matrix (or bias) inside the bytes of one expert.

    ``read``: index into ``ExpertLayout.reads``; ``start``: first byte, counted from the start of
    that read; ``dtype``: torch's name without ``torch.`` ("bfloat16"); ``shape`` and ``strides``
    (in elements) as ``torch.as_strided`` takes them. Orientation is that of the Experts module's
    own parameter (``[out, in]``, or ``[in, out]`` where the family is transposed), without the
    expert axis.
    """

    read: int
    start: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """How one expert lies on disk and how its bytes become the module's parameters.

    ``reads``: the byte ranges to fetch, adjacent ones merged, in file order. ``params``: the name
    of the module's parameter ("gate_up_proj", "down_proj", "up_proj", "..._bias") -> its pieces, in
    order along the *output* axis (one piece when it lies contiguous, else e.g. gate, then up).
    ``format``: where it is not `STORED`, a matrix is the codes of that weight format under its own
    name and the scales under that name and "_scales", both of a matrix ``[out, in]`` whatever the
    module's orientation.
    """

    reads: tuple[ByteRange, ...]
    params: Mapping[str, tuple[Piece, ...]]
    format: str = STORED

    @property
    def nbytes(self) -> int:
        """Bytes that must come from disk for this expert (before rounding to pages)."""
        return sum(r.nbytes for r in self.reads)


# ------------------------------------------------------------------------------- events and plans


class Phase(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(slots=True)
class Forward:
    """What belongs to one forward pass and travels with it (house, principle 10).

    ``rows``: which rows of the flattened batch are real tokens, as a boolean tensor, or ``None``
    where all are. ``requests``: the request of each row. ``router_args``: MoE layer -> what its
    router was called with last. ``residuals``: MoE layer -> the residual stream between attention
    and experts, and the norm that made the router's input of it (only where somebody asked).
    ``foretold``: later MoE layer -> its experts and weights as the layer before foresaw them.
    """

    step: int
    phase: Phase
    rows: Any = None
    requests: Sequence[int] = ()
    router_args: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    residuals: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    foretold: dict[int, Any] = field(default_factory=dict)
    started: float = 0.0
    outer: Forward | None = None


# Greenlets and threads each see their own. None: somebody called a part of the model directly.
current_forward: ContextVar[Forward | None] = ContextVar("current_forward", default=None)


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured numbers a mind may weigh. Zero means: not measured yet.

    Of a processor that computes experts where they lie: ``host_bandwidth`` is bytes/s at which it
    reads their weights for one token each, ``host_further`` the rate at which it works the same
    weights through once more for each further token of an expert. An expert of W bytes with n
    tokens takes it W / host_bandwidth + (n - 1) W / host_further.
    """

    link_bandwidth: float = 0.0  # bytes/s that demand loads achieved lately
    link_idle: float = 0.0  # share of the time the link had nothing to do, 0..1
    queued: int = 0  # demand reads waiting now
    host_bandwidth: float = 0.0
    host_further: float = 0.0


NOBODY = -1  # in place of an expert's number: this (token, rank) runs nobody


class Guess(NamedTuple):
    """This expert will be needed with this probability, so many MoE layers from now."""

    expert: ExpertId
    probability: float
    layers_until: int


@dataclass(slots=True)
class LayerEvent:
    """All that one (step, MoE layer) needs, as plain values. Event-atomic: house, principle 4.

    ``ids`` and ``weights`` are per (token, rank), padding tokens already left out. ``requests`` is
    the request of each token. ``lookahead`` maps a later MoE layer to per-token, per-rank expert
    ids and weights, as they are foreseen at this layer (empty: not available); ``foretold`` is what
    the layer before foresaw about this one.
    ``scores``: per token, the router's probability of every expert, where a policy asked for them.
    """

    step: int
    layer: int
    phase: Phase
    ids: Sequence[Sequence[int]]
    weights: Sequence[Sequence[float]] = ()
    requests: Sequence[int] = ()
    scores: Sequence[Sequence[float]] | None = None
    lookahead: Mapping[int, tuple[Sequence[Sequence[int]], Sequence[Sequence[float]]]] = field(
        default_factory=dict
    )
    foretold: tuple[Sequence[Sequence[int]], Sequence[Sequence[float]]] | None = None
    costs: Costs = Costs()

    def needed(self) -> dict[int, int]:
        """expert -> number of tokens, in order of *last* use: the end of the prompt comes last."""
        if len(self.ids) == 1 and len(once := dict.fromkeys(self.ids[0], 1)) == len(self.ids[0]):
            once.pop(NOBODY, None)
            return once
        count: dict[int, int] = {}
        for row in self.ids:
            for e in row:
                count[e] = count.pop(e, 0) + 1
        count.pop(NOBODY, None)
        return count


class Load(NamedTuple):
    """Fetch ``expert`` into the slot of ``victim`` (``None``: a free slot).

    A victim that this same event needs is an earlier expert of ``LayerPlan.order``: the load may
    start only after that one has been computed. That is how an event larger than the slots runs in
    waves.
    """

    expert: ExpertId
    victim: ExpertId | None


@dataclass(slots=True)
class LayerPlan:
    """What the runtime does for one event. Everything about *which* and *in what order*, nothing
    about how.

    ``event``: the event as it is carried out (a route transform may have changed who runs).
    ``hits`` are READY now; ``late`` are on their way because somebody speculated; ``loads`` are
    issued in this order, before any speculation; ``order`` is the order in which experts *may* be
    computed first (the runtime takes whatever is READY, earliest in this order first).
    ``in_place`` take no slot and are not in ``order``: the processor computes them in host memory,
    while loads fly and the device works. ``skipped`` are left out by the resolver (lossy).
    Speculation is asked for apart, once these loads are on their way: look-ahead takes time that
    the link can already use.
    """

    event: LayerEvent
    hits: tuple[ExpertId, ...]
    late: tuple[ExpertId, ...]
    loads: tuple[Load, ...]
    order: tuple[ExpertId, ...]
    in_place: tuple[ExpertId, ...] = ()
    skipped: tuple[ExpertId, ...] = ()


# ------------------------------------------------------------------------------------- counters


@dataclass(slots=True)
class Counters:
    """What happened, counted by the director and the runtime, never by a policy. Monotonic;
    subtract two snapshots.

    substituted, skipped: (token, rank) pairs that ran as another expert, or not at all; the masses
    are the router's weights of those pairs (a token's weights mostly sum to 1).
    hit: resident at lookup. late: in flight at lookup. miss: neither. One lookup per (event,
    expert). computed_in_place: misses that the processor computed in host memory.
    Stall: seconds the compute thread waited for an expert, on its way or computed in place.
    """

    events: int = 0
    hits: int = 0
    late: int = 0
    misses: int = 0
    computed_in_place: int = 0
    substituted: int = 0
    skipped: int = 0
    substituted_mass: float = 0.0
    skipped_mass: float = 0.0
    evictions: int = 0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    prefetch_issued: int = 0
    prefetch_used: int = 0
    prefetch_wasted: int = 0
    prefetch_cancelled: int = 0
    wasted_bytes: int = 0
    stall_seconds: float = 0.0
    expert_seconds: float = 0.0
    steps: int = 0
    tokens: int = 0

    @property
    def lookups(self) -> int:
        return self.hits + self.late + self.misses

    @property
    def bytes_read(self) -> int:
        """Every byte asked of the slower tier, useful or not."""
        return self.demand_bytes + self.prefetch_bytes

    @property
    def prefetch_precision(self) -> float:
        """Share of the speculated experts that somebody used while they were there."""
        return self.prefetch_used / self.prefetch_issued if self.prefetch_issued else 0.0

    @property
    def prefetch_recall(self) -> float:
        """Share of the experts that had to come from the slower tier that were speculated."""
        needed = self.prefetch_used + self.misses
        return self.prefetch_used / needed if needed else 0.0

    def count_changes(self, asked: LayerEvent, runs: LayerEvent) -> None:
        """What a route transform changed: pairs whose expert does not run for that token. A row
        that leaves experts out changes nobody else."""
        for old, weights, new in zip(asked.ids, asked.weights, runs.ids, strict=True):
            gone = [w for e, w in zip(old, weights, strict=True) if e not in new]
            left_out = list(new).count(NOBODY)
            if left_out:
                self.skipped += left_out
                self.skipped_mass += sum(gone)
            else:
                self.substituted += len(gone)
                self.substituted_mass += sum(gone)

    def count_left_out(self, event: LayerEvent, experts: Sequence[ExpertId]) -> None:
        """What a resolver left out: every pair of these experts."""
        names = {e.expert for e in experts}
        for ids, weights in zip(event.ids, event.weights, strict=True):
            gone = [w for e, w in zip(ids, weights, strict=True) if e in names]
            self.skipped += len(gone)
            self.skipped_mass += sum(gone)

    def copy(self) -> Counters:
        return Counters(*(getattr(self, f.name) for f in fields(self)))

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))

    def as_dict(self) -> dict[str, int | float]:
        return {f.name: getattr(self, f.name) for f in fields(self)}
