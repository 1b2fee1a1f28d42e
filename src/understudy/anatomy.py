"""What a checkpoint is and what a user asked for: a model taken apart without reading its weights.

Knows: configurations, headers, the skeleton; the options of a load. Does not know: how parts are
put together (`assembly`), or how a model runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from understudy import dense, formats
from understudy import model as guest
from understudy import plan as planning
from understudy.checkpoint import Checkpoint, ExpertsModule
from understudy.core import STORED, ContextTooLong, ExpertId, ExpertLayout, UnderstudyError
from understudy.experts import kernels
from understudy.experts.store import slot_bytes

DEFAULT_CONTEXT = 4096
DECODES = ("auto", "host", "device")

Dtype = str | torch.dtype


@dataclass(frozen=True, slots=True)
class Options:
    """Everything a user can choose about a load. The defaults are the recommendation."""

    memory: str | int = "auto"
    max_context: int | None = None
    dtype: Dtype = "auto"
    evictor: str = "lrfu"
    predictor: str = "next-gate"
    depth: int = 1
    io_threads: int = 4
    frame: str = "auto"  # compiled or eager decoder layers; auto: see `COMPILE_PARAMETERS`
    kernel: str = "auto"  # for few tokens: auto, torch, native:N; on a device: auto, triton, torch
    prefill_chunk_size: int | None = 512  # None: the whole prompt in one forward
    direct_io: bool = True
    # Instead of as many as fit; benchmarks compare equal caches. "50%" of all experts; "2k": two
    # layers' worth of one token's experts, k being how many a token uses.
    slots: int | str | None = None
    self_switch: bool = True  # speculation switches itself off while it loses
    route: str = "as-routed"  # who runs; everything else but as-routed is lossy
    resolver: str = "fetch"  # what is done about a miss
    profile: str | Path | None = None  # what was learned offline (`understudy profile`)
    seed: int = 0  # of the policies that draw
    # Where experts are computed: cpu, or an accelerator ("cuda", "cuda:1"). With one,
    # ``device_memory`` is the budget of everything on it, and ``memory`` that of the experts'
    # host copies.
    device: str = "cpu"
    device_memory: str | int = "auto"
    decode: str = "auto"  # who fetches between tokens: the host, the device; auto: measured
    # Sequences that may run at once over one KV cache, each of up to ``max_context`` tokens, and
    # the bytes of that cache ("25%" of the checkpoint); auto: see `plan.kv_budget`.
    sequences: int = 1
    kv_memory: str | int = "auto"

    def __post_init__(self) -> None:
        if self.device == "cpu":
            kernels.parse(self.kernel)
        if self.frame not in ("auto", "compiled", "eager"):
            raise UnderstudyError(f"unknown frame {self.frame!r}; use auto, compiled or eager")
        if self.decode not in DECODES:
            raise UnderstudyError(f"unknown --decode {self.decode!r}; use {', '.join(DECODES)}")
        for name in ("depth", "io_threads", "prefill_chunk_size", "sequences"):
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
    def lossy(self) -> bool:
        """Whether the experts are in a format that has lost something."""
        return not formats.is_exact(self.checkpoint.format)

    @property
    def delta_nll(self) -> float | None:
        """Nats per token that the format was measured to cost; ``None``: nothing, or unmeasured."""
        manifest = self.checkpoint.manifest
        quality = manifest.quality if manifest is not None else None
        return float(quality["delta_nll"]) if quality else None

    def format_in_words(self) -> str:
        """For the plan: what the experts are in, where that is not plain numbers."""
        name = self.checkpoint.format
        if name == STORED:
            return ""
        if not self.lossy:
            return f"experts in {name}, as stored"
        delta = self.delta_nll
        known = "unmeasured" if delta is None else f"delta NLL {delta:+.4f} per token when packed"
        return f"experts in {name}: LOSSY, {known}"

    @property
    def expert_bytes(self) -> int:
        """Bytes of the largest expert."""
        return max(layout.nbytes for layout in self.layouts.values())

    def layout_of(self, layer: int) -> ExpertLayout:
        """How the experts of a MoE layer lie: that of any of them, but for where."""
        return next(found for expert, found in self.layouts.items() if expert.layer == layer)

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

    def unpacked_dense(self, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """The dense weights, where transformers could not read them as they are stored."""
        parts = self.checkpoint, self.bones, self.modules
        return dense.weights(*parts, dtype) if dense.is_quantised(*parts) else None

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
    format: str
    lossy: bool
    delta_nll: float | None


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
        + activations(a, Options(), context, dtype)
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
        format=a.checkpoint.format,
        lossy=a.lossy,
        delta_nll=a.delta_nll,
    )


def activations(
    a: Anatomy, options: Options, context: int, dtype: torch.dtype, scored: int = 0
) -> int:
    """Working memory of one prefill chunk: the residual stream and its copies, the rows gathered
    for experts and their outputs per rank, and the intermediate rows of one expert; on a device,
    where all are computed in one launch, those of all ranks, and keys and values of the whole
    context for every head: a recorded step's cache is as long as that from the start. ``scored``:
    positions of prompts whose logits a step of many sequences may have."""
    text = guest.text_config(a.checkpoint.config)
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    k = max(1, guest.experts_per_token(a.checkpoint.config))
    width = max(max(shape[1:]) for m in a.modules for shape in m.params.values())
    on_device = options.device != "cpu"
    per_token = (12 + 2 * k) * hidden + 3 * (k if on_device else 1) * width
    config = a.checkpoint.config
    whole = guest.repeated_kv_bytes(config, context, dtype.itemsize) if on_device else 0
    tokens = min(options.prefill_chunk_size or context, context)
    working = tokens * per_token * max(4, dtype.itemsize) + whole + _unpacking(a, dtype)
    return working + _sampling(a, options, min(tokens, scored))


def _sampling(a: Anatomy, options: Options, scored: int) -> int:
    """Working memory of picking tokens for many sequences at once: their logits in float32, as the
    model made them and as a few processors change them; or those of ``scored`` positions of a
    prompt, as the model made them, in float32, and once more while they are read."""
    if options.sequences == 1:
        return 0
    return 4 * vocabulary(a) * max(4 * options.sequences, 3 * scored)


def vocabulary(a: Anatomy) -> int:
    return int(getattr(guest.text_config(a.checkpoint.config), "vocab_size", 0) or 0)


def _unpacking(a: Anatomy, dtype: torch.dtype) -> int:
    """Working memory in which the largest matrix of a quantised expert is unpacked: its numbers
    in ``dtype``, and twice in the precision they are worked out in."""
    if a.checkpoint.format == STORED:
        return 0
    largest = max(prod(s[1:]) for m in a.modules for s in m.params.values())
    return largest * (dtype.itemsize + 2 * formats.wide_enough(dtype).itemsize)


def expert_parameters(a: Anatomy) -> int:
    return sum(prod(shape) for module in a.modules for shape in module.params.values())


def slots_asked(a: Anatomy, o: Options) -> int | None:
    if not isinstance(o.slots, str):
        return o.slots
    k = guest.experts_per_token(a.checkpoint.config)
    times = {"%": len(a.layouts) / 100, "k": k}.get(o.slots[-1:], 1)
    try:
        slots = int(float(o.slots.rstrip("%k")) * times)
    except ValueError:
        slots = 0
    if slots < 1:
        raise UnderstudyError(
            f"--slots {o.slots!r} means nothing here; use a number, 50% of all experts, or 2k for "
            f"{2 * k}"
        )
    return max(planning.MINIMUM_SLOTS, slots)


def fingerprint(a: Anatomy, model: Any) -> str:
    """Of what a profile depends on: the routers, and the shapes of the experts."""
    digest = hashlib.sha256(repr([(m.num_experts, dict(m.params)) for m in a.modules]).encode())
    for router in guest.routers(model, a.modules):
        for tensor in () if router is None else (*router.parameters(), *router.buffers()):
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
