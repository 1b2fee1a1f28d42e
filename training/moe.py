"""A fast training forward for Qwen3-MoE and Mixtral shapes on a few CPU cores.

Knows the arithmetic of the two families (it must agree with transformers' own: a test compares
logits) and how to keep two cores busy: tokens sorted by expert, row counts rounded up to 64 so
that the matrix library meets few shapes, the attention block compiled as one piece, the loss in
chunks. Does not know data, schedules or files. It has no cache and cannot generate text; trained
weights go back to transformers for that.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROUND = 64  # rows of an expert's products are rounded up to this
CHUNK = 512  # rows of logits alive at a time


@dataclass(frozen=True)
class Shape:
    """What is built. `family` is transformers' model_type."""

    family: str
    layers: int
    experts: int
    top_k: int
    width: int
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocabulary: int = 4096
    context: int = 256
    positions: int = 1024
    theta: float = 10000.0
    eps: float = 1e-6

    @property
    def normed_heads(self) -> bool:
        """Qwen3 norms queries and keys per head; Mixtral does not."""
        return self.family == "qwen3_moe"


def parameter_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every trained tensor, matrices first. Query, key and value are one matrix here."""
    h, d = shape.hidden, shape.head_dim
    joint = (shape.heads + 2 * shape.kv_heads) * d
    found: dict[str, tuple[int, ...]] = {"embed": (shape.vocabulary, h)}
    for layer in range(shape.layers):
        found[f"{layer}.qkv"] = (joint, h)
        found[f"{layer}.o"] = (h, shape.heads * d)
        found[f"{layer}.router"] = (shape.experts, h)
        found[f"{layer}.gate_up"] = (shape.experts, 2 * shape.width, h)
        found[f"{layer}.down"] = (shape.experts, h, shape.width)
    for layer in range(shape.layers):
        found |= {f"{layer}.norm1": (h,), f"{layer}.norm2": (h,)}
        if shape.normed_heads:
            found |= {f"{layer}.q_norm": (d,), f"{layer}.k_norm": (d,)}
    return found | {"norm": (h,)}


class Parameters:
    """All weights and all gradients, each one flat buffer, with named views into them.

    One flat buffer makes the optimizer a single pass over memory. The embedding's gradient is
    gathered in fp32: thousands of rows add up in it, too many for bf16.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        shapes = parameter_shapes(shape)
        sizes = [math.prod(one) for one in shapes.values()]
        self.matrices = sum(
            size for size, one in zip(sizes, shapes.values(), strict=True) if len(one) > 1
        )
        self.flat = torch.zeros(sum(sizes), dtype=dtype)
        self.flat_grad = torch.zeros_like(self.flat)
        self.embed_grad = torch.zeros(shapes["embed"], dtype=torch.float32)
        self.weight: dict[str, Tensor] = {}
        self.grad: dict[str, Tensor] = {}
        begin = 0
        for (name, one), size in zip(shapes.items(), sizes, strict=True):
            self.weight[name] = self.flat[begin : begin + size].view(one).requires_grad_()
            self.grad[name] = self.flat_grad[begin : begin + size].view(one)
            self.weight[name].grad = self.grad[name]
            begin += size

    def zero_grad(self) -> None:
        """Before each backward."""
        self.flat_grad.zero_()
        self.embed_grad.zero_()

    def finish_grad(self) -> None:
        """After the last backward: bring the embedding's fp32 gradient to the others."""
        self.grad["embed"].copy_(self.embed_grad)


def initialize(shape: Shape, flat: Tensor, seed: int) -> None:
    """Normal weights, smaller where they write to the residual stream; norms are ones."""
    generator = torch.Generator().manual_seed(seed)
    begin = 0
    for name, one in parameter_shapes(shape).items():
        view = flat[begin : begin + math.prod(one)].view(one)
        begin += math.prod(one)
        if len(one) == 1:
            view.fill_(1.0)
            continue
        std = 0.02 if name == "embed" else 0.04
        if name.endswith((".o", ".down")):
            std /= math.sqrt(2 * shape.layers)
        view.copy_(torch.randn(one, generator=generator) * std)


# --- the attention block, everything from one expert block to the next ----------------------


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def _attention_block(
    shape: Shape, x: Tensor, w: dict[str, Tensor], cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(residual, normed input of router and experts, router probabilities in fp32)."""
    batch, length, _ = x.shape
    heads, groups, dim = shape.heads, shape.kv_heads, shape.head_dim
    joint = F.linear(_rms_norm(x, w["norm1"], shape.eps), w["qkv"])
    joint = joint.view(batch, length, heads + 2 * groups, dim)
    query, key, value = torch.split(joint, [heads, groups, groups], dim=2)
    if shape.normed_heads:
        query = _rms_norm(query, w["q_norm"], shape.eps)
        key = _rms_norm(key, w["k_norm"], shape.eps)
    query = _rotate(query.transpose(1, 2), cos, sin)
    key = _rotate(key.transpose(1, 2), cos, sin).repeat_interleave(heads // groups, dim=1)
    value = value.transpose(1, 2).repeat_interleave(heads // groups, dim=1)
    # Products and a plain softmax: at 256 tokens this beats the fused attention of this CPU.
    scores = torch.matmul(query, key.transpose(2, 3)).float() * dim**-0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    chances = scores.masked_fill(future, float("-inf")).softmax(-1).to(x.dtype)
    mixed = torch.matmul(chances, value).transpose(1, 2).reshape(batch, length, heads * dim)
    x = x + F.linear(mixed, w["o"])
    normed = _rms_norm(x, w["norm2"], shape.eps)
    probabilities = F.linear(normed, w["router"]).float().softmax(-1)
    return x, normed, probabilities


# --- the experts ---------------------------------------------------------------------------


def _gated(joint: Tensor, row_weight: Tensor) -> Tensor:
    gate, up = joint.float().chunk(2, dim=-1)
    return (F.silu(gate) * up * row_weight[:, None]).to(joint.dtype)


def _gated_backward(d_out: Tensor, joint: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `_gated` by joint and by row weight."""
    gate, up = joint.float().chunk(2, dim=-1)
    grad = d_out.float()
    sigmoid = gate.sigmoid()
    activated = gate * sigmoid
    d_weight = (grad * activated * up).sum(-1)
    grad = grad * row_weight[:, None]
    d_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((d_gate, grad * activated), dim=-1).to(joint.dtype), d_weight


def _gather_sum(rows: Tensor, place: Tensor) -> Tensor:
    """Each token's sum over the rows of its experts."""
    return rows[place].float().sum(1).to(rows.dtype)


@dataclass
class Dispatch:
    """Which row of the sorted, rounded-up layout belongs to which token."""

    rows: Tensor  # token of every row; padding rows repeat token 0 with weight zero
    place: Tensor  # [tokens, k]: row of every choice
    counts: Tensor  # tokens per expert
    spans: list[tuple[int, int]]  # first and last row of every expert


def dispatch(ids: Tensor, experts: int) -> Dispatch:
    """Sort the choices by expert; every expert's rows rounded up, the total always the same."""
    flat = ids.flatten()
    counts = torch.bincount(flat, minlength=experts)
    room = (counts + ROUND - 1) // ROUND * ROUND
    ends = room.cumsum(0)
    order = flat.argsort(stable=True)
    shift = (ends - room) - (counts.cumsum(0) - counts)
    place = torch.empty_like(flat)
    place[order] = torch.arange(len(flat)) + shift[flat[order]]
    total = -(-len(flat) // ROUND) * ROUND + experts * ROUND
    rows = torch.zeros(total, dtype=torch.long)
    rows[place] = torch.arange(len(flat)) // ids.shape[1]
    limits = [0, *ends.tolist()]
    spans = list(itertools.pairwise(limits))
    return Dispatch(rows, place.view_as(ids), counts, spans)


def _apply(function: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    """`function.apply`, typed: torch leaves it untyped."""
    result: Tensor = function.apply(*inputs)  # type: ignore[no-untyped-call]
    return result


class _Experts(torch.autograd.Function):
    """All experts of a layer. Weight gradients are written in place, not returned.

    The routing weight is applied between the two products, where rows are narrow; then nothing
    has to be kept of the outputs to get its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, choice: Tensor, plan: Dispatch, layer: "Layer", pieces: "Pieces"
    ) -> Tensor:
        gate_up, down = layer.w["gate_up"].detach(), layer.w["down"].detach()
        row_weight = torch.zeros(len(plan.rows))
        row_weight[plan.place.flatten()] = choice.flatten().float()
        gathered = x[plan.rows]
        joint = x.new_zeros(len(plan.rows), gate_up.shape[1])
        for expert, (a, b) in enumerate(plan.spans):
            if b > a:
                torch.mm(gathered[a:b], gate_up[expert].t(), out=joint[a:b])
        inner = pieces.gated(joint, row_weight)
        out = x.new_empty(gathered.shape)
        for expert, (a, b) in enumerate(plan.spans):
            if b > a:
                torch.mm(inner[a:b], down[expert].t(), out=out[a:b])
        ctx.save_for_backward(gathered, joint, inner, row_weight)
        ctx.rest = (plan, layer, pieces, choice.dtype)
        result: Tensor = pieces.gather_sum(out, plan.place)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gathered, joint, inner, row_weight = ctx.saved_tensors
        plan, layer, pieces, choice_type = ctx.rest
        gate_up, down = layer.w["gate_up"].detach(), layer.w["down"].detach()
        d_out = grads[0].contiguous()[plan.rows]
        d_inner = torch.zeros_like(inner)
        for expert, (a, b) in enumerate(plan.spans):
            if b > a:
                torch.mm(d_out[a:b], down[expert], out=d_inner[a:b])
                torch.mm(d_out[a:b].t(), inner[a:b], out=layer.grad["down"][expert])
        d_joint, d_weight = pieces.gated_backward(d_inner, joint, row_weight)
        d_gathered = torch.empty_like(gathered)
        for expert, (a, b) in enumerate(plan.spans):
            if b > a:
                torch.mm(d_joint[a:b], gate_up[expert], out=d_gathered[a:b])
                torch.mm(d_joint[a:b].t(), gathered[a:b], out=layer.grad["gate_up"][expert])
        d_x = pieces.gather_sum(d_gathered, plan.place)
        return d_x, d_weight[plan.place].to(choice_type), None, None, None


# --- embedding and loss, which share one matrix ----------------------------------------------


class _Embed(torch.autograd.Function):
    """Rows of the embedding, its gradient added in fp32."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, anchor: Tensor, parameters: Parameters) -> Tensor:
        ctx.rest = (tokens, parameters)
        return F.embedding(tokens, parameters.weight["embed"].detach()) + 0 * anchor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tokens, parameters = ctx.rest
        grad = grads[0].reshape(-1, grads[0].shape[-1]).float()
        parameters.embed_grad.index_add_(0, tokens.flatten(), grad)
        return None, torch.zeros((), dtype=grads[0].dtype), None


def _chunk_loss(logits: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(each row's loss, gradient of the weighted sum by the logits)."""
    wide = logits.float()
    log_chance = wide - wide.logsumexp(-1, keepdim=True)
    loss = -log_chance.gather(-1, target[:, None])[:, 0]
    grad = log_chance.exp()
    hit = torch.arange(wide.shape[-1])[None] == target[:, None]
    grad = (grad - hit.float()) * weight[:, None]
    return loss, grad.to(logits.dtype)


class _Loss(torch.autograd.Function):
    """Weighted cross-entropy, forward and backward of a chunk while its logits are in cache."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        target: Tensor,
        weight: Tensor,
        parameters: Parameters,
        pieces: "Pieces",
    ) -> Tensor:
        embed = parameters.weight["embed"].detach()
        grad = torch.empty_like(x)
        total = torch.zeros(())
        for a in range(0, len(x), CHUNK):
            part = x[a : a + CHUNK]
            loss, d_logits = pieces.chunk_loss(
                part @ embed.t(), target[a : a + CHUNK], weight[a : a + CHUNK]
            )
            total += (loss * weight[a : a + CHUNK]).sum()
            torch.mm(d_logits, embed, out=grad[a : a + CHUNK])
            parameters.embed_grad += d_logits.t() @ part
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The training loss enters the total with factor one, so the gradient is already right.
        (grad,) = ctx.saved_tensors
        return grad, None, None, None, None


# --- the model -----------------------------------------------------------------------------


@dataclass
class Layer:
    """One layer's weights and gradients by short name."""

    w: dict[str, Tensor]
    grad: dict[str, Tensor]


class Pieces:
    """The functions worth compiling, compiled or (for small tests) as they are."""

    def __init__(self, compiled: bool) -> None:
        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=False) if compiled else function

        self.attention_block = wrap(_attention_block)
        self.gated = wrap(_gated)
        self.gated_backward = wrap(_gated_backward)
        self.gather_sum = wrap(_gather_sum)
        self.chunk_loss = wrap(_chunk_loss)
        self.final_norm = wrap(_rms_norm)


@dataclass
class Result:
    """What a training step wants to know; `balance` is one number per layer, 1 when even."""

    loss: Tensor
    balance: Tensor
    counts: Tensor


class Model:
    """Weights plus forward. Gradients land in `parameters`."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.bfloat16, compiled: bool = True):
        self.shape = shape
        self.parameters = Parameters(shape, dtype)
        self.pieces = Pieces(compiled)
        self.dtype = dtype
        weight, grad = self.parameters.weight, self.parameters.grad
        self.layers = [
            Layer(_short(weight, layer), _short(grad, layer)) for layer in range(shape.layers)
        ]
        turns = shape.theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angles = torch.arange(shape.positions)[:, None].float() * turns
        angles = torch.cat((angles, angles), dim=-1)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def hidden(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(last hidden states after the final norm, balance per layer, counts per layer)."""
        anchor = torch.zeros((), dtype=self.dtype, requires_grad=True)
        x = _apply(_Embed, tokens, anchor, self.parameters)
        length = tokens.shape[1]
        balances, counts = [], []
        for layer in self.layers:
            x, balance, count = self._layer(layer, x, self.cos[:length], self.sin[:length])
            balances.append(balance)
            counts.append(count)
        x = self.pieces.final_norm(x, self.parameters.weight["norm"], self.shape.eps)
        return x, torch.stack(balances), torch.stack(counts)

    def _layer(
        self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = self.shape
        small = {name: one for name, one in layer.w.items() if name not in ("gate_up", "down")}
        x, normed, chances = self.pieces.attention_block(shape, x, small, cos, sin)
        chances = chances.view(-1, shape.experts)
        top, ids = chances.topk(shape.top_k, dim=-1)
        top = top / top.sum(-1, keepdim=True)
        plan = dispatch(ids, shape.experts)
        share = plan.counts / ids.numel()
        balance = shape.experts * (share * chances.mean(0)).sum()
        flat = normed.reshape(-1, shape.hidden)
        out = _apply(_Experts, flat, top, plan, layer, self.pieces)
        return x + out.view_as(x), balance, plan.counts

    def logits(self, tokens: Tensor) -> Tensor:
        """All logits at once; for tests and small batches."""
        return self.hidden(tokens)[0] @ self.parameters.weight["embed"].t()

    def loss(self, tokens: Tensor, target: Tensor, weight: Tensor) -> Result:
        """The weighted sum of token losses (weights should add up to one), and the routing."""
        x, balance, counts = self.hidden(tokens)
        flat = x.reshape(-1, self.shape.hidden)
        total = _apply(
            _Loss, flat, target.flatten(), weight.flatten(), self.parameters, self.pieces
        )
        return Result(total, balance, counts)


def _short(tensors: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    prefix = f"{layer}."
    return {
        name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)
    }
