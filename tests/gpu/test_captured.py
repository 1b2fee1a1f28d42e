"""A decode step recorded by a real device: what a pretended one cannot show is that its kernels can
be recorded, and that the same work in a graph gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import configs
from resident import Resident

from understudy import model as guest
from understudy.captured import NotCaptured, Step
from understudy.engine import load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here"),
]

CONTEXT = 64
DEVICE = "cuda"


def device() -> Any:
    from understudy.experts.device.cuda import open_cuda

    return open_cuda(DEVICE)


@contextmanager
def opened(path: Path, capturable: bool) -> Iterator[tuple[Any, Resident]]:
    with load(path, "1GiB", frame="eager", max_context=CONTEXT) as model:
        torch.nn.Module.to(model, DEVICE)
        modules = model.understudy.anatomy.modules
        width = guest.text_config(model.config).hidden_size
        seam = Resident(modules, width, device=DEVICE, dtype=model.dtype, capturable=capturable)
        guest.attach(model, seam, modules)
        yield model, seam


def answer(model: Any, cache: Any) -> torch.Tensor:
    """The logits of every step; all runs are told the same tokens."""

    def count_on(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, ids.shape[1] % 90] = 0.0
        return forced

    with torch.inference_mode():
        out = model.generate(
            torch.arange(7, 12, device=DEVICE)[None], past_key_values=cache, disable_compile=True,
            max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0,
            logits_processor=[count_on], return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    return torch.cat(out.logits)


@pytest.mark.parametrize("capturable", [False, True], ids=["cut", "whole"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_it_answers_as_eager_does(
    family: str,
    capturable: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.setitem(configs.MORE, "gpt_oss", {"sliding_window": 16})
    configs.build(family, tmp_path)
    with opened(tmp_path, capturable) as (model, seam):
        step = Step.record(model, device(), seam, CONTEXT)
        answers = []
        for captured in (None, step):
            model._captured = captured
            with step.lend() as cache:
                answers.append(answer(model, cache))
        assert step.steps == 29
        record_property("exact", step.exact and torch.equal(*answers))
        torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-4)


def test_a_refused_recording_leaves_the_device_as_it_was(tmp_path: Path) -> None:
    configs.build("glm5_next", tmp_path)  # its forward waits for a shape
    with opened(tmp_path, False) as (model, seam):
        before = answer(model, None)
        with pytest.raises(NotCaptured):
            Step.record(model, device(), seam, CONTEXT)
        torch.testing.assert_close(answer(model, None), before)
        torch.rand(1, device=DEVICE)  # torch itself goes on refusing that after such an end
