"""A recorded decode step answers what the eager model answers, bit for bit, or is not used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import configs
from pretend import Pretend
from pretend.graph import PretendGraph
from resident import Resident
from transformers import StaticCache

from understudy import model as guest
from understudy.captured import Kept, NotCaptured, Step
from understudy.core import ContextTooLong, Forward, LayerEvent, Phase, current_forward
from understudy.engine import Engine, load
from understudy.experts.lookahead import Lookahead

CONTEXT = 40
WINDOW = 8
# One of each kind: plain, window in some layers, in all, latent attention, shared keys, an indexer
# beside the keys, linear attention beside others, one state beside keys in the same layer.
FAMILIES = (
    "qwen3_moe", "olmoe", "gpt_oss", "mixtral", "deepseek_v3", "gemma4", "glm_moe_dsa",
    "qwen3_next", "zaya",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            with pytest.MonkeyPatch.context() as patch:
                for windowed in ("gpt_oss", "mixtral"):
                    patch.setitem(configs.MORE, windowed, {"sliding_window": WINDOW})
                configs.build(family, made[family])
        return made[family]

    return make


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Any]:
    chosen = {"frame": "eager", "max_context": CONTEXT, "slots": 6} | options
    with load(path, "1GiB", **chosen) as model:
        yield model


def record(model: Any, device: Pretend | None = None) -> Step:
    handle = model.understudy
    return Step.record(model, device or Pretend(), handle.runtime, handle.plan.context)


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(5, 90, (1, length), generator=dice)


def answer(model: Any, ids: torch.Tensor, cache: Any, new: int = 12) -> tuple[Any, torch.Tensor]:
    """The tokens, and the logits of every step."""
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=new,
            do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    return out.sequences[0].tolist(), torch.cat(out.logits)


def both(model: Any, step: Step, ids: torch.Tensor, new: int = 12) -> list[Any]:
    """Eager, then repeated, each with the empty cache of the step."""
    found = []
    for captured in (None, step):
        model._captured = captured
        with step.lend() as cache:
            found.append(answer(model, ids, cache, new))
    return found


# ------------------------------------------------------------------------------- the same answers


@pytest.mark.parametrize("family", FAMILIES)
def test_it_answers_as_eager_does(checkpoint: Callable[[str], Path], family: str) -> None:
    with opened(checkpoint(family)) as model:
        step = record(model)
        assert step.exact
        for number, length in enumerate((1, 5, 2 * WINDOW + 1)):
            eager, repeated = both(model, step, prompt(length, seed=number), new=9)
            assert repeated[0] == eager[0]
            assert torch.equal(repeated[1], eager[1])
            assert step.steps == 8 * (number + 1)  # all but what the prompt gave


def test_it_answers_as_eager_does_in_bfloat16(tiny: Callable[..., Path]) -> None:
    with opened(tiny("qwen3_moe", "bfloat16")) as model:
        step = record(model)
        eager, repeated = both(model, step, prompt(5))
        assert step.steps == 11
        assert torch.equal(repeated[1], eager[1])


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "qwen3_next"])
def test_its_cache_is_transformers_static_cache(
    checkpoint: Callable[[str], Path], family: str
) -> None:
    with opened(checkpoint(family)) as model:
        config = guest.text_config(model.config)
        for length in (1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW):
            fixed = StaticCache(config=config, max_cache_len=CONTEXT)
            theirs = answer(model, prompt(length), fixed, 10)[1]
            ours = answer(model, prompt(length), cache := Kept(config, CONTEXT), 10)[1]
            assert torch.equal(ours, theirs)
            assert cache.tokens == length + 9
            growing = answer(model, prompt(length), None, 10)[1]
            torch.testing.assert_close(ours, growing, rtol=1e-4, atol=1e-4)


def test_prompts_in_chunks_fill_a_window(checkpoint: Callable[[str], Path]) -> None:
    with opened(checkpoint("gpt_oss"), prefill_chunk_size=3) as model:
        step = record(model)
        for length in (7, 19):
            eager, repeated = both(model, step, prompt(length))
            assert torch.equal(repeated[1], eager[1])


def test_an_answer_is_not_written_again(checkpoint: Callable[[str], Path]) -> None:
    with opened(checkpoint("qwen3_moe")) as model:
        model._captured = step = record(model)
        answers: list[Any] = []
        before = type(step).__call__

        class Listening(Step):
            def __call__(self, kwargs: Any) -> Any:
                answers.append((out := before(self, kwargs), out.logits.clone()))
                return out

        step.__class__ = Listening
        with step.lend() as cache:
            answer(model, prompt(5), cache)
        assert len(answers) == 11
        assert all(torch.equal(out.logits, logits) for out, logits in answers)
        assert all(out.past_key_values is step.cache for out, _ in answers)


# ------------------------------------------------------------------------------------ the contract


class Spy:
    """A seam that keeps what it is asked, and what look-ahead can make of it."""

    def __init__(self, inner: Any, model: Any) -> None:
        self.inner, self.notes = inner, []
        self.forwards: list[Forward] = []
        modules = model.understudy.anatomy.modules
        self.lookahead = Lookahead(guest.routers(model, modules))

    def begin(self, forward: Forward) -> None:
        self.forwards.append(forward)
        self.inner.begin(forward)

    def end(self, forward: Forward) -> None:
        self.forwards.append(forward)
        self.inner.end(forward)

    def __call__(self, layer: int, hidden: Any, ids: Any, weights: Any) -> Any:
        forward = current_forward.get()
        assert forward is not None
        assert forward is self.forwards[-1]
        event = LayerEvent(forward.step, layer, forward.phase, ids.tolist())
        foreseen = self.lookahead.ask(forward, event, 2, None)
        stream = [float(x.sum()) for _, x in forward.residuals.values()]
        asked = layer, hidden.tolist(), ids.tolist(), weights.tolist(), foreseen, stream
        self.notes.append(asked)
        return self.inner(layer, hidden, ids, weights)


def spied(model: Any) -> Spy:
    spy = Spy(model.understudy.runtime, model)
    for module in guest.guests(model):
        module.seam = spy
    model._announce = guest.announcer(spy)
    guest.watch_residuals(model, model.understudy.anatomy.modules)
    return spy


def test_the_seam_is_asked_as_by_the_eager_model(checkpoint: Callable[[str], Path]) -> None:
    with opened(checkpoint("qwen3_moe")) as model:
        spy = spied(model)
        step = Step.record(model, Pretend(), spy, CONTEXT)
        assert spy.notes == []
        assert spy.forwards == []
        both(model, step, prompt(5))
        eager, repeated = spy.notes[: len(spy.notes) // 2], spy.notes[len(spy.notes) // 2 :]
        assert eager == repeated
        assert all(foreseen for layer, *_, foreseen, _ in repeated if layer < 2)
        assert all(stream for *_, stream in repeated)
        decoded = spy.forwards[-2 * 11 :]
        assert all(begun is ended for begun, ended in zip(decoded[::2], decoded[1::2], strict=True))
        assert all(f.phase is Phase.DECODE and list(f.requests) == [0] for f in decoded)
        steps = [f.step for f in decoded[::2]]
        assert steps == list(range(steps[0], steps[0] + 11))


def test_a_rehearsal_reads_no_expert(checkpoint: Callable[[str], Path]) -> None:
    with opened(checkpoint("olmoe")) as model:
        before = model.understudy.counters
        announce, seams = model._announce, [g.seam for g in guest.guests(model)]
        record(model)
        assert model.understudy.counters == before
        assert model._announce is announce
        assert [g.seam for g in guest.guests(model)] == seams
        assert model._captured is None


def test_a_seam_that_needs_no_host_is_recorded_with_the_rest(
    checkpoint: Callable[[str], Path],
) -> None:
    found = {}
    for capturable in (False, True):
        with opened(checkpoint("qwen3_moe")) as model:
            modules = model.understudy.anatomy.modules
            seam = Resident(modules, model.config.hidden_size, capturable=capturable)
            guest.attach(model, seam, modules)
            device = Counting()
            step = Step.record(model, device, seam, CONTEXT)
            assert len(device.graphs) == (1 if capturable else 1 + len(modules))
            assert bool(seam.begun) == capturable  # it took part in the rehearsal
            seam.begun.clear()
            eager, found[capturable] = both(model, step, prompt(5))
            assert torch.equal(found[capturable][1], eager[1])
            assert seam.begun == sorted(set(seam.begun))
    assert torch.equal(found[True][1], found[False][1])


class Counting(Pretend):
    """Keeps the graphs that it gave out."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs: list[PretendGraph] = []

    def graph(self, shares: Any = None) -> Any:
        assert shares is (self.graphs[-1] if self.graphs else None)
        self.graphs.append(self._graph(shares))
        return self.graphs[-1]

    def _graph(self, shares: Any) -> Any:
        return super().graph(shares)


# ----------------------------------------------------------------------------- when it does not


def test_what_was_not_recorded_runs_eager(checkpoint: Callable[[str], Path]) -> None:
    with opened(checkpoint("qwen3_moe")) as model:
        model._captured = step = record(model)
        expected = answer(model, prompt(5), None)
        assert step.steps == 0  # another cache
        with step.lend() as cache:
            out = model.generate(
                prompt(5), past_key_values=cache, max_new_tokens=12, do_sample=False,
                eos_token_id=None, output_hidden_states=True, return_dict_in_generate=True,
            )  # fmt: skip
        assert step.steps == 0
        assert out.sequences[0].tolist() == expected[0]
        assert len(out.hidden_states) == 12


def test_a_full_context_is_told_as_by_the_eager_model(checkpoint: Callable[[str], Path]) -> None:
    with opened(checkpoint("mixtral")) as model:
        step = record(model)
        for captured in (None, step):
            model._captured = captured
            with step.lend() as cache:
                answer(model, prompt(10), cache, new=CONTEXT - 9)
                assert step.cache.tokens == CONTEXT
            with step.lend() as cache, pytest.raises(ContextTooLong, match="41 tokens exceed"):
                answer(model, prompt(10), cache, new=CONTEXT - 8)


def test_an_error_in_the_seam_spoils_only_its_request(checkpoint: Callable[[str], Path]) -> None:
    with opened(checkpoint("gpt_oss")) as model:
        step = record(model)
        eager, _ = both(model, step, prompt(11))

        def fails(layer: int, *asked: Any) -> Any:
            if layer == 1:
                raise OSError("gone")
            return model.understudy.runtime(layer, *asked)

        step.seam = fails
        with pytest.raises(OSError, match="gone"), step.lend() as cache:
            answer(model, prompt(3), cache)
        assert current_forward.get() is None
        step.seam = model.understudy.runtime
        with step.lend() as cache:
            assert torch.equal(answer(model, prompt(11), cache)[1], eager[1])


def test_a_second_request_has_a_cache_of_its_own(speaking_model: Path) -> None:
    with Engine(speaking_model, memory="1GiB", frame="eager", max_context=64) as engine:
        prompts = ("The first of two", "Another one")
        alone = [engine.generate(p, max_new_tokens=8, keep_logits=True) for p in prompts]
        step = record(engine.model)
        engine.model._captured = step
        inside: list[Any] = []

        def meanwhile(text: str) -> None:
            if not inside:
                inside.append(engine.generate(prompts[1], max_new_tokens=8))

        outside = engine.generate(prompts[0], max_new_tokens=8, on_text=meanwhile)
        assert step.steps == 7
        assert outside.tokens == alone[0].tokens
        assert inside[0].tokens == alone[1].tokens
        again = engine.generate(prompts[1], max_new_tokens=8, keep_logits=True)
        assert step.steps == 14
        assert again.tokens == alone[1].tokens
        torch.testing.assert_close(again.logits, alone[1].logits)
        assert again.decode_counters.steps == alone[1].decode_counters.steps


# ------------------------------------------------------------------------------- why it is not done

REFUSED = {
    "deepseek_v4": "no static cache for layers of type 'heavily_compressed_attention'",
    "inkling": "StaticSlidingWindowAttentionLayer does depends on its length",
    "glm5_next": "its result depends on data",
    "minimax": "cache of its own",
}


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_cannot_be_recorded_say_why(
    checkpoint: Callable[[str], Path], family: str
) -> None:
    with opened(checkpoint(family)) as model:
        before = answer(model, prompt(5), None, new=4)
        seams = [g.seam for g in guest.guests(model)]
        with pytest.raises(NotCaptured, match=REFUSED[family]) as refusal:
            record(model)
        assert "\n" not in str(refusal.value)
        assert model._captured is None
        assert [g.seam for g in guest.guests(model)] == seams
        assert torch.equal(answer(model, prompt(5), None, new=4)[1], before[1])


class Forgetful(Counting):
    """A device whose third graph does nothing when it is replayed."""

    def _graph(self, shares: Any) -> Any:
        graph = super()._graph(shares)
        if len(self.graphs) == 2:
            graph.replay = lambda: None
        return graph


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_step_that_answers_differently_is_not_used(
    checkpoint: Callable[[str], Path], family: str
) -> None:
    with opened(checkpoint(family)) as model, pytest.raises(NotCaptured, match="differently, by"):
        record(model, Forgetful())


def test_other_attention_and_short_contexts_are_refused(checkpoint: Callable[[str], Path]) -> None:
    with opened(checkpoint("qwen3_moe")) as model:
        seam = model.understudy.runtime
        with pytest.raises(NotCaptured, match="8 tokens of context are too few"):
            Step.record(model, Pretend(), seam, 8)
        model.config._attn_implementation_internal = "flex_attention"
        with pytest.raises(NotCaptured, match="flex_attention attention needs another cache"):
            Step.record(model, Pretend(), seam, CONTEXT)
