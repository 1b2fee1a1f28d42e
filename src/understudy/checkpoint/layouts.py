"""From tensor names in files to the byte ranges of every expert.

Knows: transformers' conversion rules (which it runs, see `strided`) and what an Experts module
calls its parameters. Does not know: any model family by name, nor how bytes are read.

The steps are those of transformers' own loader, with addresses in place of weights: rename each
checkpoint key, collect keys per target parameter, run the converter's operations, then cut the
result into experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType
from typing import Any

import torch

from understudy.checkpoint.files import BITS, TensorInfo
from understudy.checkpoint.quantized import SUPPORTED, Scheme
from understudy.checkpoint.strided import NotAView, Strided, View, views_along
from understudy.core import (
    ByteRange,
    CheckpointError,
    ExpertId,
    ExpertLayout,
    Piece,
    QuantizedExperts,
    UnsupportedFamily,
)

MAX_PIECES = 16  # views per parameter; more means that the bytes lie scattered
TORCH_DTYPE = MappingProxyType(  # dtypes in which an expert can be computed, safetensors -> torch
    {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
)
CODE_DTYPE = MappingProxyType(
    {**TORCH_DTYPE, "U8": "uint8", "F8_E8M0": "uint8", "I32": "int32", "F8_E4M3": "float8_e4m3fn"}
)


@dataclass(frozen=True)
class ExpertsModule:
    """One Experts module of the model, as the conversion rules see it.

    ``name``: its path in the model ("model.layers.3.mlp.experts"). ``layer``: MoE layer index in
    forward order. ``params``: the name of each *expert parameter* -> its full shape, expert axis
    first. Expert parameters are those whose first axis is ``num_experts`` and that have at least
    two axes; whatever else the module owns (a norm, a scale of shape ``[E]``) is dense: it stays
    in the guest model. ``transposed``: matrices are ``[in, out]``, so parts are joined along the
    last axis.
    """

    name: str
    layer: int
    num_experts: int
    params: Mapping[str, tuple[int, ...]]
    transposed: bool = False

    def keys(self) -> dict[str, tuple[int, ...]]:
        """Full parameter name, as in a state dict -> shape."""
        return {f"{self.name}.{param}": shape for param, shape in self.params.items()}


@dataclass
class _Group:
    """Source tensors of one target parameter, by the pattern that matched them."""

    converter: Any
    sources: dict[str, list[TensorInfo]] = field(default_factory=dict)


def layouts(
    tensors: Mapping[str, TensorInfo],
    model: Any,
    modules: Sequence[ExpertsModule],
    scheme: Scheme | None = None,
) -> dict[ExpertId, ExpertLayout]:
    """The byte ranges of every expert of ``modules``. See `Checkpoint.layouts`."""
    if not modules:
        raise CheckpointError(
            f"{type(model).__name__} has no experts modules, so it is not a Mixture-of-Experts"
            " model this engine can run: load it with transformers itself"
        )
    if scheme is not None:
        return _quantised_layouts(tensors, model, modules, scheme)
    addresses = _addresses(tensors, model, modules)
    return {
        expert: layout
        for module in modules
        for expert, layout in _module_layouts(module, addresses)
    }


def _quantised_layouts(
    tensors: Mapping[str, TensorInfo],
    model: Any,
    modules: Sequence[ExpertsModule],
    scheme: Scheme,
) -> dict[ExpertId, ExpertLayout]:
    """As if there were two plain checkpoints, one whose matrices are the codes and one whose
    matrices are the scales: the same rules lead to both."""
    codes = [replace(m, params=_shapes(m, scheme.codes_shape), transposed=False) for m in modules]
    scales = [
        replace(m, params=_matrices(_shapes(m, scheme.scales_shape)), transposed=False)
        for m in modules
    ]
    of_codes = _renamed(tensors, scheme, scheme.codes, scheme.scales)
    addresses = _addresses(of_codes, model, codes, CODE_DTYPE, scheme.codes)
    addresses = {n: a.flatten(2) if a.ndim > 3 else a for n, a in addresses.items()}
    of_scales = _addresses(
        _renamed(tensors, scheme, scheme.scales, scheme.codes),
        model, scales, CODE_DTYPE, scheme.scales,
    )  # fmt: skip
    addresses |= {f"{name}_scales": address for name, address in of_scales.items()}
    found = {}
    for module in codes:
        named = dict(module.params) | {f"{p}_scales": () for p in _matrices(module.params)}
        stored = replace(module, params=named)
        for expert, layout in _module_layouts(stored, addresses, unite=False):
            found[expert] = replace(layout, format=scheme.format)
    return found


def _matrices(params: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in params.items() if len(shape) > 2}


def _shapes(module: ExpertsModule, stored: Any) -> dict[str, tuple[int, ...]]:
    """The shapes in which the module's parameters lie, ``stored``: those of a matrix [out, in]."""
    found = dict(module.params)
    for name, (experts, *rows) in _matrices(module.params).items():
        out, inner = reversed(rows) if module.transposed else rows
        found[name] = (experts, *stored(out, inner))
    return found


def _renamed(
    tensors: Mapping[str, TensorInfo], scheme: Scheme, kept: str, left_out: str
) -> dict[str, TensorInfo]:
    """Tensors with the ending ``kept`` under the name that a plain checkpoint gives them."""
    found = {}
    for name, info in tensors.items():
        if scheme.plain_name(name, left_out) is None:
            plain = scheme.plain_name(name, kept) or name
            found[plain] = info
    return found


def dense(
    tensors: Mapping[str, TensorInfo],
    model: Any,
    modules: Sequence[ExpertsModule],
    scheme: Scheme | None = None,
) -> list[tuple[str, TensorInfo, TensorInfo | None]]:
    """The stored tensors that the other parameters of the model are made of: the name a plain
    checkpoint gives it, the tensor, and its scales where it is codes. Tensors the model has no use
    for (extra heads, layers for speculative decoding) are not among them."""
    if scheme is None:
        return [(t.name, t, None) for t in _collect(tensors, model, _wanted(modules))[1]]
    renamed = _renamed(tensors, scheme, scheme.codes, scheme.scales)
    names = {info.name: name for name, info in renamed.items()}
    return [
        (names[t.name], t, tensors.get(scheme.scales_name(t.name)))
        for t in _collect(renamed, model, _wanted(modules))[1]
    ]


# ------------------------------------------------------------------- names: which tensor goes where


def _wanted(modules: Sequence[ExpertsModule]) -> dict[str, tuple[int, ...]]:
    return {key: shape for module in modules for key, shape in module.keys().items()}


def _addresses(
    tensors: Mapping[str, TensorInfo],
    model: Any,
    modules: Sequence[ExpertsModule],
    dtypes: Mapping[str, str] = TORCH_DTYPE,
    ending: str = "",
) -> dict[str, Strided]:
    """Full name of every expert parameter -> its address, of the right shape. ``ending``: what the
    checkpoint adds to the name of a matrix, for the message that it is missing."""
    wanted = _wanted(modules)
    groups, _ = _collect(tensors, model, wanted)
    experts: dict[str, Strided] = {}
    guest = _Guest(model, wanted)
    for target, group in groups.items():
        found = _convert(target, group, guest, dtypes)
        experts |= {key: address for key, address in found.items() if key in wanted}
    for key, twin in _tied(model, wanted).items():
        if key not in experts and twin in experts:
            experts[key] = experts[twin]
    for module in modules:
        for key, shape in module.keys().items():
            if key not in experts:
                raise CheckpointError(_is_missing(key + (ending if len(shape) > 2 else "")))
            _check(key, shape, experts[key], groups.get(key), module.num_experts)
    return experts


def _collect(
    tensors: Mapping[str, TensorInfo], model: Any, wanted: Mapping[str, Any]
) -> tuple[dict[str, _Group], tuple[TensorInfo, ...]]:
    """Source tensors per expert parameter, and the dense ones. These are the steps of the first
    half of ``convert_and_load_state_dict_in_model`` in transformers."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known: dict[str, Any] = dict.fromkeys([*model.state_dict(), *wanted], True)
    prefix = model.base_model_prefix

    groups: dict[str, _Group] = {}
    dense: list[TensorInfo] = []
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:  # should not have been renamed
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if target not in known:
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        if wanted.keys().isdisjoint(_targets(target, converter)):
            dense.append(tensors[name])
            continue
        group = groups.setdefault(target, _Group(converter))
        group.sources.setdefault(pattern or name, []).append(tensors[name])
    return groups, tuple(dense)


def _targets(target: str, converter: Any) -> Iterator[str]:
    """All parameters that a converter makes, given the name of the first one."""
    yield target
    if converter is not None:
        first, *others = converter.target_patterns
        yield from (target.replace(first, other) for other in others)


def _tied(model: Any, wanted: Mapping[str, Any]) -> dict[str, str]:
    """Expert parameters that share another one's weights -> that other one. The model's own
    expansion of its tying rules cannot see parameters that were removed."""
    from transformers import PreTrainedModel

    pairs: dict[str, str] = {}
    for path, part in model.named_modules():
        if not isinstance(part, PreTrainedModel) or not _ties(part):
            continue
        rules = part._tied_weights_keys
        for follower, leader in rules.items() if isinstance(rules, dict) else ():
            start = f"{path}." if path else ""
            names = [key.removeprefix(start) for key in wanted if key.startswith(start)]
            followers = [start + n for n in names if re.search(follower, n)]
            leaders = [start + n for n in names if re.search(leader, n)]
            if len(followers) == len(leaders):
                pairs |= dict(zip(followers, leaders, strict=True))
    return pairs


def _ties(part: Any) -> bool:
    return getattr(part.config, "tie_word_embeddings", False) is True


# ----------------------------------------------------------- operations: how tensors are rearranged


class _Guest:
    """The model as operations ask it: the shape of any parameter, removed ones included."""

    def __init__(self, model: Any, wanted: Mapping[str, tuple[int, ...]]) -> None:
        self._model, self._wanted = model, wanted
        self.config = model.config

    def get_parameter(self, name: str) -> Any:
        if name in self._wanted:
            return torch.empty(self._wanted[name], device="meta")
        return self._model.get_parameter(name)


def _convert(
    target: str, group: _Group, guest: _Guest, dtypes: Mapping[str, str]
) -> dict[str, Strided]:
    """Run the group's operations on addresses: parameter name -> its address."""
    if group.converter is None:
        ((info,),) = group.sources.values()
        return {target: _address(info, dtypes)}
    converter = deepcopy(group.converter)
    for pattern, infos in group.sources.items():
        for info in infos:
            converter.add_tensor(target, info.name, pattern, _address(info, dtypes))
    try:
        found: dict[str, Strided] = converter.convert(target, model=guest, config=guest.config)
        return found
    except Exception as e:  # operations raise whatever they like on input they did not expect
        experts = guest.get_parameter(target).shape[0]
        if missing := _first_missing(group, experts):
            raise CheckpointError(_is_missing(missing)) from e
        steps = " then ".join(type(op).__name__ for op in converter.operations)
        raise UnsupportedFamily(
            f"{target} of model_type {guest.config.model_type!r} is made by {steps}, which cannot"
            f" be expressed as byte ranges ({type(e).__name__}: {e}): re-save the model with"
            " save_pretrained() of transformers"
        ) from e


def _address(info: TensorInfo, dtypes: Mapping[str, str]) -> View:
    if info.dtype not in dtypes:
        raise QuantizedExperts(
            f"expert tensor {info.name!r} is stored as {_format(info.dtype)}, which is not"
            " supported: use the bf16 or fp16 version of this model; of quantised ones"
            f" {SUPPORTED} run"
        )
    itemsize = BITS[info.dtype] // 8
    if info.offset % itemsize:
        raise CheckpointError(
            f"expert tensor {info.name!r} lies at byte {info.offset}, not a multiple of its"
            f" {itemsize}-byte elements: re-save the model with save_pretrained() of transformers"
        )
    dtype = dtypes[info.dtype]
    return View.whole(info.file, info.offset, itemsize, dtype, info.shape)


def _format(dtype: str) -> str:
    """What a stored dtype usually means for an expert."""
    if dtype.startswith("F8"):
        return f"FP8 ({dtype})"
    if dtype.startswith(("F4", "F6")):
        return f"FP4/FP6 ({dtype})"
    packed = {"U8": "packed 4-bit (U8: MXFP4, bitsandbytes)", "I32": "packed int4 (I32: GPTQ, AWQ)"}
    return packed.get(dtype, f"integers ({dtype})")


# --------------------------------------------------------------------------------- checks


def _check(
    key: str, shape: tuple[int, ...], address: Strided, group: _Group | None, experts: int
) -> None:
    if tuple(address.shape) == tuple(shape):
        return
    if group and (missing := _first_missing(group, experts)):
        raise CheckpointError(_is_missing(missing))
    raise CheckpointError(
        f"{key} has shape {list(address.shape)} in the checkpoint but config.json makes it"
        f" {list(shape)}: config.json and weights do not belong together; download both again"
    )


def _is_missing(name: str) -> str:
    return f"expert tensor {name!r} is missing from the checkpoint: download it again"


def _first_missing(group: _Group, experts: int) -> str | None:
    """The name of a tensor that should be there, judged by the numbers in its siblings' names."""
    if group.converter is None:
        return None
    for infos in group.sources.values():
        found = {}
        for info in infos:
            parts = re.fullmatch(r"(.*\.)(\d+)(\..*)", info.name)
            if parts is None:
                return None
            found[int(parts[2])] = (parts[1], parts[3])
        before, after = next(iter(found.values()))
        absent = [n for n in range(max(experts, *found, 0)) if n not in found]
        if absent:
            return f"{before}{absent[0]}{after}"
    absent_patterns = [p for p in group.converter.source_patterns if p not in group.sources]
    return absent_patterns[0] if absent_patterns else None


# ------------------------------------------------------------------------ experts: cut and list


def _module_layouts(
    module: ExpertsModule, addresses: Mapping[str, Strided], unite: bool = True
) -> Iterator[tuple[ExpertId, ExpertLayout]]:
    """``unite``: make one piece of neighbours. Not where codes and scales must have as many."""
    rows = {param: addresses[f"{module.name}.{param}"].unbind(0) for param in module.params}
    for expert in range(module.num_experts):
        found = {}
        for param, row in rows.items():
            axis = row[expert].ndim - 1 if module.transposed else 0
            try:
                found[param] = views_along(row[expert], axis, unite)
            except NotAView as e:
                raise _scattered(module, param, str(e)) from e
            if len(found[param]) > MAX_PIECES:
                raise _scattered(module, param, f"{len(found[param])} parts")
        reads = _merge(view for of_param in found.values() for view in of_param)
        needed = sum(prod(v.shape) * v.itemsize for of_param in found.values() for v in of_param)
        if sum(read.nbytes for read in reads) > needed:
            raise _scattered(module, "/".join(rows), "other bytes lie in between")
        pieces = {p: tuple(_piece(v, reads) for v in of_param) for p, of_param in found.items()}
        yield ExpertId(module.layer, expert), ExpertLayout(reads, pieces)


def _scattered(module: ExpertsModule, param: str, why: str) -> UnsupportedFamily:
    return UnsupportedFamily(
        f"one expert's {param} of {module.name} lies scattered in the checkpoint ({why}): re-save"
        " the model with save_pretrained() of transformers"
    )


def _merge(found: Iterable[View]) -> tuple[ByteRange, ...]:
    """The byte ranges that hold all ``found`` views, touching ones united, in file order."""
    reads: list[ByteRange] = []
    for file, start, end in sorted((v.file, v.start, v.end) for v in found):
        last = reads[-1] if reads else None
        if last and last.file == file and start <= last.offset + last.nbytes:
            reads[-1] = last._replace(nbytes=max(last.nbytes, end - last.offset))
        else:
            reads.append(ByteRange(file, start, end - start))
    return tuple(reads)


def _piece(view: View, reads: Sequence[ByteRange]) -> Piece:
    for number, read in enumerate(reads):
        if view.file == read.file and 0 <= view.start - read.offset < read.nbytes:
            start = view.start - read.offset
            return Piece(number, start, view.dtype, tuple(view.shape), view.strides)
    raise AssertionError("every view lies inside the reads made from it")
