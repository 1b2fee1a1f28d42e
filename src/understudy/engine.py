"""Turns a prompt into tokens, with the times and counters of each answer.

Knows: a loaded model, its tokenizer, transformers' generate. Does not know: how the model was put
together (`loading`), terminals, HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from understudy import model as guest
from understudy import plan as planning
from understudy.checkpoint import Checkpoint
from understudy.core import ContextTooLong, Counters, LayerEvent, UnderstudyError
from understudy.loading import Anatomy, Handle, Inspection, Options, inspect, load

__all__ = [
    "Anatomy",
    "Engine",
    "Generation",
    "Handle",
    "Inspection",
    "Options",
    "inspect",
    "load",
]


@dataclass
class Generation:
    """One answer. Times in seconds since the request; ``counters``: what this call did."""

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
        """Request to first token."""
        return self.token_times[0] if self.token_times else 0.0

    @property
    def tpot(self) -> float:
        """(end - TTFT) / (tokens - 1)."""
        n = len(self.token_times)
        return (self.token_times[-1] - self.token_times[0]) / (n - 1) if n > 1 else 0.0


class Engine:
    """A model that may be larger than its memory, with its tokenizer. A context manager."""

    def __init__(
        self,
        source: str | Path | Anatomy,
        *,
        threads: int | None = None,
        on_status: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        """``options``: those of `Options`. ``threads``: of the computation (torch)."""
        if threads is not None:
            torch.set_num_threads(threads)
        self.model = load(source, options.pop("memory", "auto"), on_status=on_status, **options)
        self.plan: planning.Plan = self.model.understudy.plan
        self.checkpoint: Checkpoint = self.model.understudy.anatomy.checkpoint
        self.tokenizer = tokenizer_in(self.checkpoint.path)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.model.understudy.close()

    def start_recording(self) -> None:
        """Keep every `LayerEvent` from now on."""
        self.model.understudy.start_recording()

    def stop_recording(self) -> list[LayerEvent]:
        events: list[LayerEvent] = self.model.understudy.stop_recording()
        return events

    def encode(self, prompt: str | Sequence[int] | Sequence[dict[str, str]]) -> list[int]:
        """Text, token ids or chat messages -> token ids."""
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt).input_ids)
        if prompt and isinstance(prompt[0], dict):
            ids = self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=False
            )
            return list(ids)
        return [int(i) for i in prompt]  # type: ignore[call-overload,arg-type]

    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[dict[str, str]],
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
        """Prompt -> tokens. ``temperature`` 0 is greedy. ``on_text`` gets text as it appears.

        ``dictated``: the tokens to answer with, whatever the model prefers; benchmarks let every
        program continue the same real text.
        """
        ids = self.encode(prompt)
        self._check_length(len(ids), max_new_tokens)
        settings = self._settings(temperature, top_p, stop, ignore_eos, keep_logits)
        settings["max_new_tokens"] = max_new_tokens
        if dictated:
            settings["logits_processor"] = [_Dictation(len(ids), dictated)]
        listener = _Listener(self.tokenizer, on_text, stop, self.model.understudy)
        before = self.model.understudy.counters
        with (
            torch.random.fork_rng(enabled=seed is not None),
            torch.inference_mode(),
            guest.quiet(),
            self._cache() as cache,
        ):
            if seed is not None:
                torch.manual_seed(seed)
            settings |= cache
            batch = torch.tensor([ids], device=self.model.device)
            out = self.model.generate(
                batch, attention_mask=torch.ones_like(batch), streamer=listener, **settings
            )
        tokens = out.sequences[0, len(ids) :].tolist()
        after = self.model.understudy.counters
        return Generation(
            text=_cut(self.tokenizer.decode(tokens, skip_special_tokens=True), stop),
            tokens=tokens,
            prompt_tokens=len(ids),
            token_times=listener.times,
            finish="length" if len(tokens) >= max_new_tokens else "stop",
            counters=after - before,
            decode_counters=after - (listener.after_first or after),
            logits=[step[0].cpu() for step in out.logits] if keep_logits else None,
        )

    @contextmanager
    def _cache(self) -> Iterator[dict[str, Any]]:
        """The KV cache of the captured step, where there is one and no other request has it."""
        step = self.model._captured
        with nullcontext() if step is None else step.lend() as kept:
            # generate would have torch compile whatever has a static cache.
            yield {} if kept is None else {"past_key_values": kept, "disable_compile": True}

    def _check_length(self, prompt: int, new: int) -> None:
        if prompt == 0:
            raise UnderstudyError("the prompt is empty; write something")
        if new < 1:
            raise UnderstudyError(f"--max-new-tokens must be at least 1, not {new}")
        if prompt + new > self.plan.context:
            raise ContextTooLong(
                f"{prompt} prompt tokens and {new} new ones exceed the context of "
                f"{self.plan.context}; shorten them or raise --max-context"
            )

    def _settings(
        self,
        temperature: float,
        top_p: float,
        stop: Sequence[str],
        ignore_eos: bool,
        keep_logits: bool,
    ) -> dict[str, Any]:
        settings: dict[str, Any] = {"do_sample": temperature > 0, "return_dict_in_generate": True}
        if temperature > 0:
            settings |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
        if stop:
            settings |= {"stop_strings": list(stop), "tokenizer": self.tokenizer}
        if ignore_eos:
            settings["eos_token_id"] = None
        if keep_logits:
            settings["output_logits"] = True
        if self.model.generation_config.pad_token_id is None:
            settings["pad_token_id"] = 0  # one sequence: nothing is ever padded
        return settings


def tokenizer_in(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with guest.quiet():
            return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as e:
        reason = " ".join(str(e).split())
        raise UnderstudyError(
            f"{path}: its tokenizer cannot be loaded ({reason[:120]}); "
            "put tokenizer.json beside the weights"
        ) from e


def _cut(text: str, stop: Sequence[str]) -> str:
    """Up to the first stop string."""
    ends = [text.find(s) for s in stop if s in text]
    return text[: min(ends)] if ends else text


def _settled(text: str, stop: Sequence[str]) -> str:
    """Without an ending that may still change: half a character, or half a stop string."""
    if text.endswith("\ufffd"):
        return ""
    for length in range(min(len(text), max(map(len, stop), default=1) - 1), 0, -1):
        if any(s.startswith(text[-length:]) for s in stop):
            return text[:-length]
    return text


class _Dictation:
    """A logits processor that leaves one token to choose from."""

    def __init__(self, start: int, tokens: Sequence[int]) -> None:
        self._start, self._tokens = start, tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = input_ids.shape[1] - self._start
        if place >= len(self._tokens):
            return scores
        scores = torch.full_like(scores, -torch.inf)
        scores[:, self._tokens[place]] = 0.0
        return scores


class _Listener:
    """What `generate` calls with the prompt, then with every token: clock, counters, text."""

    def __init__(
        self,
        tokenizer: Any,
        on_text: Callable[[str], None] | None,
        stop: Sequence[str],
        handle: Handle,
    ) -> None:
        self.times: list[float] = []
        self.after_first: Counters | None = None
        self._tokenizer, self._on_text, self._handle = tokenizer, on_text, handle
        self._stop = stop
        self._tokens: list[int] = []
        self._shown = 0
        self._started = time.perf_counter()
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        self.times.append(time.perf_counter() - self._started)
        if self.after_first is None:
            self.after_first = self._handle.counters
        self._tokens += value.reshape(-1).tolist()
        self._show()

    def end(self) -> None:
        self._show(last=True)

    def _show(self, last: bool = False) -> None:
        if self._on_text is None:
            return
        text = _cut(self._tokenizer.decode(self._tokens, skip_special_tokens=True), self._stop)
        if not last:
            text = _settled(text, self._stop)
        if len(text) > self._shown:
            self._on_text(text[self._shown :])
            self._shown = len(text)
