"""How long does a simulation of a million layer events take, policy by policy?

    python bench/simulator.py [--events 1000000] [--share 0.5] [--policies lru,lrfu] [--json]

Routing is made up: 48 layers of 128 experts, eight of them per token, favourites as 1 / rank and
four in ten kept from the token before, as much of it as `BASE` events, repeated. Each run is the
whole virtual clock, not only the counting. ``cpu``: seconds of the processor, which other people's
programs disturb less than the seconds on the wall.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from bench import show
from bench.card import card
from understudy.bench import Policy
from understudy.core import LayerEvent, Phase
from understudy.simulate import Machine, Minds, Sizes, simulate

LAYERS, EXPERTS, K = 48, 128, 8
KEPT = 0.4
BASE = 96_000
MACHINE = Machine(link=2e9, compute=2e10, frame=4e-4)
SIZES = Sizes((EXPERTS,) * LAYERS, (3 << 20,) * LAYERS)
COLUMNS = (
    ("policy", lambda row: row["policy"]),
    ("events", lambda row: str(row["events"])),
    ("hits, %", lambda row: f"{100 * row['hit_rate']:.1f}"),
    ("seconds", lambda row: f"{row['seconds']:.1f}"),
    ("cpu", lambda row: f"{row['cpu_seconds']:.1f}"),
    ("us per event", lambda row: f"{1e6 * row['cpu_seconds'] / row['events']:.1f}"),
)


def routing(events: int, seed: int = 0) -> list[LayerEvent]:
    """One token after the other."""
    dice = random.Random(seed)
    liked = [dice.sample(range(EXPERTS), EXPERTS) for _ in range(LAYERS)]
    shares = list(accumulate(1 / (rank + 1) for rank in range(EXPERTS)))
    last: list[list[int]] = [[] for _ in range(LAYERS)]
    made = []
    for number in range(events):
        step, layer = divmod(number, LAYERS)
        chosen = [e for e in last[layer] if dice.random() < KEPT]
        while len(chosen) < K:
            expert = dice.choices(liked[layer], cum_weights=shares)[0]
            if expert not in chosen:
                chosen.append(expert)
        last[layer] = chosen
        made.append(LayerEvent(step, layer, Phase.DECODE, [chosen]))
    return made


def timed(policy: Policy, events: Sequence[LayerEvent], slots: int) -> dict[str, Any]:
    minds = Minds(policy.evictor, policy.predictor)
    wall, cpu = time.perf_counter(), time.process_time()
    done = simulate(events, sizes=SIZES, slots=slots, machine=MACHINE, minds=minds)
    return {
        "policy": policy.name,
        "rounds": 1,
        "events": len(events),
        "slots": slots,
        "hit_rate": round(done.hit_rate, 4),
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }


def main() -> int:
    asked = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    asked.add_argument("--events", type=int, default=1_000_000)
    asked.add_argument("--share", type=float, default=0.5, help="of the experts that have a slot")
    asked.add_argument("--policies", default="lru,lrfu,lfu")
    asked.add_argument("--json", action="store_true")
    chosen = asked.parse_args()
    show.say("making up the routing")
    base = routing(min(BASE, chosen.events))
    events = (base * -(-chosen.events // len(base)))[: chosen.events]
    rows = []
    for name in chosen.policies.split(","):
        show.say(f"simulating {name}")
        rows.append(timed(Policy.parse(name), events, int(chosen.share * SIZES.count)))
    print(show.table(rows, COLUMNS))
    if chosen.json:
        print(json.dumps({"card": card({}, "bench/simulator.py"), "cells": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
