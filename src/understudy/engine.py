"""Puts the parts together, and turns a prompt into tokens.

Knows: every room below, and how they are wired; nobody else does. Does not know: terminals, HTTP.

    load(source, memory)   checkpoint -> skeleton -> layouts -> plan -> guest + runtime -> model
    Engine(source, ...)    the same with its tokenizer: generate(), streaming, timings, counters
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from understudy import model as guest
from understudy import plan as planning
from understudy.checkpoint import Checkpoint, ExpertsModule
from understudy.core import (
    ContextTooLong,
    Counters,
    ExpertId,
    ExpertLayout,
    LayerEvent,
    UnderstudyError,
)
from understudy.experts.compute import ExpertMlp
from understudy.experts.lookahead import Lookahead
from understudy.experts.runtime import Runtime
from understudy.experts.store import Store, slot_bytes
from understudy.experts.transfer import StoreSource, TransferQueue
from understudy.policies import Predictor
from understudy.policies.director import Director
from understudy.policies.predict import SelfSwitch
from understudy.policies.residency import Residency
from understudy.registry import EVICTORS, PREDICTORS, RESOLVERS, ROUTES, require

DEFAULT_CONTEXT = 4096
PROBE_BYTES = 64 << 20  # read once at the start, to say what speed to expect

Dtype = str | torch.dtype


@dataclass(frozen=True, slots=True)
class Options:
    """Everything a user can choose about a load. The defaults are the recommendation."""

    memory: str | int = "auto"
    max_context: int | None = None
    dtype: Dtype = "auto"
    evictor: str = "lru"
    predictor: str = "next-gate"
    depth: int = 1
    io_threads: int = 4
    prefill_chunk_size: int | None = 512  # None: the whole prompt in one forward
    direct_io: bool = True
    slots: int | None = None  # instead of as many as fit; benchmarks compare equal caches
    self_switch: bool = True  # speculation switches itself off while it loses

    def __post_init__(self) -> None:
        for name in ("depth", "io_threads", "prefill_chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UnderstudyError(f"{name} must be at least 1, not {value}")


# ----------------------------------------------------------------------------- what a model is


@dataclass(frozen=True)
class Anatomy:
    """A checkpoint taken apart without reading its weights."""

    checkpoint: Checkpoint
    bones: Any
    modules: Sequence[ExpertsModule]
    layouts: dict[ExpertId, ExpertLayout]

    @classmethod
    def of(cls, source: str | Path) -> Anatomy:
        checkpoint = Checkpoint.open(source)
        bones = guest.skeleton(checkpoint.config)
        modules = guest.find_experts(bones)
        return cls(checkpoint, bones, modules, checkpoint.layouts(bones, modules))

    @property
    def name(self) -> str:
        return self.checkpoint.path.name

    @property
    def expert_bytes(self) -> int:
        """Bytes of the largest expert."""
        return max(layout.nbytes for layout in self.layouts.values())

    def dtype(self, asked: Dtype) -> torch.dtype:
        """The dtype of the computation; ``auto`` is the one the checkpoint names."""
        if isinstance(asked, torch.dtype):
            return asked
        if asked != "auto":
            found = getattr(torch, _DTYPES.get(asked, asked), None)
            if not isinstance(found, torch.dtype) or not found.is_floating_point:
                raise UnderstudyError(f"unknown dtype {asked!r}; use auto, bfloat16 or float32")
            return found
        config = self.checkpoint.config
        found = getattr(config, "dtype", None) or getattr(guest.text_config(config), "dtype", None)
        return found if isinstance(found, torch.dtype) else torch.float32

    def dense_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of everything that stays resident, in ``dtype``: stored tensors, and buffers that
        the model computes for itself (rotary)."""
        stored = self.checkpoint.dense_bytes(self.bones, self.modules)
        floats = sum(n // _FLOATS[kind] * dtype.itemsize for kind, n in stored.items()
                     if kind in _FLOATS)  # fmt: skip
        others = sum(n for kind, n in stored.items() if kind not in _FLOATS)
        known = self.bones.state_dict()
        made: int = sum(b.nbytes for name, b in self.bones.named_buffers() if name not in known)
        return floats + others + made

    def context(self, asked: int | None) -> int:
        """Tokens to plan for: what was asked, else the smaller of the model's and 4096."""
        longest = guest.longest_context(self.checkpoint.config)
        if asked is None:
            return min(longest or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
        if asked < 1 or (longest is not None and asked > longest):
            raise ContextTooLong(
                f"--max-context {asked} is not possible: {self.name} was made for 1 to {longest} "
                "tokens; ask for less"
            )
        return asked


_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "f32": "float32"}
_FLOATS = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}  # what is cast, and its bytes as stored


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` reports. Bytes are stored bytes; budgets are for the default context."""

    family: str
    architecture: str
    layers: int
    moe_layers: int
    experts_per_layer: int
    top_k: int
    experts: int
    expert_bytes: int
    slot_bytes: int
    dense_bytes: int
    checkpoint_bytes: int
    context: int
    smallest_memory: int
    recommended_memory: int


def inspect(source: str | Path, *, max_context: int | None = None) -> Inspection:
    """Take a checkpoint apart and price it; reads headers only."""
    a = Anatomy.of(source)
    config, text = a.checkpoint.config, guest.text_config(a.checkpoint.config)
    context = a.context(max_context)
    dtype = a.dtype("auto")
    slot = slot_bytes(a.layouts)
    fixed = (
        a.dense_bytes(dtype)
        + guest.kv_cache_estimate(config, context, dtype.itemsize)
        + _activations(a, Options(), context, dtype)
    )
    top_k = guest.experts_per_token(config)
    per_layer = max(m.num_experts for m in a.modules)
    return Inspection(
        family=config.model_type,
        architecture=type(a.bones).__name__,
        layers=int(getattr(text, "num_hidden_layers", len(a.modules))),
        moe_layers=len(a.modules),
        experts_per_layer=per_layer,
        top_k=top_k,
        experts=len(a.layouts),
        expert_bytes=a.expert_bytes,
        slot_bytes=slot,
        dense_bytes=a.dense_bytes(dtype),
        checkpoint_bytes=a.checkpoint.nbytes,
        context=context,
        smallest_memory=fixed + planning.MINIMUM_SLOTS * slot,
        recommended_memory=planning.recommended_bytes(
            fixed, slot, len(a.layouts), len(a.modules), top_k
        ),
    )


def _activations(a: Anatomy, options: Options, context: int, dtype: torch.dtype) -> int:
    """Working memory of one prefill chunk: the residual stream and its copies, the rows gathered
    for experts and their outputs per rank, and one expert's intermediate rows."""
    text = guest.text_config(a.checkpoint.config)
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    k = max(1, guest.experts_per_token(a.checkpoint.config))
    width = max(max(shape[1:]) for m in a.modules for shape in m.params.values())
    per_token = (12 + 2 * k) * hidden + 3 * width
    tokens = min(options.prefill_chunk_size or context, context)
    return tokens * per_token * max(4, dtype.itemsize)


# ----------------------------------------------------------------------------------- loading


class Handle:
    """``model.understudy``: what the engine shows of itself, and `close`."""

    def __init__(
        self, runtime: Runtime, plan: planning.Plan, options: Options, anatomy: Anatomy
    ) -> None:
        self.runtime, self.plan, self.options, self.anatomy = runtime, plan, options, anatomy
        self.closed = False

    @property
    def counters(self) -> Counters:
        """Everything counted since the load; subtract two snapshots."""
        return self.runtime.counters

    @property
    def policies(self) -> dict[str, Any]:
        """Names of the policies, whether speculation is on now, what look-ahead cannot see, and
        what was given up on this model or disk (chunked prefill, direct I/O)."""
        o = self.options
        return {
            "evictor": o.evictor,
            "predictor": o.predictor,
            "depth": o.depth,
            "speculating": self.runtime.director.switch.on,
            "lookahead_unavailable": dict(self.runtime.lookahead.unavailable),
            "direct_io": self.runtime.store.disk.direct,
            "prefill_chunk_size": o.prefill_chunk_size,
        }

    @property
    def bandwidth(self) -> float:
        """Bytes per second the link has achieved while busy."""
        return self.runtime.transfer.meter.bandwidth

    def start_recording(self) -> None:
        self.runtime.recording = []

    def stop_recording(self) -> list[LayerEvent]:
        events, self.runtime.recording = self.runtime.recording or [], None
        return events

    def close(self) -> None:
        """Stop the workers, close the files, give the slots back. Harmless when repeated."""
        if not self.closed:
            self.closed = True
            self.runtime.close()


def load(
    source: str | Path, memory: str | int = "auto", *, on_status: Any = None, **options: Any
) -> Any:
    """Load a Mixture-of-Experts checkpoint inside a memory budget.

    ``source``: a local folder or a hub id. ``memory``: "8GiB", "50%" of the checkpoint, "auto", or
    bytes; it covers dense weights, expert slots, KV cache and working memory. Further options are
    those of `Options`. Returns a genuine `PreTrainedModel` (also a context manager) that carries
    ``model.understudy``. Raises `UnderstudyError` and its children, one line each.
    """
    chosen = Options(memory=memory, **options)
    say = on_status or (lambda line: None)
    require(chosen.evictor, chosen.predictor)
    anatomy = Anatomy.of(source)
    dtype = anatomy.dtype(chosen.dtype)
    total = planning.parse_memory(chosen.memory, anatomy.checkpoint.nbytes)
    context = anatomy.context(chosen.max_context)
    estimate = guest.kv_cache_estimate(anatomy.checkpoint.config, context, dtype.itemsize)
    _fit(anatomy, chosen, total, anatomy.dense_bytes(dtype), estimate, context, dtype)
    model = guest.load_guest(
        anatomy.checkpoint.path, anatomy.checkpoint.config, anatomy.bones, dtype
    )
    kv = guest.kv_cache_bytes(model, context)
    if not guest.chunks_prefill(model):
        chosen = replace(chosen, prefill_chunk_size=None)
    plan = _fit(anatomy, chosen, total, _resident_bytes(model), kv, context, dtype)
    plan = _expect(plan, anatomy, chosen)
    say(plan.line())
    runtime = _assemble(anatomy, chosen, plan, model)
    guest.attach(model, runtime, anatomy.modules)
    model.understudy = Handle(runtime, plan, chosen, anatomy)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.prefill_chunk_size = chosen.prefill_chunk_size
    return model


def _resident_bytes(model: Any) -> int:
    """Parameters and buffers, tied ones once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def _fit(
    a: Anatomy, o: Options, total: int, dense: int, kv: int, context: int, dtype: torch.dtype
) -> planning.Plan:
    return planning.fit(
        total,
        dense=dense,
        kv=kv,
        activations=_activations(a, o, context, dtype),
        slot_bytes=slot_bytes(a.layouts),
        experts=len(a.layouts),
        context=context,
        expert_bytes=a.expert_bytes,
        predictors=_predictor(a, o).nbytes,
        slots=o.slots,
        name=a.name,
    )


def _expect(plan: planning.Plan, a: Anatomy, o: Options) -> planning.Plan:
    """Write the expected speed on the plan, from one short read of the first file."""
    largest = max(a.checkpoint.files, key=lambda f: f.stat().st_size)
    bandwidth = planning.disk_bandwidth(
        largest, o.io_threads, 2 << 20, PROBE_BYTES, direct=o.direct_io
    )
    top_k = guest.experts_per_token(a.checkpoint.config)
    if not bandwidth or not top_k:
        return plan
    return plan.expecting(
        planning.expected_tokens_per_second(plan, len(a.modules), top_k, bandwidth)
    )


def _predictor(a: Anatomy, o: Options) -> Predictor:
    experts = [m.num_experts for m in a.modules]
    found: Predictor = PREDICTORS.get(o.predictor)(
        layers=len(experts), experts=experts, depth=o.depth
    )
    return found


def _assemble(a: Anatomy, o: Options, plan: planning.Plan, model: Any) -> Runtime:
    """Wire minds and hands: the one place that knows them all."""
    lock = threading.Condition()
    book = Residency(plan.slots)
    store = Store(a.checkpoint.files, a.layouts, plan.slots, direct=o.direct_io)
    speculate = o.predictor != "none" and plan.slots < plan.experts
    director = Director(
        book,
        evictor=EVICTORS.get(o.evictor)(slots=plan.slots, layers=len(a.modules)),
        predictor=_predictor(a, o),
        resolver=RESOLVERS.get("fetch")(),
        route=ROUTES.get("as-routed")(),
        switch=SelfSwitch(enabled=speculate, adaptive=o.self_switch),
        nbytes=store.nbytes,
    )
    transfer = TransferQueue(
        book,
        StoreSource(store),
        lock=lock,
        place=director.place,
        forget=director.forget,
        threads=o.io_threads,
    )
    return Runtime(
        director=director,
        store=store,
        transfer=transfer,
        lock=lock,
        mlps=[ExpertMlp(module) for module in guest.guests(model)],
        lookahead=Lookahead(guest.routers(model, a.modules)),
    )


# ------------------------------------------------------------------------------------ generating


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
        source: str | Path,
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
        self.tokenizer = _tokenizer(self.checkpoint.path)

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
    ) -> Generation:
        """Prompt -> tokens. ``temperature`` 0 is greedy. ``on_text`` gets text as it appears."""
        ids = self.encode(prompt)
        self._check_length(len(ids), max_new_tokens)
        settings = self._settings(temperature, top_p, stop, ignore_eos, keep_logits)
        settings["max_new_tokens"] = max_new_tokens
        listener = _Listener(self.tokenizer, on_text, stop, self.model.understudy)
        before = self.model.understudy.counters
        with torch.random.fork_rng(enabled=seed is not None), torch.inference_mode(), guest.quiet():
            if seed is not None:
                torch.manual_seed(seed)
            batch = torch.tensor([ids])
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
            logits=[step[0] for step in out.logits] if keep_logits else None,
        )

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


def _tokenizer(path: Path) -> Any:
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
