"""The expert MLP on the CPU: what one expert makes of its tokens of one event.

Knows: tensors, the Experts module's own activation and flags, the two kernels. Does not know: where
the weights came from, which expert this is, who else runs.

Two kernels. ``native`` for few tokens: several experts in one call, each line of weights read once
at the speed of memory; a token's bits do not depend on who shares the call. ``torch`` for many
tokens: one expert per call, whose shape never depends on residency or on the order of arrival. Row
counts are rounded up to a bucket: oneDNN compiles a kernel for every new count (0.4-0.5 ms).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from understudy import formats, native
from understudy.core import STORED, ExpertId
from understudy.experts.store import Store, Weights

Pieces = Sequence[torch.Tensor]

# What the native kernel can multiply without rounding a weight: stored dtype -> of the computation.
_EXACT = {
    torch.float32: (torch.float32,),
    torch.float16: (torch.float16, torch.float32),
    torch.bfloat16: (torch.bfloat16, torch.float32),
}


class Work(Protocol):
    """One event being computed: x [T, H] by experts ids [T, k], which become ready one by one.

    ``out`` [T * k, H]: what every expert made of its tokens, unweighted (where it was to be kept).
    """

    x: torch.Tensor
    tokens: int
    k: int

    @property
    def out(self) -> torch.Tensor: ...
    def __contains__(self, expert: int) -> bool: ...
    def run(self, ready: Sequence[tuple[ExpertId, int]]) -> None:
        """Compute experts that are there, each in its slot."""

    def run_in_place(self, experts: Sequence[ExpertId]) -> None:
        """Compute experts that hold no slot where they lie; only with a device."""

    def skip(self, expert: int) -> None: ...
    def sum(self) -> torch.Tensor:
        """[T, H]: the weighted sum over ranks, in rank order, rounded once."""


class Compute(Protocol):
    """Where experts are computed. ``far``: reading a tensor makes the host wait for a device, so
    what can be read together is."""

    far: bool

    def read(self, *tensors: torch.Tensor) -> list[Any]:
        """As plain lists."""

    def begin(
        self, layer: int, x: torch.Tensor, ids: Sequence[Sequence[int]], weights: torch.Tensor,
        *, keep: bool = False,
    ) -> Work:  # fmt: skip
        """``keep``: somebody will look at `Work.out`."""

    def close(self) -> None: ...


def bucket(rows: int) -> int:
    """The row count a torch call is padded to: powers of two up to 64, then multiples of 64."""
    if rows <= 64:
        return 1 << (rows - 1).bit_length()
    return -(-rows // 64) * 64


class ExpertMlp:
    """What one expert of one Experts module computes, given its weights.

    ``module`` is the module of transformers (its parameters are gone, its activation and flags are
    not). Mirrors `transformers.integrations.moe`: up or gate_up, activation, down, optional norm.
    ``format``: of the weights. ``native_rows``: up to how many tokens of an expert the native
    kernel is used (0: never); the torch kernel unpacks a quantised matrix once per call.
    """

    def __init__(self, module: Any, format: str = STORED, native_rows: int = 0) -> None:
        self.format = None if format == STORED else formats.get(format)
        self.transposed: bool = module.is_transposed
        self.gated: bool = module.has_gate
        self.act: Callable[[torch.Tensor], torch.Tensor] | None = getattr(module, "act_fn", None)
        self.apply_gate: Callable[[torch.Tensor], torch.Tensor] = module._apply_gate
        self.norm = module.post_expert_norm if module.has_post_expert_norm else None
        self.native_rows = native_rows if native.library() is not None else 0
        self._possible: dict[torch.dtype, bool] = {}
        self._fused: dict[torch.dtype, Fused] = {}
        self.swiglu = (
            self.gated
            and self.norm is None
            and isinstance(self.act, nn.SiLU | SiLUActivation)
            and getattr(self.apply_gate, "__func__", None) is _default_apply_gate
        )

    def __call__(
        self, x: torch.Tensor, weights: Mapping[str, Pieces], *, few: bool = False
    ) -> torch.Tensor:
        """x [n, H] -> [n, H], before the routing weight. ``few``: few enough for `native`."""
        if self.gated:
            h = self.apply_gate(self._linear(x, weights, "gate_up_proj", few))
        else:
            assert self.act is not None
            h = self.act(self._linear(x, weights, "up_proj", few))
        out = self._linear(h, weights, "down_proj", few)
        return out if self.norm is None else self.norm(out)

    def _linear(
        self, x: torch.Tensor, weights: Mapping[str, Pieces], name: str, few: bool
    ) -> torch.Tensor:
        multiply = self._native if few else self._torch
        parts = [multiply(x, codes, scales) for codes, scales in _coded(weights, name)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        bias = weights.get(f"{name}_bias")
        if bias is None:
            return out
        return out + torch.cat([b.to(x.dtype) for b in bias], dim=-1)

    def _torch(
        self, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None
    ) -> torch.Tensor:
        if self.format is not None and scales is not None:
            return F.linear(x, self._unpacked(codes, scales, x.dtype))
        matrix = codes.T if self.transposed else codes
        return F.linear(x, matrix if matrix.dtype == x.dtype else matrix.to(x.dtype))

    def _unpacked(
        self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """The matrix as numbers; in C where it can be: the same bits, several times sooner."""
        assert self.format is not None
        here = codes.device.type == "cpu"  # C reads host memory only
        if not here or native.library() is None or not self._readable(codes, scales, dtype):
            return self.format.unpack(codes, scales, dtype)
        return native.unpack(codes, scales, self._inner(codes), *self._kind(codes, scales), dtype)

    def _native(
        self, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None
    ) -> torch.Tensor:
        kind, group = self._kind(codes, scales)
        return native.linears(x, [(codes, scales)], kind, group)[0]

    def _kind(self, codes: torch.Tensor, scales: torch.Tensor | None) -> tuple[str, int]:
        """How the native kernel calls this, and how many weights share a scale (0: all)."""
        if self.format is None or scales is None:
            return native.name_of(codes.dtype), 0
        per_line = scales.shape[1] if scales.ndim > 1 else 0
        return self.format.name, self._inner(codes) // per_line if per_line else 0

    def _inner(self, codes: torch.Tensor) -> int:
        """K, the length of a line in weights."""
        if self.format is None:
            return codes.shape[0 if self.transposed else 1]
        return codes.shape[1] * codes.itemsize * 8 // self.format.bits

    def most_native(self, weights: Mapping[str, Pieces], dtype: torch.dtype) -> int:
        """Up to how many tokens of an expert the native kernel computes in ``dtype``: a matter of
        shapes and dtypes alone, so the same for all experts of a layer and in every mode."""
        return self.native_rows if self.could_be_native(weights, dtype) else 0

    def could_be_native(self, weights: Mapping[str, Pieces], dtype: torch.dtype) -> bool:
        """Whether the native kernel can read such weights, without rounding them."""
        if dtype not in self._possible:
            names = [n for n in ("gate_up_proj", "up_proj", "down_proj") if n in weights]
            coded = [pair for name in names for pair in _coded(weights, name)]
            self._possible[dtype] = all(self._readable(c, s, dtype) for c, s in coded)
        return self._possible[dtype]

    def _readable(
        self, codes: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
    ) -> bool:
        if codes.stride(1) != 1:
            return False
        if self.format is None:
            return not self.transposed and dtype in _EXACT.get(codes.dtype, ())
        whole = scales is not None and scales.stride(-1) == 1
        return whole and self.format.name in native.KINDS and dtype in _EXACT

    def hidden(self, weights: Mapping[str, Pieces]) -> int:
        """H: what goes in."""
        return self._inner(weights["gate_up_proj" if self.gated else "up_proj"][0])

    def fused(self, weights: Weights, dtype: torch.dtype) -> Fused:
        """The call for several experts at once; they differ in addresses only."""
        if dtype not in self._fused:
            self._fused[dtype] = Fused(self, weights, dtype)
        return self._fused[dtype]


class Fused:
    """Hands SwiGLU experts of one layer to the native kernel, several in one call.

    An `ExpertMlp` whose experts are not SwiGLU computes them one matrix at a time instead.
    """

    def __init__(self, mlp: ExpertMlp, weights: Weights, dtype: torch.dtype) -> None:
        (gate, gate_scales), _, (down, down_scales) = _swiglu_parts(weights)
        kind, group = mlp._kind(gate, gate_scales)
        self.shape = native.Shape(
            mlp._inner(gate),
            mlp._inner(down),
            (native.row_bytes(gate), native.row_bytes(down)),
            tuple(0 if s is None else native.row_bytes(s) for s in (gate_scales, down_scales)),
            native.KINDS[kind],
            (group, mlp._kind(down, down_scales)[1]),
            native.KINDS[native.name_of(dtype)],
        )
        self._shape = ctypes.addressof(self.shape)
        lib = native.library()
        assert lib is not None
        self._call = lib.understudy_swiglu

    @staticmethod
    def addresses(weights: Weights) -> bytes:
        """The first six fields of ``struct expert``; kept with the weights, which own the slot."""
        if weights.addresses is None:
            parts = _swiglu_parts(weights)
            codes = [codes.data_ptr() for codes, _ in parts]
            scales = [0 if scales is None else scales.data_ptr() for _, scales in parts]
            weights.addresses = struct.pack("6Q", *codes, *scales)
        return weights.addresses

    def __call__(
        self, experts: bytes, count: int, x: torch.Tensor, out: torch.Tensor,
        tokens: torch.Tensor, places: torch.Tensor,
    ) -> None:  # fmt: skip
        failed = self._call(
            experts, count, self._shape, x.data_ptr(), len(x), out.data_ptr(),
            tokens.data_ptr(), places.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the inputs of an expert")


def _coded(weights: Mapping[str, Pieces], name: str) -> Iterator[native.Coded]:
    """The pieces of a parameter, each with its scales (``None`` where there are none)."""
    scales: Sequence[torch.Tensor | None] = weights.get(f"{name}_scales", ())
    return zip(weights[name], scales or [None] * len(weights[name]), strict=True)


def _swiglu_parts(weights: Mapping[str, Pieces]) -> tuple[native.Coded, ...]:
    """gate, up and down, [out, in] each; gate and up may lie in one matrix."""
    pieces = list(_coded(weights, "gate_up_proj"))
    if len(pieces) == 1:
        codes, scales = pieces[0]
        halves = (None, None) if scales is None else scales.chunk(2)
        pieces = list(zip(codes.chunk(2), halves, strict=True))
    return *pieces, *_coded(weights, "down_proj")


_span = struct.Struct("2q").pack  # the last two fields of ``struct expert``


@cache
def _one_token(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the k experts of a single token write, and what they read."""
    return torch.arange(k), torch.zeros(k, dtype=torch.long)


class Batch:
    """The tokens of one event, sorted by expert, and the outputs per (token, rank).

    x [T, H], ids and weights [T, k]. Outputs are summed over ranks in rank order, whatever the
    order in which experts were computed.
    """

    def __init__(
        self, x: torch.Tensor, ids: Sequence[Sequence[int]], weights: torch.Tensor
    ) -> None:
        self.x, self.weights = x.contiguous(), weights
        self.tokens, self.k = len(ids), len(ids[0])
        self.out = torch.empty(self.tokens * self.k, x.shape[1], dtype=x.dtype)
        self._spans: dict[int, tuple[int, int]]
        if self.tokens == 1 and len(set(ids[0])) == self.k:
            self.order, self.token = _one_token(self.k)
            self._spans = {e: (rank, 1) for rank, e in enumerate(ids[0])}
        else:
            flat = torch.tensor(ids).reshape(-1)
            self.order = torch.argsort(flat, stable=True)
            self.token = self.order // self.k
            found, counts = torch.unique_consecutive(flat[self.order], return_counts=True)
            starts = (counts.cumsum(0) - counts).tolist()
            spans = zip(starts, counts.tolist(), strict=True)
            self._spans = dict(zip(found.tolist(), spans, strict=True))

    def __contains__(self, expert: int) -> bool:
        return expert in self._spans

    def compute_many(self, experts: Sequence[tuple[int, Weights]], mlp: ExpertMlp) -> None:
        """Run several experts, each on its tokens, and keep the results."""
        most = mlp.most_native(experts[0][1], self.x.dtype) if experts else 0
        few = [one for one in experts if self._spans[one[0]][1] <= most]
        if few and mlp.swiglu:
            self._compute_fused(few, mlp)
        for expert, weights in experts:
            is_few = self._spans[expert][1] <= most
            if not is_few or not mlp.swiglu:
                self._compute(expert, mlp, weights, few=is_few)

    def compute(self, expert: int, mlp: ExpertMlp, weights: Weights) -> None:
        """Run one expert on its tokens and keep the result."""
        self.compute_many([(expert, weights)], mlp)

    def _compute(self, expert: int, mlp: ExpertMlp, weights: Weights, *, few: bool) -> None:
        start, n = self._spans[expert]
        places = self.order[start : start + n]
        rows = self.x.new_zeros(n if few else bucket(n), self.x.shape[1])
        torch.index_select(self.x, 0, self.token[start : start + n], out=rows[:n])
        self.out[places] = mlp(rows, weights, few=few)[:n]

    def _compute_fused(self, experts: Sequence[tuple[int, Weights]], mlp: ExpertMlp) -> None:
        fused = mlp.fused(experts[0][1], self.x.dtype)
        records = b"".join(
            fused.addresses(weights) + _span(*self._spans[expert]) for expert, weights in experts
        )
        fused(records, len(experts), self.x, self.out, self.token, self.order)

    def skip(self, expert: int) -> None:
        """Leave ``expert`` out: it contributes nothing."""
        start, n = self._spans[expert]
        self.out[self.order[start : start + n]] = 0

    def sum(self) -> torch.Tensor:
        """[T, H]: the weighted sum over ranks, rounded once."""
        return native.weighted_sum(self.out.view(self.tokens, self.k, -1), self.weights)


class HostCompute:
    """Experts computed by the CPU, from the slots of ``store``. ``mlps``: one per MoE layer."""

    far = False

    def __init__(self, store: Store, mlps: Sequence[ExpertMlp]) -> None:
        self.store, self.mlps = store, mlps

    def read(self, *tensors: torch.Tensor) -> list[Any]:
        return [tensor.tolist() for tensor in tensors]

    def begin(
        self, layer: int, x: torch.Tensor, ids: Sequence[Sequence[int]], weights: torch.Tensor,
        *, keep: bool = False,
    ) -> HostWork:  # fmt: skip
        return HostWork(self, layer, x, ids, weights)

    def close(self) -> None:
        self.store.close()


class HostWork(Batch):
    """A `Batch` that knows its layer's MLP, and where weights are."""

    def __init__(
        self, place: HostCompute, layer: int, x: torch.Tensor, ids: Sequence[Sequence[int]],
        weights: torch.Tensor,
    ) -> None:  # fmt: skip
        super().__init__(x, ids, weights)
        self._place, self._layer = place, layer

    def run(self, ready: Sequence[tuple[ExpertId, int]]) -> None:
        """Compute experts that are there, each in its slot."""
        weights = self._place.store.weights
        found = [(e.expert, weights(e, slot)) for e, slot in ready]
        self.compute_many(found, self._place.mlps[self._layer])

    def run_in_place(self, experts: Sequence[ExpertId]) -> None:
        raise AssertionError("host memory is where slots are: nothing can be computed beside them")
