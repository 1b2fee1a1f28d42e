"""What would a larger cache be worth? Record once, replay with any number of slots.

python examples/how_much_memory.py models/fine
"""

import sys

from understudy import Engine
from understudy.simulate import replay


def main(model: str, tokens: str = "48") -> None:
    with Engine(model, memory="50%", max_context=512) as engine:
        engine.start_recording()
        engine.generate("The city was founded in", max_new_tokens=int(tokens))
        events = engine.stop_recording()
        experts, size = engine.plan.experts, engine.plan.expert_bytes

    layers = 1 + max(event.layer for event in events)
    print("held      memory   lru misses   clairvoyant misses")
    for percent in (10, 20, 40, 60, 80, 100):
        slots = max(2, experts * percent // 100)
        lru, best = (
            replay(events, slots=slots, layers=layers, evictor=name).misses
            for name in ("lru", "belady")
        )
        print(f"{percent:3} % {slots * size / 2**20:8.1f} MiB {lru:12} {best:20}")


if __name__ == "__main__":
    main(*sys.argv[1:])
