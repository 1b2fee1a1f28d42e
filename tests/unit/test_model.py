"""The guest in transformers: what it is, what it refuses, and that nothing of it leaks out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralForCausalLM,
    MixtralPreTrainedModel,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TextStreamer,
    pipeline,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral import modeling_mixtral

from understudy import model as guest
from understudy.core import NotInThisModel, UnderstudyError
from understudy.engine import load


@pytest.fixture
def model(tiny: Callable[..., Path]) -> Iterator[Any]:
    with load(tiny("mixtral"), "1GiB", slots=6) as opened:
        yield opened


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**batch).logits


# --------------------------------------------------------------------------------------- what it is


def test_it_is_a_model_of_its_family(model: Any) -> None:
    assert isinstance(model, PreTrainedModel)
    assert isinstance(model, MixtralPreTrainedModel)
    assert isinstance(model, MixtralForCausalLM)
    assert type(model).__name__ == "MixtralForCausalLM"
    assert model.config.model_type == "mixtral"
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_no_expert_is_among_its_parameters(model: Any, tiny: Callable[..., Path]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny("mixtral"))
    own = {name: p.shape for name, p in model.named_parameters()}
    dense = {n: p.shape for n, p in plain.named_parameters() if ".experts." not in n}
    assert own == dense
    assert len(own) < len(dict(plain.named_parameters()))


def test_dense_weights_and_buffers_are_those_of_the_checkpoint(
    model: Any, tiny: Callable[..., Path]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny("mixtral"))
    expected = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_weights_are_memory_not_a_mapped_file(tiny: Callable[..., Path], dtype: str) -> None:
    with load(tiny("mixtral", dtype), "1GiB", slots=6) as model:
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        files = [m[0].split("-") for m in maps if m[-1].endswith(".safetensors")]
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            at = tensor.data_ptr()
            assert not any(int(a, 16) <= at < int(b, 16) for a, b in files), name


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=2, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    with load(tmp_path, "1GiB") as model:
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


# --------------------------------------------------------------------------------- what it refuses


def saving(model: Any) -> None:
    model.save_pretrained("never-written")


REFUSED: dict[str, Callable[[Any], object]] = {
    "save_pretrained": saving,
    "push_to_hub": lambda m: m.push_to_hub("nobody/nothing"),
    "state_dict": lambda m: m.state_dict(),
    "load_state_dict": lambda m: m.load_state_dict({}),
    "to(dtype)": lambda m: m.to(torch.bfloat16),
    "to(dtype=)": lambda m: m.to(dtype=torch.float16),
    "to(meta)": lambda m: m.to("meta"),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "train": lambda m: m.train(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_all_experts_is_refused_in_one_line(
    model: Any, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotInThisModel, match="from_pretrained") as error:
        REFUSED[what](model)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    assert not model.training
    assert model.dtype == torch.float32


def test_what_changes_nothing_is_allowed(model: Any, tokens: Callable[..., Any]) -> None:
    before = logits(model, tokens(5))
    assert model.to("cpu") is model
    assert model.to(torch.float32) is model
    assert model.cpu() is model
    assert model.eval() is model
    assert model.train(False) is model
    assert torch.equal(logits(model, tokens(5)), before)


# -------------------------------------------------------------------------------------- the end


def test_a_with_block_closes_it(tiny: Callable[..., Path], tokens: Callable[..., Any]) -> None:
    with load(tiny("mixtral"), "1GiB", slots=6) as model:
        threads = model.understudy.runtime.transfer._threads
        logits(model, tokens(4))
    assert model.understudy.closed
    assert not any(t.is_alive() for t in threads)
    model.understudy.close()  # again: harmless


@pytest.mark.parametrize("slots", [6, 24])
def test_a_closed_model_says_so(
    tiny: Callable[..., Path], tokens: Callable[..., Any], slots: int
) -> None:
    with load(tiny("mixtral"), "1GiB", slots=slots) as model:
        logits(model, tokens(4))
    with pytest.raises(UnderstudyError, match="closed") as error:
        logits(model, tokens(4))
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------- nothing leaks


def test_a_later_plain_load_is_a_plain_model(
    tiny: Callable[..., Path], tokens: Callable[..., Any]
) -> None:
    folder, prompt = tiny("mixtral"), tokens(6)
    before = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    with load(folder, "1GiB", slots=6) as model:
        after = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
        logits(model, prompt)
        assert guest.guests(after) == []
        for (n, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True):
            assert torch.equal(a, b), n
        assert torch.equal(logits(before, prompt), logits(after, prompt))
        after.train()  # all of these are its own again
        assert len(after.state_dict()) == len(before.state_dict())


def test_a_failed_load_leaves_no_patch(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = modeling_mixtral.MixtralExperts

    def fail(*args: Any, **kwargs: Any) -> None:
        assert modeling_mixtral.MixtralExperts is not plain  # it is there while loading
        raise RuntimeError("interrupted")

    monkeypatch.setattr(MixtralForCausalLM, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        load(tiny("mixtral"), "1GiB")
    assert modeling_mixtral.MixtralExperts is plain


def test_the_name_is_registered_beside_transformers_own(model: Any) -> None:
    assert guest.IMPLEMENTATION in ALL_EXPERTS_FUNCTIONS
    assert "grouped_mm" in ALL_EXPERTS_FUNCTIONS


def test_two_guests_at_once(tiny: Callable[..., Path], tokens: Callable[..., Any]) -> None:
    prompt = tokens(6)
    names = ["mixtral", "qwen3_moe", "mixtral"]
    alone = []
    for name in names:
        with load(tiny(name), "1GiB", slots=5) as model:
            alone.append(logits(model, prompt))
    together = [load(tiny(name), "1GiB", slots=5) for name in names]
    assert isinstance(together[1], Qwen3MoeForCausalLM)
    for _ in range(2):
        for model, expected in zip(together, alone, strict=True):
            assert torch.equal(logits(model, prompt), expected)
    together[0].understudy.close()
    assert torch.equal(logits(together[2], prompt), alone[2])
    for model in together:
        model.understudy.close()


# ---------------------------------------------------------------------- living in transformers


class Words:
    """A tokenizer of sorts: a token is its number."""

    pad_token_id, eos_token_id = 0, None

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(i)) for i in torch.as_tensor(ids).reshape(-1)) + " "


def test_a_text_streamer_hears_every_token(
    model: Any, tokens: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tokens(5)
    with torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=6, do_sample=False)
        model.generate(
            **prompt,
            max_new_tokens=6,
            do_sample=False,
            streamer=TextStreamer(Words(), skip_prompt=True),
        )
    assert capsys.readouterr().out.split() == [str(i) for i in out[0, 5:].tolist()]


def test_a_pipeline_runs_it(tiny: Callable[..., Path]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(96)}, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", unk_token="t3")
    found = []
    with load(tiny("mixtral"), "1GiB", slots=6) as model:
        for m in (model, AutoModelForCausalLM.from_pretrained(tiny("mixtral"))):
            generate = pipeline("text-generation", model=m, tokenizer=tokenizer)
            found.append(generate("t5 t9 t11", max_new_tokens=5, do_sample=False))
    assert found[0] == found[1]
    assert found[0][0]["generated_text"].count("t") == 3 + 5


def test_router_logits_are_recorded_once_per_layer_though_routers_are_asked_ahead(
    tiny: Callable[..., Path], tokens: Callable[..., Any]
) -> None:
    prompt = tokens(6)
    for name in ("mixtral", "qwen3_moe"):
        plain = AutoModelForCausalLM.from_pretrained(tiny(name), experts_implementation="eager")
        with (
            load(tiny(name), "1GiB", slots=6, depth=2, self_switch=False) as model,
            torch.inference_mode(),
        ):
            found = model(**prompt, output_router_logits=True).router_logits
            expected = plain(**prompt, output_router_logits=True).router_logits
            assert model.understudy.counters.prefetch_issued > 0
            assert model.understudy.policies["lookahead_unavailable"] == {}
        assert len(found) == len(expected) == model.config.num_hidden_layers
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_events_carry_what_the_next_router_will_say(
    tiny: Callable[..., Path], tokens: Callable[..., Any]
) -> None:
    with load(tiny("qwen3_moe"), "1GiB", slots=6, depth=2, self_switch=False) as model:
        model.understudy.start_recording()
        logits(model, tokens(6))
        events = model.understudy.stop_recording()
    assert [sorted(e.lookahead) for e in events] == [[1, 2], [2, 3], [3], []]
    for e in events:
        for ids, weights in e.lookahead.values():
            assert (len(ids), len(ids[0])) == (len(weights), len(weights[0])) == (6, 2)
