"""Weights written as GGUF are read back equal, and llama.cpp computes what transformers does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from understudy.demo import models_folder
from understudy.texts import python_docs

gguf = pytest.importorskip("gguf")

from bench.peers import gguf_file  # noqa: E402


@pytest.fixture(scope="module", params=["fine", "coarse"])
def model(request) -> Path:
    return models_folder() / request.param


def test_matrices_come_back_bit_by_bit(model, tmp_path) -> None:
    path = tmp_path / "model.gguf"
    gguf_file.write(model, path, "bf16")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    stored = gguf_file.Stored(model)
    ends = ("experts.3.up_proj.weight", "experts.3.w3.weight")
    part = next(name for name in stored.names if name.endswith(ends))
    theirs = np.array(found["blk.0.ffn_up_exps.weight"].data[3])
    assert torch.equal(torch.from_numpy(theirs).view(torch.bfloat16), stored.tensor(part))
    norm = stored.tensor("model.norm.weight").float().numpy()
    assert np.array_equal(found["output_norm.weight"].data, norm)
    assert not list(tmp_path.glob(".*"))  # nothing half-written stays


def test_llama_cpp_prefers_the_same_tokens(model, tmp_path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "model.gguf"
    gguf_file.write(model, path, "bf16")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = tokenizer(python_docs()[:2000]).input_ids[:128]
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        expected = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
    llama = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False)
    llama.eval(ids)
    got = torch.from_numpy(np.array(llama.scores[: len(ids)])).log_softmax(-1)
    assert (expected.argmax(-1) == got.argmax(-1)).float().mean() > 0.95
    assert (expected.exp() * (expected - got)).sum(-1).mean() < 0.005
    text = python_docs()[:300]
    assert llama.tokenize(text.encode(), add_bos=False) == tokenizer(text).input_ids


def test_an_unknown_format_or_family_is_refused(model, tmp_path) -> None:
    with pytest.raises(ValueError, match="q2_k"):
        gguf_file.write(model, tmp_path / "x.gguf", "q2_k")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="gpt2"):
        gguf_file.write(tmp_path, tmp_path / "x.gguf", "bf16")
