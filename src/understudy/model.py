"""The guest in transformers: a model loaded without its experts, with a seam where they were.

Knows: transformers' loading, its Experts modules, routers and hooks. Does not know: where experts
come from, budgets, policies. It is *given* the seam, and calls it.

    skeleton(config)         the model on the meta device, to read shapes and names from
    load_guest(...)          the real one: dense weights loaded, experts never materialised
    attach(guest, seam)      from now on its Experts modules ask the seam

Traps, all tried: classes are exchanged for all of the process, under a lock and until `finally`;
a hand-made build on meta loses non-persistent buffers (rotary), so loading is left to
`from_pretrained`; a guest that is saved and reloaded would get random experts, so saving is
refused.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, Protocol

import torch
import transformers
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import logging as transformers_logging

from understudy.checkpoint import ExpertsModule
from understudy.core import (
    CheckpointError,
    ContextTooLong,
    Forward,
    NotInThisModel,
    Phase,
    UnsupportedFamily,
    current_forward,
)

IMPLEMENTATION = "understudy"  # our name in transformers' ExpertsInterface
_loading = threading.Lock()


class Seam(Protocol):
    """What a guest calls. `understudy.experts.runtime.Runtime` is one."""

    def __call__(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor: ...
    def begin(self, forward: Forward) -> None: ...
    def end(self, forward: Forward) -> None: ...


class Captured(Protocol):
    """What may stand before a guest's forward. `understudy.captured.Step` is one."""

    def applies(self, kwargs: Mapping[str, Any]) -> bool: ...
    def __call__(self, kwargs: Mapping[str, Any]) -> Any: ...


# ------------------------------------------------------------------------------- the skeleton


def architecture(config: Any) -> type[Any]:
    """The class of transformers that the checkpoint was saved from."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type):
            return found
    mapping = transformers.AutoModelForCausalLM._model_mapping
    try:
        return mapping[type(config)]  # type: ignore[no-any-return]
    except KeyError:
        raise UnsupportedFamily(
            f"transformers {transformers.__version__} has no model class for "
            f"{config.architectures or config.model_type}; update transformers"
        ) from None


def skeleton(config: Any) -> nn.Module:
    """The model with every tensor on the meta device: names and shapes, no bytes."""
    cls = architecture(config)
    with quiet(), torch.device("meta"):
        return cls(config)  # type: ignore[no-any-return]


def find_experts(model: Any) -> list[ExpertsModule]:
    """The Experts modules of a skeleton that use transformers' experts interface, in order."""
    found: list[ExpertsModule] = []
    for name, module in model.named_modules():
        if _has_interface(module):
            shapes = {n: tuple(p.shape) for n, p in _expert_params(module).items()}
            num = next(iter(shapes.values()))[0]
            found.append(ExpertsModule(name, len(found), num, shapes, bool(module.is_transposed)))
    if not found:
        family = getattr(model.config, "model_type", type(model).__name__)
        raise UnsupportedFamily(
            f"{family} has no Experts module on transformers' experts interface: not a "
            "Mixture-of-Experts, or not a supported one; see `understudy families`"
        )
    return found


def _has_interface(module: nn.Module) -> bool:
    return hasattr(module, "is_concatenated") and hasattr(module, "_apply_gate")


def _expert_params(module: Any) -> dict[str, nn.Parameter]:
    """The parameters with one slice per expert; anything else a family adds stays dense."""
    own = dict(module.named_parameters(recurse=False))
    num = int(module.num_experts)
    return {n: p for n, p in own.items() if p.ndim >= 2 and p.shape[0] == num}


# ----------------------------------------------------------------------------------- loading


def _initialised() -> torch.Tensor:
    """Stands where an expert parameter was: transformers' `_init_weights` reaches for it, here or
    from the parent, and leaves alone what carries this flag."""
    nothing = torch.empty(0)
    nothing._is_hf_initialized = True  # type: ignore[attr-defined]
    return nothing


def _guest_class(original: type[Any]) -> type[Any]:
    """The same Experts class without its expert parameters."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original.__init__(self, *args, **kwargs)
        for name in _expert_params(self):
            del self._parameters[name]
            setattr(self, name, _initialised())
        self.seam = None
        self.moe_layer = -1

    members = {"__init__": __init__, "__module__": original.__module__, "is_guest": True}
    return type(original.__name__, (original,), members)


def _ask_seam(
    module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """What transformers' ExpertsInterface calls. Without a seam (while the engine measures the KV
    cache) experts contribute nothing."""
    if module.seam is None:
        return torch.zeros_like(hidden)
    return module.seam(module.moe_layer, hidden, ids, weights)  # type: ignore[no-any-return]


ExpertsInterface.register(IMPLEMENTATION, _ask_seam)
assert IMPLEMENTATION in ALL_EXPERTS_FUNCTIONS


@contextmanager
def _without_experts(bones: nn.Module) -> Iterator[None]:
    """While inside, `from_pretrained` builds guests. Process-wide, hence the lock.

    ``bones``: a skeleton with its experts, to see which classes are concerned.
    """
    originals = {type(m) for m in bones.modules() if _has_interface(m)}
    ties = list(_ties_between_experts(bones))
    with _loading:
        places = [place for original in originals for place in _names_of(original)]
        guests = {original: _guest_class(original) for original in originals}
        for module, name, original in places:
            setattr(module, name, guests[original])
        for cls, _, without in ties:
            cls._tied_weights_keys = without
        try:
            yield
        finally:
            for module, name, original in places:
                setattr(module, name, original)
            for cls, known, _ in ties:
                cls._tied_weights_keys = known


def _names_of(cls: type[Any]) -> Iterator[tuple[ModuleType, str, type[Any]]]:
    """Where a model's code finds ``cls``: its own module, and whoever imported it from there.
    transformers' `register_patch_mapping` does this too, but asks its lazy modules for all they
    could import: 0.2 s per load, twice."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and vars(module).get(cls.__name__) is cls:
            yield module, cls.__name__, cls


def _ties_between_experts(bones: nn.Module) -> Iterator[tuple[Any, Any, dict[str, str]]]:
    """(class, its tied weights, the same without ties between experts): an encoder may share its
    experts with a decoder, and transformers would look for the parameters that are gone."""
    for module in bones.modules():
        ties = vars(type(module)).get("_tied_weights_keys")
        if not isinstance(ties, Mapping):
            continue
        gone = {f"{n}.{p}" for n, m in module.named_modules() if _has_interface(m)
                for p in _expert_params(m)}  # fmt: skip
        dense = [n for n, _ in module.named_parameters(remove_duplicate=False) if n not in gone]
        kept = {
            target: source
            for target, source in ties.items()
            if any(re.search(f"^{target}", n) for n in dense)
            or not any(re.search(f"^{target}", n) for n in gone)
        }
        if len(kept) < len(ties):
            yield type(module), ties, kept


@contextmanager
def quiet() -> Iterator[None]:
    """transformers reports the experts as unexpected keys and draws bars; both would mislead."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load_guest(
    path: Path,
    config: Any,
    bones: nn.Module,
    dtype: Any = "auto",
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Any:
    """Load the dense weights through `from_pretrained`. ``bones``: the skeleton, for classes;
    ``weights``: instead of those in the files."""
    with quiet(), _without_experts(bones):
        model, report = architecture(config).from_pretrained(
            path if weights is None else None,
            config=config,
            dtype=dtype,
            state_dict=weights,
            local_files_only=True,
            output_loading_info=True,
        )
        if weights is not None and model.can_generate():
            _read_generation_config(model, path)
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} dense tensors are missing, {missing[0]} first; "
            "download the checkpoint again"
        )
    for module in guests(model):  # have transformers dispatch their forward to us
        module.config._experts_implementation_internal = IMPLEMENTATION
    _take_home(model)
    return _make_lodger(model.eval().requires_grad_(False))


def _read_generation_config(model: Any, path: Path) -> None:
    """What `from_pretrained` reads beside the weights, where it was given the weights."""
    if (path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)


def _take_home(model: nn.Module) -> None:
    """Copy the dense weights out of the files that `from_pretrained` maps them from: a mapped file
    that is cut ends the process (SIGBUS), one that is overwritten changes the weights unnoticed,
    and the kernel may drop mapped pages although the budget has paid for them."""
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        key = tensor.data_ptr(), tensor.shape  # tied ones stay one
        if key not in copies:
            copies[key] = tensor.detach().clone()
        tensor.data = copies[key]


# ------------------------------------------------------------------------- the model as a guest


class Lodger:
    """Mixed into the model's class: what a model without its own experts can and cannot do.

    ``understudy`` is put there by the engine: counters, plan, policies, close().
    """

    understudy: Any
    _announce: Callable[[Any, Any], AbstractContextManager[None]] | None = None
    _captured: Captured | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass. Not by hooks: torch leaves them out after a KeyboardInterrupt or the end
        of a fiber, and the next forward would believe to be inside this one."""
        if self._announce is None:
            return self._run(args, kwargs)
        self._check_context(kwargs)
        with self._announce(args, kwargs):
            return self._run(args, kwargs)

    def _run(self, args: Any, kwargs: Mapping[str, Any]) -> Any:
        step = self._captured
        if step is not None and not args and step.applies(kwargs):
            return step(kwargs)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def create_masks_for_generate(self, **kwargs: Any) -> Any:
        """What `generate` prepares before every forward, and the cache of a captured step does
        without: the forward makes them, on the device."""
        unpadded = kwargs["attention_mask"] is None and kwargs["inputs_embeds"].shape[1] == 1
        if unpadded and getattr(kwargs["past_key_values"], "makes_masks", False):
            return None
        theirs = getattr(super(), "create_masks_for_generate", create_masks_for_generate)
        return theirs(**kwargs)

    def _check_context(self, kwargs: Mapping[str, Any]) -> None:
        """The KV cache is part of the budget: it may not outgrow what was planned for."""
        cache: Any = kwargs.get("past_key_values")
        tokens = kwargs.get("input_ids")
        if tokens is None or not hasattr(cache, "get_seq_length"):
            return
        held = getattr(cache, "tokens", None)  # of a captured step: asking the device takes time
        if held is None:
            held = cache.get_seq_length()
        asked, planned = held + tokens.shape[-1], self.understudy.plan.context
        if asked > planned:
            raise ContextTooLong(
                f"{asked} tokens exceed the context of {planned} that memory was planned for; "
                "load the model with a larger max_context"
            )

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        self.understudy.close()

    def _refuse(self, what: str) -> NoReturn:
        raise NotInThisModel(
            f"{what} is not possible: the experts of this model stay on disk; "
            "load it with transformers' from_pretrained for that"
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("save_pretrained")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("push_to_hub")

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("state_dict")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("load_state_dict")

    def train(self, mode: bool = True) -> Any:
        if mode:
            self._refuse("training")
        return super().train(mode)  # type: ignore[misc]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype not in (None, self.dtype):  # type: ignore[attr-defined]
            self._refuse(f"to({dtype})")
        if device is not None and device.type != "cpu":
            self._refuse(f"to({device})")
        return self

    def half(self, *args: Any) -> NoReturn:
        self._refuse("half()")

    def float(self, *args: Any) -> NoReturn:
        self._refuse("float()")

    def bfloat16(self, *args: Any) -> NoReturn:
        self._refuse("bfloat16()")

    def double(self, *args: Any) -> NoReturn:
        self._refuse("double()")


def _make_lodger(model: Any) -> Any:
    """The instance changes class, its name stays: pipelines and lm-eval look at names."""
    cls = type(model)
    members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    model.__class__ = type(cls.__name__, (Lodger, cls), members)
    return model


def guests(model: nn.Module) -> list[Any]:
    """The Experts modules of a loaded guest, in the order of `find_experts`."""
    return [m for m in model.modules() if getattr(m, "is_guest", False)]


def routers(model: nn.Module, experts: Sequence[ExpertsModule]) -> list[nn.Module | None]:
    """For each Experts module the router beside it, or ``None``."""
    found: list[nn.Module | None] = []
    for e in experts:
        parent = model.get_submodule(e.name.rpartition(".")[0])
        router = getattr(parent, "router", None) or getattr(parent, "gate", None)
        found.append(router if isinstance(router, nn.Module) else None)
    return found


def shared_experts(model: nn.Module, experts: Sequence[ExpertsModule]) -> list[Any]:
    """For each Experts module a function of the router's input that answers what the shared experts
    beside it add, or ``None``."""
    return [_shared(model.get_submodule(e.name.rpartition(".")[0])) for e in experts]


def _shared(block: Any) -> Any:
    shared = getattr(block, "shared_experts", None) or getattr(block, "shared_expert", None)
    gate = getattr(block, "shared_expert_gate", None)
    if not isinstance(shared, nn.Module):
        return None
    if isinstance(gate, nn.Module):
        return lambda x: torch.sigmoid(gate.forward(x)) * shared.forward(x)
    return shared.forward


@contextmanager
def without_experts(model: Any) -> Iterator[None]:
    """Meanwhile the experts add nothing, and the seam hears of nothing: for rehearsals, where a
    model's other parts are what is tried."""
    modules, announce = guests(model), model._announce
    seams = [module.seam for module in modules]
    model._announce = None
    for module in modules:
        module.seam = _nobody
    try:
        yield
    finally:
        model._announce = announce
        for module, seam in zip(modules, seams, strict=True):
            module.seam = seam


def _nobody(layer: int, hidden: torch.Tensor, ids: Any, weights: Any) -> torch.Tensor:
    return torch.zeros_like(hidden)


def attach(
    model: Any, seam: Seam, experts: Sequence[ExpertsModule], *, residuals: bool = False
) -> None:
    """Connect every Experts module to ``seam``, and tell the seam about every forward.

    ``residuals``: keep the residual stream in front of each router too (`Forward.residuals`)."""
    if residuals:
        watch_residuals(model, experts)
    for layer, module in enumerate(guests(model)):
        module.seam, module.moe_layer = seam, layer
    for layer, router in enumerate(routers(model, experts)):
        if router is not None:
            router.register_forward_pre_hook(_capture(layer), with_kwargs=True)
    model._announce = announcer(seam)


def _capture(layer: int) -> Callable[..., None]:
    """Keep what a router was called with: later routers are asked the same question. Not the input
    of the Experts module: some families feed experts something else."""

    def hook(router: nn.Module, args: Any, kwargs: Any) -> None:
        forward = current_forward.get()
        if forward is not None:
            forward.router_args = {layer: (args, kwargs)}

    return hook


def watch_residuals(model: nn.Module, experts: Sequence[ExpertsModule]) -> None:
    """From now on every forward knows the residual stream in front of each router, and its norm:
    the norm of the decoder layer whose output is what the router reads."""
    for layer, router in enumerate(routers(model, experts)):
        if router is None:
            continue
        calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
        for norm in _norms_beside(model, experts[layer].name):
            norm.register_forward_hook(lambda m, args, out, c=calls: c.append((m, args[0], out)))
        router.register_forward_pre_hook(_capture_residual(layer, calls))


def _norms_beside(model: nn.Module, name: str) -> list[nn.Module]:
    """The norms among the children of the decoder layer that holds module ``name``."""
    while name:
        name, _, last = name.rpartition(".")
        if last.isdigit():
            layer = model.get_submodule(f"{name}.{last}")
            return [m for m in layer.children() if "norm" in type(m).__name__.lower()]
    return []


def _capture_residual(layer: int, calls: list[Any]) -> Callable[..., None]:
    def hook(router: nn.Module, args: Any) -> None:
        forward = current_forward.get()
        if forward is not None and args:
            mine = [c for c in calls if c[2].data_ptr() == args[0].data_ptr()]
            forward.residuals = {layer: mine[-1][:2]} if mine else {}
        calls.clear()

    return hook


def announcer(seam: Seam) -> Callable[[Any, Any], AbstractContextManager[None]]:
    """Around every forward: `current_forward` is set, and the seam told of its begin and end."""
    steps = iter(range(1 << 62))

    @contextmanager
    def announce(args: Any, kwargs: Any) -> Iterator[None]:
        forward = _describe(next(steps), args, kwargs)
        forward.outer = current_forward.get()
        current_forward.set(forward)
        seam.begin(forward)
        try:
            yield
        finally:
            current_forward.set(forward.outer)
            seam.end(forward)

    return announce


def _describe(step: int, args: Any, kwargs: Mapping[str, Any]) -> Forward:
    """Phase, requests and padding of one forward, from its arguments."""
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None and args and isinstance(args[0], torch.Tensor):
        tokens = args[0]
    if tokens is None or tokens.ndim < 2:
        return Forward(step, Phase.PREFILL)
    if kwargs.get("cu_seq_lens_q") is not None:
        return _describe_packed(step, kwargs["cu_seq_lens_q"].tolist())
    batch, length = tokens.shape[:2]
    phase = Phase.DECODE if length == 1 else Phase.PREFILL
    rows = _real(kwargs.get("attention_mask"), batch, length)
    requests = [r for r in range(batch) for _ in range(length)]
    if rows is not None:
        requests = [r for r, real in zip(requests, rows.tolist(), strict=True) if real]
    return Forward(step, phase, rows=rows, requests=requests)


def _describe_packed(step: int, ends: Sequence[int]) -> Forward:
    """Sequences that lie one behind the other in one row, as transformers packs them; ``ends``:
    where each begins, and where the last one ends."""
    lengths = [end - start for start, end in pairwise(ends)]
    phase = Phase.DECODE if max(lengths) == 1 else Phase.PREFILL
    return Forward(step, phase, requests=[r for r, n in enumerate(lengths) for _ in range(n)])


def _real(mask: Any, batch: int, length: int) -> torch.Tensor | None:
    """Which rows of the flattened batch are tokens, from a 2-D attention mask."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[0] != batch:
        return None
    rows = mask[:, -length:].reshape(-1).bool()
    return None if len(rows) != batch * length or bool(rows.all()) else rows


# -------------------------------------------------------------------------------- the KV cache


def text_config(config: Any) -> Any:
    """The part of a composite configuration that speaks about the language model."""
    return config.get_text_config(decoder=True)


def kv_cache_estimate(config: Any, context: int, itemsize: int) -> int:
    """What `kv_cost` measures, from the configuration alone: exact for ordinary attention,
    too much for sliding windows and linear attention."""
    return sum(_kv_numbers(layer, repeated=False) for layer in _layers(config)) * itemsize * context


def repeated_kv_bytes(config: Any, context: int, itemsize: int) -> int:
    """Keys and values of one layer, repeated for every head as attention may need them."""
    numbers = (_kv_numbers(layer, repeated=True) for layer in _layers(config))
    return max(numbers, default=0) * itemsize * context


def _layers(config: Any) -> list[Any]:
    """One configuration per layer; most families have the same for all."""
    c = text_config(config)
    different = list(getattr(c, "per_layer_config", None) or ())
    return different or [c] * (getattr(c, "num_hidden_layers", 0) or 0)


def _kv_numbers(layer: Any, *, repeated: bool) -> int:
    """Numbers that one attention layer keeps per token."""
    heads = getattr(layer, "num_attention_heads", 0) or 0
    head_dim = getattr(layer, "head_dim", None) or (layer.hidden_size // heads if heads else 0)
    kept = None if repeated else getattr(layer, "num_key_value_heads", None)
    return int(2 * head_dim * (kept or heads))


def longest_context(config: Any) -> int | None:
    """Tokens the model was made for; ``None`` where it does not say."""
    found = getattr(text_config(config), "max_position_embeddings", None)
    return int(found) if isinstance(found, int) and found > 0 else None


def experts_per_token(config: Any) -> int:
    """The router's k, under whatever name the family gives it; 0 where it does not say."""
    c = text_config(config)
    for name in ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "top_k"):
        found = getattr(c, name, None)
        if isinstance(found, list | tuple) and found:
            return int(max(found))
        if isinstance(found, int) and not isinstance(found, bool):
            return found
    return 0


@dataclass(frozen=True, slots=True)
class KvCost:
    """Bytes that one sequence keeps between steps: ``per_row`` whatever its length (states of
    recurrent layers), and ``per_token``."""

    per_row: int
    per_token: float

    def of(self, tokens: int) -> int:
        return int(self.per_row + self.per_token * tokens)

    def rows_in_tokens(self, context: int) -> int:
        """Tokens' worth of a row with nothing in it, where a token costs what one of ``context``
        tokens does."""
        whole = self.of(context)
        return -(-self.per_row * context // whole) if whole else 0


def kv_cost(model: Any) -> KvCost:
    """Measured on two short forwards of the guest without experts; beyond them it is extrapolated
    (a sliding window makes it smaller)."""
    with quiet():
        short, long = (_cache_after(model, n) for n in (4, 12))
    per_token = max(0, long - short) / 8
    return KvCost(max(0, int(short - 4 * per_token)), per_token)


def chunks_prefill(model: Any) -> bool:
    """Whether transformers' chunked prefill gives this model the answer of a whole one. Tried on
    a short prompt: some families refuse it, and state-space layers silently lose their state."""
    if not model.can_generate():
        return False
    ids = torch.arange(1, 13).unsqueeze(0)
    with quiet(), torch.no_grad(), torch.random.fork_rng():
        try:
            whole, chunked = (_first_logits(model, ids, chunk) for chunk in (None, 5))
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
    # Rounding aside: a lost state changes logits by the order of their size.
    return bool((whole - chunked).abs().max() <= 0.05 * whole.abs().max())


def _first_logits(model: Any, ids: torch.Tensor, chunk: int | None) -> torch.Tensor:
    torch.manual_seed(0)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        prefill_chunk_size=chunk,
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    first: torch.Tensor = out.logits[0].float()
    return first


def _cache_after(model: Any, tokens: int) -> int:
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with torch.no_grad():
        try:
            out = model(input_ids=ids, use_cache=True)
        except (TypeError, ValueError, RuntimeError):
            return 0  # no text-only forward with a cache: nothing is kept between steps
    return sum(t.nbytes for t in _tensors(getattr(out, "past_key_values", None), set()))


def _tensors(thing: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(thing) in seen or isinstance(thing, str | int | float | torch.dtype | torch.device):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        for value in thing.values():
            yield from _tensors(value, seen)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from _tensors(value, seen)
    elif hasattr(thing, "__dict__") and not isinstance(thing, type | nn.Module):
        yield from _tensors(vars(thing), seen)
