"""The frame compiled: what a decoder layer does around attention and experts, as one call.

    recorder    watches one eager step            operators    attention and experts
    tracing     the layer as compiled code        program      its calls, repeated by C
    kept        those calls on disk, for the next start

Knows: transformers' decoder layers, which of them look alike. Does not know: experts, budgets,
policies. Decode steps of one sequence only; everything else runs eager.

A layer of one token is some seventy small operations; in eager mode their dispatch costs more than
their arithmetic. So the layer is traced once with its parameters as inputs, compiled, and called
for every layer that looks the same:

    norm, q, k, v, rotary -> [attend] -> o, norm, router -> [experts] -> residual

The two brackets are opaque operators: they call the cache and the attention function of
transformers, and the seam. So any cache, any mask and any attention works, and nothing in the
compiled code depends on how long the text is. What was compiled is kept on disk: a second start
needs no compiler.

Compiled code rounds less often than eager code, so the frame is part of what fixes the bits: it is
decided at load, by the model and the machine alone, and is the same for every budget. Each layer is
compared with eager mode before it is used; a layer that cannot be traced, or answers differently,
stays eager, and `Frame.eager` says why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from understudy import native
from understudy.frame import kept
from understudy.frame.operators import OPAQUE, Call, Site, call_under_way
from understudy.frame.program import Notes, NotNoted, Program, Tape
from understudy.frame.recorder import NotCompiled, Recorder, recording
from understudy.frame.tracing import Inputs, compile_graph, multiply_with, state_of, trace

TOLERANCE = 0.03  # of the largest number; bf16 code that rounds elsewhere stays well under it
PROMPT = 4  # tokens before the step that is recorded


class Code:
    """What layers that look alike share: inductor's function, and its steps if they were noted.
    Steps that were kept on disk need no function."""

    def __init__(self, function: Callable[..., Any] | None, inputs: Inputs) -> None:
        self.function, self.inputs = function, inputs
        self.program: Program | None = None
        self.why_not = "" if native.library() is not None else "no C compiler"  # no program

    @classmethod
    def of(cls, notes: Notes, inputs: Inputs, arguments: int) -> Code:
        code = cls(None, inputs)
        code.program = Program(notes, arguments, OPAQUE)
        return code

    def note(self, call: Call, tensors: Sequence[torch.Tensor]) -> None:
        """Run once and keep the steps. ``tensors``: those of the call, then the parameters."""
        assert self.function is not None
        try:
            with Tape(tensors) as tape:
                (out,) = self.function(torch.tensor(call.index), *tensors)
            self.program = Program(tape.notes(out), len(tensors), OPAQUE)
        except NotNoted as e:
            self.why_not = str(e)


class CompiledLayer:
    """Stands before a decoder layer's ``forward``: one token of one sequence runs compiled."""

    def __init__(self, layer: nn.Module, index: int, site: Site, code: Code) -> None:
        self.eager = layer.forward
        self.index, self.site, self.code, self.inputs = index, site, code, code.inputs
        self.state = list(state_of(layer).values())
        self.number = torch.tensor(index)
        self.shape, self.dtype = site.args[0].shape, site.args[0].dtype
        self.bases: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden, cache = args[0], kwargs.get("past_key_values")
        if hidden.shape != self.shape or hidden.dtype != self.dtype:
            return self.eager(*args, **kwargs)  # type: ignore[no-any-return]
        if cache is None or torch.is_grad_enabled():
            return self.eager(*args, **kwargs)  # type: ignore[no-any-return]
        if any(kwargs.get(name) != value for name, value in self.inputs.constants):
            return self.eager(*args, **kwargs)  # type: ignore[no-any-return]
        return self.run(args, kwargs, cache)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], cache: Any) -> torch.Tensor:
        call = Call(self.index, self.site, cache, kwargs.get("attention_mask"))
        tensors = self.inputs.gather(args, kwargs)
        program = self.code.program
        if program is not None:
            return program.run(self._bases(program, tensors), call)
        assert self.code.function is not None
        token = call_under_way.set(call)
        try:
            (out,) = self.code.function(self.number, *tensors, *self.state)
            return out  # type: ignore[no-any-return]
        finally:
            call_under_way.reset(token)

    def note(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], cache: Any) -> None:
        """Let the code keep its steps while this layer runs once."""
        call = Call(self.index, self.site, cache, kwargs.get("attention_mask"))
        token = call_under_way.set(call)
        try:
            self.code.note(call, [*self.inputs.gather(args, kwargs), *self.state])
        finally:
            call_under_way.reset(token)

    def _bases(self, program: Program, tensors: Sequence[torch.Tensor]) -> Any:
        """The addresses of a call: those of the parameters never change."""
        if self.bases is None:
            self.bases = program.bases([*tensors, *self.state])
        bases = type(self.bases).from_buffer_copy(self.bases)
        for place, tensor in enumerate(tensors):
            bases[place] = tensor.data_ptr()
        return bases


@dataclass(frozen=True)
class Frame:
    """``compiled``: how many decoder layers run compiled; ``eager``: why the others do not;
    ``called``: why some compiled ones are called through inductor's Python, not repeated by C."""

    compiled: int
    eager: tuple[str, ...]
    called: tuple[str, ...] = ()


def compile_frame(
    model: Any,
    config: Any,
    guests: Sequence[Any],
    routers: Sequence[nn.Module | None],
    products: Any = None,
    say: Callable[[str], None] = lambda line: None,
) -> Frame:
    """Replace the forward of every decoder layer that allows it. ``config``: of the text model.
    ``products``: an operator for products of one row, where there is a better one than torch's.
    ``say``: told before anything is compiled, which takes a while."""
    try:
        layers = _decoder_layers(model, guests)
        recorder = Recorder(layers)
        with torch.no_grad(), recording(recorder, config, guests):
            before = _record(model, recorder, routers)
            workshop = _Workshop(recorder, config, guests, products, before, say)
            frame = _compile_layers(workshop, layers)
        _replace_head(model, products)
        return frame
    except NotCompiled as e:
        return Frame(0, (str(e),))


def calls_from_torch(model: nn.Module) -> bool:
    """Whether some layer runs through inductor's Python, where the experts are called from inside
    torch. A fiber that is left there ends the process."""
    forwards = (vars(module).get("forward") for module in model.modules())
    return any(isinstance(f, CompiledLayer) and f.code.program is None for f in forwards)


class _Head:
    """The output embeddings, for one token: the largest dense matrix of most models."""

    def __init__(self, head: nn.Linear, products: Any) -> None:
        self.eager, self.weight, self.products = head.forward, head.weight, products

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() != x.shape[-1] or x.dtype != self.weight.dtype or torch.is_grad_enabled():
            return self.eager(x)
        out: torch.Tensor = self.products(x.view(1, -1), [self.weight])
        return out.view(*x.shape[:-1], -1)


def _replace_head(model: Any, products: Any) -> None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if products is not None and type(head) is nn.Linear and head.bias is None:
        head.forward = _Head(head, products)  # type: ignore[method-assign]


def _decoder_layers(model: nn.Module, guests: Sequence[Any]) -> list[nn.Module]:
    names = {id(m): n for n, m in model.named_modules()}
    found = {names[id(g)].partition(".layers.")[0] + ".layers" for g in guests}
    if len(found) != 1:
        raise NotCompiled("experts in more than one stack of layers")
    try:
        layers: Any = model.get_submodule(found.pop())
        return list(layers)
    except AttributeError:
        raise NotCompiled("no list of decoder layers") from None


def _compile_layers(workshop: _Workshop, layers: Sequence[nn.Module]) -> Frame:
    good, reasons = [], []
    for index, (layer, site) in enumerate(zip(layers, workshop.recorder.sites, strict=True)):
        try:
            good.append((layer, workshop.compiled(index, layer, site)))
        except NotCompiled as e:
            reasons.append(f"layer {index}: {e}")
    for layer, compiled in good:
        compiled.site.args, compiled.site.kwargs, compiled.site.out = (), {}, None
        layer.forward = compiled
    called = dict.fromkeys(c.code.why_not for _, c in good if c.code.program is None)
    return Frame(len(good), tuple(reasons), tuple(called))


def _record(model: Any, recorder: Recorder, routers: Sequence[nn.Module | None]) -> Any:
    """Run a prompt, then one token that is watched. Returns the cache as it was before it."""
    try:
        ids = torch.arange(1, PROMPT + 1).unsqueeze(0)
        cache = model(input_ids=ids, use_cache=True).past_key_values
        before = copy.deepcopy(cache)
        with recorder.watching(routers):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        return before
    except (TypeError, ValueError, RuntimeError, AttributeError) as e:
        raise NotCompiled(f"one token cannot be run by itself: {_line(e)}") from e


class _Workshop:
    """Where the layers of one model get their code: that of a layer that looks the same, what an
    earlier start kept, or new. ``before``: the cache as it was before the recorded step."""

    def __init__(
        self,
        recorder: Recorder,
        config: Any,
        guests: Sequence[Any],
        products: Any,
        before: Any,
        say: Callable[[str], None],
    ) -> None:
        self.recorder, self.config, self.guests = recorder, config, guests
        self.products, self.before, self.say = products, before, say
        self.codes: dict[Any, Code] = {}

    def compiled(self, index: int, layer: nn.Module, site: Site) -> CompiledLayer:
        """``layer`` ready to run compiled, checked; raises `NotCompiled`."""
        self._fits(layer, site)
        inputs = Inputs.of(site)
        shapes = tuple((n, t.shape, t.dtype) for n, t in state_of(layer).items())
        key = (type(layer), inputs, shapes)
        if key in self.codes:
            return self._checked(CompiledLayer(layer, index, site, self.codes[key]))
        given = [(t.shape, t.dtype, t.stride()) for t in inputs.gather(site.args, site.kwargs)]
        facts = (inputs, shapes, given, self.products is not None)
        name = kept.name_of(layer, self.config, facts)
        found = self._as_kept(name, index, layer, site, inputs) or self._new(
            name, index, layer, site, inputs
        )
        self.codes[key] = found.code
        return found

    def _fits(self, layer: nn.Module, site: Site) -> None:
        if site.attention is None or not site.args or not isinstance(site.out, torch.Tensor):
            raise NotCompiled("it does not call transformers' attention, or answers with a tuple")
        site.experts = next((m for m in layer.modules() if m in self.guests), None)
        if site.experts is not None and site.router_shape is None:
            raise NotCompiled("its router reads something else than its experts")

    def _as_kept(
        self, name: str, index: int, layer: nn.Module, site: Site, inputs: Inputs
    ) -> CompiledLayer | None:
        """As an earlier start kept it; ``None``: none did, or what it kept is no good."""
        notes = kept.find(name) if native.library() is not None else None
        if notes is None:
            return None
        try:
            code = Code.of(notes, inputs, len(inputs.tensors) + len(state_of(layer)))
            return self._checked(CompiledLayer(layer, index, site, code))
        except (NotCompiled, NotNoted, OSError, AttributeError, KeyError):
            kept.forget(name)
            return None

    def _new(
        self, name: str, index: int, layer: nn.Module, site: Site, inputs: Inputs
    ) -> CompiledLayer:
        """Traced, compiled, noted, checked and kept."""
        if not self.codes:
            self.say("compiling the decoder layers (once per machine, then read from the cache)")
        example = (*inputs.gather(site.args, site.kwargs), *state_of(layer).values())
        try:
            graph = trace(layer, site, inputs, self.recorder)
            if self.products is not None:
                multiply_with(self.products, graph)
            code = Code(compile_graph(graph, (torch.tensor(0), *example)), inputs)
        except NotCompiled:
            raise
        except Exception as e:  # whatever a tracer and two compilers may raise
            raise NotCompiled(f"it cannot be compiled: {_line(e)}") from e
        made = CompiledLayer(layer, index, site, code)
        if not code.why_not:
            made.note(site.args, site.kwargs, copy.deepcopy(self.before))
        self._checked(made)
        if code.program is not None:
            why_not = kept.keep(name, code.program.notes)
            if why_not:
                self.say(f"note: the next start will compile again, nothing is kept in {why_not}")
        return made

    def _checked(self, compiled: CompiledLayer) -> CompiledLayer:
        """The recorded step again, compiled: same numbers but for rounding?"""
        site = compiled.site
        try:
            out = compiled.run(site.args, site.kwargs, copy.deepcopy(self.before))
        except Exception as e:
            raise NotCompiled(f"its compiled code fails: {_line(e)}") from e
        assert site.out is not None and out.shape == site.out.shape
        error = (out.float() - site.out.float()).abs().max()
        if not error <= TOLERANCE * site.out.float().abs().max():
            raise NotCompiled("its compiled code answers differently")
        return compiled


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
