"""A decoder layer as a graph, and the graph as compiled code.

Knows: make_fx and inductor, which tensors a layer call is given. Does not know: what the code is
used for, how its calls are repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from understudy.frame.operators import Site
from understudy.frame.program import noting_loops
from understudy.frame.recorder import NotCompiled, Recorder


class _Through:
    """Stands for the cache in a trace: keys and values go on to `attend`, which updates it."""

    def update(self, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return k, v


@dataclass(frozen=True, slots=True)
class Inputs:
    """Where the tensors of a layer call are: (name of the argument, place in a tuple or None);
    name "" is the first positional one. ``constants`` were what they were when it was traced."""

    tensors: tuple[tuple[str, int | None], ...]
    constants: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, site: Site) -> Inputs:
        if len(site.args) != 1:
            raise NotCompiled(f"a layer with {len(site.args)} positional arguments")
        tensors: list[tuple[str, int | None]] = [("", None)]
        constants = []
        for name, value in site.kwargs.items():
            if name in ("past_key_values", "attention_mask"):
                continue
            if isinstance(value, torch.Tensor):
                tensors.append((name, None))
            elif isinstance(value, tuple) and all(isinstance(v, torch.Tensor) for v in value):
                tensors += [(name, i) for i in range(len(value))]
            elif value is None or isinstance(value, bool | int | float | str):
                constants.append((name, value))
            else:
                raise NotCompiled(f"a layer argument {name} of type {type(value).__name__}")
        return cls(tuple(tensors), tuple(constants))

    def gather(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        return [
            args[0] if not name else kwargs[name] if place is None else kwargs[name][place]
            for name, place in self.tensors
        ]

    def scatter(self, tensors: Sequence[torch.Tensor], kwargs: Mapping[str, Any]) -> Any:
        """The keyword arguments with these tensors in them."""
        filled = dict(kwargs)
        for (name, place), tensor in zip(self.tensors[1:], tensors[1:], strict=True):
            if place is None:
                filled[name] = tensor
            else:
                filled[name] = (*filled[name][:place], tensor, *filled[name][place + 1 :])
        return filled


def state_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def trace(layer: nn.Module, site: Site, inputs: Inputs, recorder: Recorder) -> Any:
    """The layer as a graph of (number, tensors..., parameters...)."""
    from torch.fx.experimental.proxy_tensor import make_fx  # slow; a kept layer needs none of this

    names = list(state_of(layer))
    count = len(inputs.tensors)

    def run(number: torch.Tensor, *flat: torch.Tensor) -> tuple[torch.Tensor]:
        recorder.number = number
        kwargs = inputs.scatter(flat[:count], site.kwargs)
        kwargs |= {"past_key_values": _Through(), "attention_mask": None}
        state = dict(zip(names, flat[count:], strict=True))
        out = torch.func.functional_call(layer, state, (flat[0],), kwargs)
        if not isinstance(out, torch.Tensor):
            raise NotCompiled("a layer that answers with more than a tensor")
        return (out,)

    try:
        flat = (*inputs.gather(site.args, site.kwargs), *state_of(layer).values())
        return make_fx(run, tracing_mode="fake")(torch.tensor(0), *flat)
    finally:
        recorder.number = None


def multiply_with(products: Any, graph: Any) -> None:
    """Let ``products`` (x [1, K], weights) -> [1, all lines] multiply one row by whole parameters,
    those that read the same row in one call."""
    from torch._functorch.compile_utils import fx_graph_cse

    aten = torch.ops.aten
    graph.graph = fx_graph_cse(graph.graph)  # every product looks at the input through its own view
    found: dict[Any, list[Any]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is aten.mm.default:
            x, w = node.args
            turned = w.op == "call_function" and w.target is aten.t.default
            if turned and w.args[0].op == "placeholder" and x.meta["val"].shape[0] == 1:
                found.setdefault(x, []).append(node)
    for x, nodes in found.items():
        with graph.graph.inserting_before(nodes[0]):
            weights = [node.args[1].args[0] for node in nodes]
            together, start = graph.graph.call_function(products, (x, weights)), 0
            for node, weight in zip(nodes, weights, strict=True):
                end = start + weight.meta["val"].shape[0]
                part = graph.graph.call_function(aten.slice.Tensor, (together, 1, start, end))
                node.replace_all_uses_with(part)
                start = end
    graph.graph.eliminate_dead_code()
    graph.recompile()


def compile_graph(graph: Any, example: Sequence[torch.Tensor]) -> Callable[..., Any]:
    import torch._inductor.config as inductor
    from torch._inductor.compile_fx import compile_fx

    # One process: a pool of compilers would outlive the load and count against the budget. One
    # thread: what is left between the products is too small to be shared.
    options = {"compile_threads": 1, "size_asserts": False, "cpp.threads": 1}
    with inductor.patch(options), noting_loops():
        compiled: Any = compile_fx(graph, list(example))
        return compiled  # type: ignore[no-any-return]
