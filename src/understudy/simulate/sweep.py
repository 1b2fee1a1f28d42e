"""Many runs: every budget on every machine under every policy, beside what a clairvoyant would do.

Knows: runs and their floors. Does not know: how rows are shown, or where a trace comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from understudy.core import BudgetTooSmall, LayerEvent, UnderstudyError
from understudy.simulate.link import Machine
from understudy.simulate.published import published
from understudy.simulate.run import Minds, Outcome, Report, Sizes, simulate

ORACLE = "belady"
MINIMUM_SLOTS = 2  # as the engine: one expert is computed while the next one arrives

# What the publisher of the Qwen3 trace calls them -> what they are called here.
PUBLISHED_NAMES = {"lru": "lru-global", "lfu": "lfu", "belady": "belady"}


@dataclass(frozen=True, slots=True)
class Row:
    """One policy with one budget on one machine. Floors are seconds per decode step that nothing on
    this machine can beat: ``floor_own`` with the bytes this policy needed, ``floor_belady`` with
    those a clairvoyant who fetches every miss would have needed; loads overlap with all else, so
    each is the larger of the two times."""

    budget: int
    machine: Machine
    policy: str
    outcome: Outcome
    floor_own: float
    floor_belady: float

    @property
    def times_floor(self) -> float:
        """How many times its own floor a mean step took."""
        return self.outcome.tpot_mean / self.floor_own if self.floor_own else 0.0

    def as_dict(self) -> dict[str, Any]:
        o = self.outcome
        return {
            "memory_bytes": self.budget,
            "slots": o.slots,
            "link_bytes_per_second": self.machine.link,
            "policy": self.policy,
            "hit_rate": round(o.hit_rate, 6),
            "hit_rate_decode": round(o.hit_rate_decode, 6),
            "bytes_per_token": round(o.bytes_per_token),
            "tpot_ms": round(1000 * o.tpot, 6),
            "tpot_mean_ms": round(1000 * o.tpot_mean, 6),
            "ttft_ms": round(1000 * o.ttft, 6),
            "stall_ms": round(1000 * o.stall_per_step, 6),
            "floor_own_ms": round(1000 * self.floor_own, 6),
            "floor_belady_ms": round(1000 * self.floor_belady, 6),
            "counters": o.counters.as_dict(),
        }


def sweep(
    events: Sequence[LayerEvent],
    *,
    sizes: Sizes,
    budgets: Sequence[int],
    machines: Sequence[Machine],
    policies: Mapping[str, tuple[Minds, int | None]],
    report: Report = lambda done, total: None,
) -> list[Row]:
    """``policies``: name -> its minds, and the most slots it may have (None: the budget's). The
    oracle's row comes last in each group."""
    named = {name: found for name, found in policies.items() if name != ORACLE}
    named[ORACLE] = (Minds(ORACLE), None)
    for budget in budgets:
        require_room(sizes, budget)
    total, done = len(budgets) * len(machines) * len(named) * len(events), 0
    rows: list[Row] = []
    for budget in budgets:
        for machine in machines:
            outcomes = {}
            for name, (minds, most) in named.items():
                slots = min(sizes.slots(budget), most or sizes.count)
                outcomes[name] = simulate(
                    events, sizes=sizes, slots=slots, machine=machine, minds=minds,
                    report=lambda now, _, before=done: report(before + now, total),  # type: ignore[misc]
                )  # fmt: skip
                done += len(events)
            best = _floor(outcomes[ORACLE], machine)
            rows += [
                Row(budget, machine, name, outcome, _floor(outcome, machine), best)
                for name, outcome in outcomes.items()
            ]
    return rows


def require_room(sizes: Sizes, budget: int) -> None:
    """Complain about a budget that the engine would refuse."""
    if sizes.slots(budget) < MINIMUM_SLOTS:
        smallest = MINIMUM_SLOTS * sizes.largest
        raise BudgetTooSmall(
            f"{budget} bytes hold no {MINIMUM_SLOTS} experts of {sizes.largest} bytes; "
            f"the smallest --memory is {smallest}",
            smallest,
        )


def _floor(outcome: Outcome, machine: Machine) -> float:
    steps = len(outcome.steps)
    if not steps:
        return 0.0
    needed = outcome.decode.bytes_read - outcome.decode.wasted_bytes
    return max(needed / machine.link, outcome.decode_compute) / steps


# ------------------------------------------------------------------------------ against a published


@dataclass(frozen=True, slots=True)
class Published:
    """One line of a published curve: rates in percent."""

    budget: int
    policy: str
    hits: float
    hits_decode: float


@dataclass(frozen=True, slots=True)
class Beside:
    """The published figure, ours by their accounting, ours by the engine's."""

    line: Published
    policy: str  # as it is called here
    hits: float
    hits_decode: float
    slots: int
    engine_hits: float
    engine_hits_decode: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "memory_bytes": self.line.budget,
            "policy": self.line.policy,
            "policy_here": self.policy,
            "published": {"hit_pct": self.line.hits, "hit_pct_decode": self.line.hits_decode},
            "ours_published_accounting": {
                "hit_pct": round(self.hits, 3), "hit_pct_decode": round(self.hits_decode, 3),
            },
            "ours_event_atomic": {
                "slots": self.slots,
                "hit_pct": round(self.engine_hits, 3),
                "hit_pct_decode": round(self.engine_hits_decode, 3),
            },
        }  # fmt: skip


def beside(
    events: Sequence[LayerEvent],
    lines: Sequence[Published],
    *,
    sizes: Sizes,
    report: Report = lambda done, total: None,
) -> list[Beside]:
    """Every line of a curve whose policy is known here, by both accountings."""
    known = [line for line in lines if line.policy in PUBLISHED_NAMES]
    if not known:
        raise UnderstudyError(
            f"the curve names none of {', '.join(PUBLISHED_NAMES)}; there is nothing to compare"
        )
    found = []
    for done, line in enumerate(known):
        name = PUBLISHED_NAMES[line.policy]
        theirs = published(events, sizes=sizes, budget=line.budget, evictor=name)
        slots = sizes.slots(line.budget)
        ours = simulate(
            events, sizes=sizes, slots=slots, machine=Machine(1.0, 1.0), minds=Minds(name)
        )
        rates = theirs.hit_rate, theirs.hit_rate_decode, ours.hit_rate, ours.hit_rate_decode
        a, b, c, d = (100 * rate for rate in rates)
        found.append(Beside(line, name, a, b, slots, c, d))
        report(done + 1, len(known))
    return found
