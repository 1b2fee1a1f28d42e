"""Understudy as a contestant: its own counters instead of the kernel's.

Knows: `Engine`, recorded events, the clairvoyant. Does not know: the other contestants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.runner import Lap
from understudy import bench
from understudy.core import ExpertId, LayerEvent, Phase
from understudy.engine import Engine, Generation, inspect

LEAST = 256 << 20  # bytes; what a shorter look at the link says is noise


class Understudy:
    """``options`` go to `understudy.load`; without a budget it gets room for every expert."""

    @staticmethod
    def imports() -> None:
        """transformers imports a family's code when it is first asked for."""
        import transformers.models.mixtral.modeling_mixtral
        import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    def load(self, model: str, memory: int | None, options: dict[str, Any]) -> dict[str, Any]:
        said: list[str] = []
        if memory is None:
            found = inspect(model)
            memory = found.smallest_memory + found.experts * found.slot_bytes
        self.engine = Engine(model, memory=memory, on_status=said.append, **options)
        plan = self.engine.plan
        return {
            "said": said,
            "slots": plan.slots,
            "experts": plan.experts,
            "policies": {k: str(v) for k, v in self.engine.model.understudy.policies.items()},
        }

    def round(self, prompt: Sequence[int], answer: Sequence[int], seconds: float) -> Lap:
        del seconds  # an engine's answer has the length that was asked for
        self.engine.start_recording()
        meter = self.engine.model.understudy.runtime.transfer.meter
        before = meter.nbytes, meter.busy
        generation = self.engine.generate(
            list(prompt), max_new_tokens=len(answer), ignore_eos=True, dictated=answer
        )
        read, busy = meter.nbytes - before[0], meter.busy - before[1]
        rate = read / busy if read > LEAST else None
        return self._lap(generation, self.engine.stop_recording(), rate)

    def _lap(self, generation: Generation, events: Sequence[LayerEvent], rate: float | None) -> Lap:
        decode = generation.decode_counters
        reading = generation.counters - decode
        plan, steps = self.engine.plan, len(generation.tokens) - 1
        return Lap(
            ttft=generation.ttft,
            seconds=generation.tpot * steps,
            steps=steps,
            read_bytes=decode.bytes_read,
            needed_bytes=max(0, decode.bytes_read - decode.wasted_bytes),
            memory_bytes=steps * plan.dense + decode.lookups * plan.expert_bytes,
            best_bytes=bench.clairvoyant_bytes(events, plan, Phase.DECODE),
            lookups=decode.lookups,
            hits=decode.hits,
            late=decode.late,
            stall_seconds=decode.stall_seconds,
            prompt_read_bytes=reading.bytes_read,
            prompt_once_bytes=len(_touched(events)) * plan.expert_bytes,
            prompt_stall_seconds=reading.stall_seconds,
            link_rate=rate,
        )

    def close(self) -> None:
        self.engine.close()


def _touched(events: Sequence[LayerEvent]) -> set[ExpertId]:
    """The experts the prompt asked for."""
    return {
        ExpertId(event.layer, expert)
        for event in events
        if event.phase is Phase.PREFILL
        for expert in event.needed()
    }
