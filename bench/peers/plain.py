"""transformers as it is, all in RAM; and with accelerate, experts and all left on disk.

Knows: `from_pretrained`, ``device_map``. Does not know: us.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from bench.runner import Lap, step_through


class Transformers:
    """Everything resident, in the stored dtype, with transformers' own choice of kernels."""

    @staticmethod
    def imports() -> None:
        """transformers imports a family's code when it is first asked for."""
        import transformers.models.mixtral.modeling_mixtral
        import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    def load(self, model: str, memory: int | None, options: dict[str, Any]) -> dict[str, Any]:
        transformers.logging.disable_progress_bar()
        self.model = self._load(model, memory, options).eval()
        return {"said": [], "experts": self.model.config._experts_implementation}

    def _load(self, model: str, memory: int | None, options: dict[str, Any]) -> Any:
        del memory, options
        return transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto")

    def round(self, prompt: Sequence[int], answer: Sequence[int], seconds: float) -> Lap:
        self._cache: Any = None
        with torch.inference_mode():
            return step_through(
                self._read, lambda token: self._read([token]), prompt, answer, seconds
            )

    def _read(self, tokens: Sequence[int]) -> int:
        out = self.model(
            input_ids=torch.tensor([tokens]),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = out.past_key_values
        return int(out.logits[0, -1].argmax())

    def close(self) -> None:
        del self.model


class Accelerated(Transformers):
    """accelerate's disk offload: as many layers in RAM as its budget holds, the rest from disk."""

    def _load(self, model: str, memory: int | None, options: dict[str, Any]) -> Any:
        self._folder = tempfile.TemporaryDirectory(dir=options["scratch"])
        return transformers.AutoModelForCausalLM.from_pretrained(
            model,
            dtype="auto",
            device_map="auto",
            max_memory={"cpu": memory},
            offload_folder=self._folder.name,
        )

    def close(self) -> None:
        super().close()
        self._folder.cleanup()


class Offloaded(Transformers):
    """accelerate's CPU offload: as many layers on the accelerator as its budget holds, the others
    in CPU memory; all that a layer owns is copied whenever it runs."""

    def _load(self, model: str, memory: int | None, options: dict[str, Any]) -> Any:
        del options
        return transformers.AutoModelForCausalLM.from_pretrained(
            model,
            dtype="auto",
            device_map="auto",
            max_memory={0: memory, "cpu": 1 << 40},  # what does not fit: in memory, never on disk
        )

    @property
    def copied_bytes(self) -> int:
        """By every forward: what is not on the accelerator has no memory of its own."""
        return sum(p.nbytes for p in self.model.parameters() if p.device.type == "meta")
