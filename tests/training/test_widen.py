"""A wide twin computes what the original computes, and appears whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from understudy import widen as module
from understudy.widen import twin_bytes, widen

COMMON = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def _mixtral() -> PreTrainedModel:
    # No head_dim: the twin must not derive another one from its own hidden size.
    return MixtralForCausalLM(MixtralConfig(intermediate_size=48, num_local_experts=8, **COMMON))


def _qwen3() -> PreTrainedModel:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            moe_intermediate_size=24, intermediate_size=40, num_experts=8, norm_topk_prob=True,
            head_dim=16, tie_word_embeddings=True, mlp_only_layers=[1], attention_bias=True,
            rms_norm_eps=1e-3, **COMMON,
        )
    )  # fmt: skip


MAKERS = {"mixtral": _mixtral, "qwen3_moe": _qwen3}


@pytest.fixture(params=[(family, dtype) for family in MAKERS for dtype in ("float32", "bfloat16")],
                ids="-".join)  # fmt: skip
def original(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family, dtype = request.param
    torch.manual_seed(0)
    model = MAKERS[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that routing and logits are far from even; norms and biases not trivial.
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1.0))
    folder = tmp_path / "original"
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="100KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def _run(folder: Path) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """(logits, chosen experts per MoE layer, greedy continuation)."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    tokens = torch.randint(1, 101, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(tokens, output_router_logits=True)
        greedy = model.generate(tokens, max_new_tokens=12, do_sample=False)
    chosen = [one.topk(2, dim=-1).indices for one in out.router_logits]
    return out.logits, chosen, greedy


def test_same_logits_routing_and_text(original: Path, tmp_path: Path) -> None:
    widen(original, tmp_path / "twin", hidden_multiple=4, expert_multiple=2)
    logits, chosen, greedy = _run(original)
    twin_logits, twin_chosen, twin_greedy = _run(tmp_path / "twin")
    torch.testing.assert_close(twin_logits, logits, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(chosen, twin_chosen, strict=True))
    assert torch.equal(greedy, twin_greedy)


def test_sizes_files_and_promised_bytes(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 200_000)
    seen: list[tuple[int, int]] = []
    twin = tmp_path / "twin"
    promised = twin_bytes(original, 4, 2)
    widen(original, twin, 4, 2, lambda done, total: seen.append((done, total)))
    assert promised == sum(path.stat().st_size for path in twin.iterdir())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert (twin / "tokenizer.json").read_text() == "{}"
    index = json.loads((twin / module.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 1
    for path in twin.glob("*.safetensors"):
        assert path.stat().st_blocks * 512 >= path.stat().st_size, "sparse"


def test_deterministic(original: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        widen(original, tmp_path / name, 4, 2)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_nothing_half_written(original: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        widen(original, tmp_path / "twin", 4, 2, interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]
    (tmp_path / "twin").mkdir()
    with pytest.raises(FileExistsError):
        widen(original, tmp_path / "twin", 4, 2)


@pytest.mark.parametrize("multiple", [0, 2, 3, 9, -4])
def test_inexact_multiples_are_refused(original: Path, tmp_path: Path, multiple: int) -> None:
    with pytest.raises(ValueError, match="power of four"):
        widen(original, tmp_path / "twin", multiple, 2)


def test_unknown_tensor_is_refused(original: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"model.layers.0.mlp.shared.weight": torch.ones(2, 2)}, original / "x.safetensors")
    with pytest.raises(ValueError, match="no rule"):
        widen(original, tmp_path / "twin", 4, 2)
