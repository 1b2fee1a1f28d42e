"""A policy of your own: first in, first out, registered and compared with LRU.

python examples/own_evictor.py models/fine
"""

import sys

from understudy import Engine
from understudy.core import ExpertId
from understudy.policies import Evictor
from understudy.registry import EVICTORS


class Fifo(Evictor):
    """Who came first leaves first, however useful."""

    def __init__(self, *, slots: int, layers: int) -> None:
        super().__init__(slots=slots, layers=layers)
        self.queue: dict[ExpertId, None] = {}

    def admit(self, expert: ExpertId, *, speculative: bool) -> None:
        self.queue[expert] = None

    def remove(self, expert: ExpertId) -> None:
        del self.queue[expert]

    def victims(self, layer: int, need: int) -> list[ExpertId]:
        return list(self.queue)


def main(model: str, tokens: str = "32") -> None:
    EVICTORS.register("fifo", Fifo)
    for name in ("fifo", "lru"):
        with Engine(model, memory="300%", slots=24, evictor=name, predictor="none") as engine:
            misses = engine.generate("A", max_new_tokens=int(tokens)).counters.misses
        print(f"{name}: {misses} misses")


if __name__ == "__main__":
    main(*sys.argv[1:])
