"""On a miss: what to do about an expert that is not resident. Fetch it, or compute it in place.

Knows: the event, who is missing, what the two ends were measured to do. Does not know: where the
bytes are, who must leave for them, or how anything was measured.

A miss can be served at two ends that work at the same time: the link carries the expert to the
device, or the processor reads its weights in host memory and only activations travel. An event is
done when the later end is. Computing in place sums in another order: equivalent, not bit-exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from understudy.core import ExpertId, LayerEvent, Phase
from understudy.policies import Exactness, MissResolver, Residency, Resolution

# A prediction is not more exact than this, and another rounding of the output has to earn its way.
WORTH_IT = 0.95


class Fetch(MissResolver):
    """Load every missing expert, those used by the end of the prompt last."""

    def resolve(
        self, event: LayerEvent, missing: Sequence[ExpertId], book: Residency
    ) -> Resolution:
        return Resolution(fetch=missing)


# --------------------------------------------------------------------------- two ends at one time


def phi(link: float, host: float) -> float:
    """The share of the misses that the link carries while the processor computes the rest, both
    given in bytes/s (FreeToken, arXiv 2608.16157)."""
    return link / (link + host)


def fetched(misses: int, link: float, host: float) -> int:
    """How many of ``misses`` to fetch so that the later end is done soonest: the integer F that
    minimises max(F (1 - phi), (misses - F) phi). Where two are equal, the larger: it leaves more
    in the cache."""
    low = min(int(misses * phi(link, host)), misses - 1)
    return min((low + 1, low), key=lambda f: max(f * host, (misses - f) * link))


class _TwoEnds(MissResolver):
    """What both splits share: who is fetched first, and what goes before any sharing out."""

    exactness = Exactness.EQUIVALENT
    needs_device = True

    def __init__(self) -> None:
        self._events = 0
        self._last: dict[ExpertId, int] = {}  # the event that used it last, resident or not

    def resolve(
        self, event: LayerEvent, missing: Sequence[ExpertId], book: Residency
    ) -> Resolution:
        if not event.costs.link_bandwidth or not event.costs.host_bandwidth:
            return Resolution(fetch=missing)
        ranked = sorted(missing, key=lambda e: -self._last.get(e, 0))
        ranked, count = self._share_out(event, ranked)
        # A slot that nobody holds costs nobody his place: whoever takes it is a hit from now on.
        chosen = set(ranked[: max(count, min(book.free, len(missing)))])
        return Resolution(
            [e for e in missing if e in chosen], [e for e in missing if e not in chosen]
        )

    def touch(self, event: LayerEvent, needed: Sequence[ExpertId]) -> None:
        self._events += 1
        self._last.update(dict.fromkeys(needed, self._events))

    def _share_out(self, event: LayerEvent, ranked: list[ExpertId]) -> tuple[list[ExpertId], int]:
        """``ranked``: most recently used first. Answers in the order in which they are worth
        fetching, and how many of them are."""
        raise NotImplementedError


class CpuSplit(_TwoEnds):
    """FreeToken's rule: of m misses fetch about phi m, those used most recently, and compute the
    rest in place. It counts experts, not tokens; a prompt, with many tokens for each, is fetched.
    """

    def _share_out(self, event: LayerEvent, ranked: list[ExpertId]) -> tuple[list[ExpertId], int]:
        if event.phase is Phase.PREFILL:
            return ranked, len(ranked)
        costs = event.costs
        return ranked, fetched(len(ranked), costs.link_bandwidth, costs.host_bandwidth)


class Makespan(_TwoEnds):
    """The two-ended rule of Fiddler (arXiv 2402.07033) and HybriMoE (arXiv 2504.05897): the link
    takes the same time for each expert, the processor more for one with more tokens; the share
    whose later end is done soonest.

    With equal times on the link, whoever has most tokens is best fetched, so looking at every
    number of fetched experts finds the best of all assignments. The device computes what arrives
    while the next one flies: its time is not counted.
    """

    def _share_out(self, event: LayerEvent, ranked: list[ExpertId]) -> tuple[list[ExpertId], int]:
        costs, tokens = event.costs, event.needed()
        ranked.sort(key=lambda e: -tokens[e.expert])
        first = 1 / costs.host_bandwidth
        further = 1 / costs.host_further if costs.host_further else first
        # Seconds per byte: the experts of a layer are of one size, which changes no comparison.
        best, soonest, host = len(ranked), len(ranked) / costs.link_bandwidth, 0.0
        for count in reversed(range(len(ranked))):
            host += first + (tokens[ranked[count].expert] - 1) * further
            later = max(count / costs.link_bandwidth, host)
            if later < soonest:
                best, soonest = count, later
        return ranked, best


# ------------------------------------------------------------------------------ chosen at the start


@dataclass(frozen=True, slots=True)
class Ends:
    """The two ends as measured on one machine, in bytes of expert weights per second.

    ``link``: pinned host memory to device; ``host``: the processor computing experts where they
    lie, one token each. Both read the same memory, so they are measured alone and beside each other
    (``..._beside``). ``pageable``: the link from memory that is not pinned. ``host_further``: see
    `core.Costs`. ``handover``: seconds in which a token's activations go to the host and back.
    """

    link: float
    host: float
    link_beside: float
    host_beside: float
    pageable: float = 0.0
    host_further: float = 0.0
    handover: float = 0.0

    @property
    def phi(self) -> float:
        return phi(self.link_beside, self.host_beside)

    def split_seconds(self, misses: int, expert_bytes: int) -> float:
        """One event under `CpuSplit`."""
        count = fetched(misses, self.link_beside, self.host_beside)
        if count == misses:
            return self.fetch_seconds(misses, expert_bytes)
        ends = count / self.link_beside, (misses - count) / self.host_beside
        return self.handover + expert_bytes * max(ends)

    def fetch_seconds(self, misses: int, expert_bytes: int) -> float:
        """One event under `Fetch`."""
        return misses * expert_bytes / self.link


def automatic(ends: Ends, expert_bytes: int, top_k: int) -> tuple[str, str]:
    """The resolver for this machine, and why, in a line: `cpu-split` where it is predicted to serve
    misses sooner than the link alone, over events with 1 to ``top_k`` of them."""
    counts = range(1, max(1, top_k) + 1)
    split = sum(ends.split_seconds(m, expert_bytes) for m in counts)
    fetch = sum(ends.fetch_seconds(m, expert_bytes) for m in counts)
    name = "cpu-split" if split < WORTH_IT * fetch else "fetch"
    rates = f"link {ends.link / 1e9:.3g} GB/s"
    if name == "fetch":
        return name, f"{rates} alone serves misses about as soon as with the processor's help"
    return name, (
        f"misses take {100 * split / fetch:.0f} % of the time that the link alone takes "
        f"({rates} alone, {ends.link_beside / 1e9:.3g} beside a processor that reads "
        f"{ends.host_beside / 1e9:.3g} GB/s, phi {ends.phi:.2f})"
    )
