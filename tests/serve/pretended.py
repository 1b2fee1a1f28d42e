"""A batch without a model: its residency book and director are real, events are made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from understudy import plan as planning
from understudy.batch import Ask, Report, Snapshot, StepReport
from understudy.core import Counters, LayerEvent, Phase
from understudy.policies.director import Director
from understudy.policies.predict import NoPrediction, SelfSwitch
from understudy.policies.residency import Residency
from understudy.policies.resolve import Fetch
from understudy.policies.route import AsRouted
from understudy.registry import EVICTORS

EXPERT_BYTES, SLOT_BYTES = 1000, 4096


class PretendedBatch:
    """``experts`` of each layer, ``slots`` for all of them."""

    context = 512

    def __init__(self, layers: int = 3, experts: int = 8, slots: int = 10) -> None:
        self.director = Director(
            Residency(slots),
            evictor=EVICTORS.get("lru")(slots=slots, layers=layers),
            predictor=NoPrediction(layers=layers, experts=[experts] * layers),
            resolver=Fetch(),
            route=AsRouted(),
            switch=SelfSwitch(enabled=False),
            nbytes=lambda expert: EXPERT_BYTES,
        )
        self.runtime: Any = SimpleNamespace(director=self.director, tap=None)
        self.engine: Any = _engine(self, layers, experts, slots)
        self.now: dict[str, Any] = {"alive": True, "draining": False, "running": 0, "waiting": 0}
        self.extra = Counters()  # what only hands count

    def snapshot(self) -> Snapshot:
        rest = {"kv_used": 32, "kv_total": 128, "prefix_queries": 9, "prefix_hits": 4}
        return Snapshot(
            error=None, preemptions=2, counters=self.counters, **(self.now | rest)
        )  # fmt: skip

    @property
    def counters(self) -> Counters:
        return self.director.counters + self.extra

    def event(self, layer: int, *ids: list[int]) -> None:
        """One event, carried out at once. ``ids``: the experts of each token."""
        plan = self.director.decide(LayerEvent(0, layer, Phase.DECODE, ids))
        if self.runtime.tap is not None:
            self.runtime.tap(plan.event)
        for load in plan.loads:
            self.director.bring(load)


def _engine(batch: PretendedBatch, layers: int, experts: int, slots: int) -> Any:
    modules = [
        SimpleNamespace(name=f"model.layers.{n}.mlp.experts", num_experts=experts)
        for n in range(layers)
    ]
    handle = SimpleNamespace(
        runtime=batch.runtime,
        anatomy=SimpleNamespace(modules=modules),
        options=SimpleNamespace(device="cpu"),
        policies={"evictor": "lru", "predictor": "none"},
        plan=planning.fit(
            100_000 + slots * SLOT_BYTES,
            dense=50_000,
            kv=20_000,
            activations=10_000,
            slot_bytes=SLOT_BYTES,
            experts=layers * experts,
            context=512,
            slots=slots,
        ),
    )
    config = SimpleNamespace(num_experts_per_tok=2)
    config.get_text_config = lambda decoder: config
    return SimpleNamespace(
        model=SimpleNamespace(understudy=handle), checkpoint=SimpleNamespace(config=config)
    )


def a_step(prompt_tokens: int = 0, new_tokens: int = 1) -> StepReport:
    return StepReport(0.1, 1, 0, prompt_tokens, new_tokens, 32, 128, Counters())


def a_report(**changes: Any) -> Report:
    told: dict[str, Any] = {
        "prompt_tokens": 12,
        "cached_tokens": 4,
        "completion_tokens": 5,
        "queue_seconds": 0.1,
        "ttft_seconds": 0.5,
        "tpot_seconds": 0.2,
        "prefill_seconds": 0.4,
        "decode_seconds": 0.8,
        "e2e_seconds": 1.4,
        "mean_batch": 1.5,
        "counters": Counters(hits=70, late=2, misses=8, demand_bytes=900, stall_seconds=0.25),
    }
    return Report(**(told | changes))


AN_ASK = Ask(prompt=(1, 2, 3), max_new_tokens=5)
