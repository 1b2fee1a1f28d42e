"""An engine that speaks without a model, so that the command line is tested in milliseconds.

It keeps the contract of `understudy.engine`: same constructor, same answers, same errors. Routing
is made up but consistent, so that counters, events and floors fit each other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from understudy import plan as planning
from understudy.core import ContextTooLong, Counters, LayerEvent, Phase

LAYERS, EXPERTS, TOP_K = 2, 8, 2
EXPERT_BYTES, SLOT_BYTES, DENSE, KV = 4096, 8192, 10_000, 5_000
CONTEXT = 256
WORDS = ("once", "upon", "a", "time")


@dataclass
class Generation:
    text: str
    tokens: list[int]
    prompt_tokens: int
    token_times: list[float]
    finish: str
    counters: Counters
    decode_counters: Counters
    logits: list[torch.Tensor] | None = field(default=None, repr=False)

    @property
    def ttft(self) -> float:
        return self.token_times[0]

    @property
    def tpot(self) -> float:
        later = len(self.token_times) - 1
        return (self.token_times[-1] - self.token_times[0]) / later if later else 0.0


class Engine:
    """``delay``: seconds per token; ``liars``: predictors whose logits come out wrong."""

    made: list[dict[str, Any]]
    delay = 0.0
    liars: tuple[str, ...] = ()
    template: str | None = None

    def __init__(self, source: str | Path, *, memory: Any = "auto", **settings: Any) -> None:
        self.source, self.settings = source, {"memory": memory, **settings}
        self.__class__.made.append(self.settings)
        self.closed = False
        self.tokenizer = SimpleNamespace(chat_template=self.template)
        weights = Path(source) / "model.safetensors"
        self.checkpoint = SimpleNamespace(files=(weights if weights.exists() else Path(__file__),))
        self.plan = planning.fit(
            planning.parse_memory(memory, 100 * SLOT_BYTES),
            dense=DENSE,
            kv=KV,
            activations=0,
            slot_bytes=SLOT_BYTES,
            experts=LAYERS * EXPERTS,
            context=settings.get("max_context") or CONTEXT,
            expert_bytes=EXPERT_BYTES,
            slots=slots if isinstance(slots := settings.get("slots"), int) else None,
            name=Path(source).name,
        )
        self._events: list[LayerEvent] | None = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.closed = True

    def start_recording(self) -> None:
        self._events = []

    def stop_recording(self) -> list[LayerEvent]:
        events, self._events = self._events or [], None
        return events

    def encode(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return [ord(letter) for letter in prompt]
        if prompt and isinstance(prompt[0], dict):
            return [ord(letter) for message in prompt for letter in message["content"]]
        return list(prompt)

    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
        ignore_eos: bool = False,
        keep_logits: bool = False,
        dictated: Sequence[int] = (),
    ) -> Generation:
        ids = self.encode(prompt)
        if len(ids) + max_new_tokens > self.plan.context:
            raise ContextTooLong(f"{len(ids)} tokens are too many; shorten them")
        self.asked = {"temperature": temperature, "top_p": top_p, "seed": seed, "stop": stop}
        text = ""
        for number in range(max_new_tokens):
            time.sleep(self.delay)
            word = " " + WORDS[number % len(WORDS)]
            text += word
            if on_text is not None:
                on_text(word)
        self._record(ids, max_new_tokens)
        return self._generation(text, len(ids), max_new_tokens, keep_logits)

    def _record(self, ids: list[int], steps: int) -> None:
        if self._events is None:
            return
        for step in range(steps):
            phase = Phase.DECODE if step else Phase.PREFILL
            for layer in range(LAYERS):
                row = [(step + layer) % EXPERTS, (step + layer + 1) % EXPERTS]
                self._events.append(LayerEvent(step, layer, phase, [row]))

    def _generation(self, text: str, prompt: int, new: int, keep_logits: bool) -> Generation:
        lookups = LAYERS * TOP_K
        first = Counters(misses=lookups, demand_bytes=lookups * EXPERT_BYTES, tokens=prompt)
        later = Counters(
            hits=3 * (new - 1),
            misses=new - 1,
            demand_bytes=(new - 1) * EXPERT_BYTES,
            stall_seconds=0.001 * (new - 1),
            tokens=new - 1,
        )
        wrong = 1.0 if self.settings.get("predictor") in self.liars else 0.0
        return Generation(
            text=text,
            tokens=list(range(new)),
            prompt_tokens=prompt,
            token_times=[0.5 + 0.01 * i for i in range(new)],
            finish="length",
            counters=first - (Counters() - later),
            decode_counters=later,
            logits=[torch.full((4,), i + wrong) for i in range(new)] if keep_logits else None,
        )


@dataclass(frozen=True)
class Inspection:
    family: str = "tiny_moe"
    architecture: str = "TinyMoeForCausalLM"
    layers: int = 3
    moe_layers: int = LAYERS
    experts_per_layer: int = EXPERTS
    top_k: int = TOP_K
    experts: int = LAYERS * EXPERTS
    expert_bytes: int = EXPERT_BYTES
    slot_bytes: int = SLOT_BYTES
    dense_bytes: int = DENSE
    checkpoint_bytes: int = DENSE + LAYERS * EXPERTS * EXPERT_BYTES
    context: int = CONTEXT
    smallest_memory: int = DENSE + KV + 2 * SLOT_BYTES
    recommended_memory: int = DENSE + KV + 8 * SLOT_BYTES
    format: str = "stored"
    lossy: bool = False
    delta_nll: float | None = None


def inspect(source: str | Path, *, max_context: int | None = None) -> Inspection:
    return Inspection(context=max_context or CONTEXT)


def module() -> ModuleType:
    """A fresh `understudy.engine`."""
    fake = ModuleType("understudy.engine")
    engine = type("Engine", (Engine,), {"made": []})
    fake.__dict__.update(Engine=engine, Generation=Generation, inspect=inspect)
    return fake


def install() -> ModuleType:
    """Put the fake in the real one's place for the whole process (for subprocesses)."""
    from understudy.cli import session

    fake = module()
    sys.modules["understudy.engine"] = fake
    session.quiet_guests = lambda: None
    return fake
