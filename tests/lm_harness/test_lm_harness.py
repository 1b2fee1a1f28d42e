"""Understudy inside lm-eval: one small local task, and scores beside plain transformers'."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# Nothing here may go to the network; read when `datasets` and `huggingface_hub` are imported.
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytest.importorskip(
    "lm_eval", reason="lm-eval is not installed (pip install 'understudy[lm-eval]')"
)

from understudy.core import UnderstudyError
from understudy.lm_harness import UnderstudyLM

HERE = Path(__file__).parent
SMALL = {"memory": "100%", "slots": 16, "max_context": 64, "threads": 1, "kernel": "torch"}
DROP = "buddy:stand_in=drop:percentile=0:beta=1.1"


@pytest.fixture
def opened(speaking_model: Path) -> Iterator[Callable[..., UnderstudyLM]]:
    made: list[UnderstudyLM] = []

    def make(**more: Any) -> UnderstudyLM:
        made.append(UnderstudyLM(str(speaking_model), **{**SMALL, **more}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def asked(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


@pytest.fixture
def plain(speaking_model: Path) -> Callable[[list[int]], torch.Tensor]:
    """Log-probabilities of every next token, by one forward of the model itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(speaking_model).eval()

    def score(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return found

    return score


# -------------------------------------------------------------------------------------- the task


def test_a_local_task_runs(tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    fine = HERE.parents[1] / "models" / "fine"
    if not fine.is_dir():
        pytest.skip("models/fine is not here")
    task = (HERE / "largest.yaml").read_text()
    task = task.replace("largest.jsonl", str(HERE / "largest.jsonl"))
    task = task.replace(
        "dataset_kwargs:\n", f"dataset_kwargs:\n  cache_dir: {tmp_path / 'cache'}\n"
    )
    (tmp_path / "largest.yaml").write_text(task)
    found = lm_eval.simple_evaluate(
        model="understudy",
        model_args={"model": str(fine), "memory": "50%", "threads": 1},
        tasks=["understudy_largest"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found["results"]["understudy_largest"]["acc,none"] == 1.0
    assert found["config"]["model"] == "understudy"
    assert found["config"]["understudy_policies"]["route"] == "as-routed"
    assert found["config"]["understudy_substituted"] == 0
    assert found["config"]["understudy_tokens"] > 0


def test_its_command_line_knows_the_model() -> None:
    # lm-eval's own command line reads hundreds of task files first: here it only looks us up.
    code = (
        "import runpy, lm_eval.__main__ as theirs; from lm_eval.api.registry import get_model;"
        "theirs.cli_evaluate = lambda: get_model('understudy')();"
        "runpy.run_module('understudy.lm_harness', run_name='__main__')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "error: name one model: --model_args model=FOLDER"


# -------------------------------------------------------------------------------------- scoring


def test_likelihoods_are_those_of_the_model(
    opened: Callable[..., UnderstudyLM], plain: Callable[[list[int]], torch.Tensor]
) -> None:
    lm = opened()
    pairs = [("the cat", " sat on"), ("a", "b"), ("two words ", "and more"), ("", "alone")]
    for (context, continuation), (found, greedy) in zip(
        pairs, lm.loglikelihood(asked(*pairs), disable_tqdm=True), strict=True
    ):
        front = lm.tok_encode(context.rstrip()) or [lm.prefix_token_id]
        ids = [*front, *lm.tok_encode((context + continuation)[len(context.rstrip()) :])]
        rows = plain(ids)[len(front) - 1 : -1]
        following = torch.tensor(ids[len(front) :])
        expected = float(rows.gather(1, following[:, None]).sum())
        assert found == pytest.approx(expected, abs=1e-3)
        assert greedy == bool((rows.argmax(-1) == following).all())


def test_what_the_model_would_say_is_greedy(
    opened: Callable[..., UnderstudyLM], plain: Callable[[list[int]], torch.Tensor]
) -> None:
    lm = opened()
    ids = lm.tok_encode("once upon")
    best = int(plain(ids)[-1].argmax())
    _, greedy = lm._score(ids, [best])
    _, other = lm._score(ids, [(best + 1) % 250])
    assert greedy and not other


def test_long_texts_are_scored_in_windows(
    opened: Callable[..., UnderstudyLM], plain: Callable[[list[int]], torch.Tensor]
) -> None:
    lm = opened()  # 64 tokens of context: 63 predicted after the prefix
    text = "abcdefghij" * 10
    (found,) = lm.loglikelihood_rolling(asked((text,)), disable_tqdm=True)
    ids = lm.tok_encode(text)
    first = [lm.prefix_token_id, *ids[:63]]
    second = ids[len(ids) - 64 :]  # 37 are left; the rest of the window is their context
    expected = float(plain(first)[:-1].gather(1, torch.tensor(first[1:])[:, None]).sum())
    rows = plain(second)[:-1].gather(1, torch.tensor(second[1:])[:, None])
    expected += float(rows[-(len(ids) - 63) :].sum())
    assert found == pytest.approx(expected, abs=2e-3)


def test_a_context_that_is_too_long_loses_its_beginning(
    opened: Callable[..., UnderstudyLM], caplog: pytest.LogCaptureFixture
) -> None:
    lm = opened()
    long = lm.tok_encode("x" * 50 + "0123456789" * 6)
    assert lm._score(long, [100]) == lm._score(long[-63:], [100])
    assert "context cut from 110 to its last 63 tokens" in caplog.text
    with pytest.raises(UnderstudyError, match="raise max_context"):
        lm._score([5], list(range(64)))


def test_a_lossy_policy_acts_even_where_one_token_is_scored(
    opened: Callable[..., UnderstudyLM],
) -> None:
    exact, lossy = opened(), opened(policy=DROP)
    pairs = [("Question: which?\nAnswer:", letter) for letter in "ABCD"]
    one, other = (lm.loglikelihood(asked(*pairs), disable_tqdm=True) for lm in (exact, lossy))
    assert one != other
    info = lossy.get_model_info()
    assert info["understudy_policy"] == DROP
    assert info["understudy_skipped"] > 0
    assert exact.get_model_info()["understudy_skipped"] == 0


def test_arguments_as_lm_eval_splits_them(speaking_model: Path) -> None:
    told = f"model={speaking_model},policy={DROP},memory=100%,slots=8,max_context=64,kernel=torch"
    lm = UnderstudyLM.create_from_arg_string(told, {"batch_size": 1, "device": None})
    handle = lm.engine.model.understudy
    assert handle.plan.slots == 8
    assert handle.policies["route"] == DROP
    lm.close()
    other = UnderstudyLM.create_from_arg_string(f"model={speaking_model},predictor=none,slots=8")
    assert other.engine.model.understudy.policies["predictor"] == "none"
    other.close()


# ------------------------------------------------------------------------------------- answering


def test_answers_are_greedy_and_end_where_asked(opened: Callable[..., UnderstudyLM]) -> None:
    lm = opened()
    whole = lm.engine.generate("hello", max_new_tokens=8).text
    (same, cut) = lm.generate_until(
        asked(("hello", {"max_gen_toks": 8}), ("hello", {"until": [whole[3]], "max_gen_toks": 8})),
        disable_tqdm=True,
    )
    assert same == whole
    assert cut == whole[: whole.index(whole[3])]


def test_settings_that_do_not_exist_here_are_refused(opened: Callable[..., UnderstudyLM]) -> None:
    with pytest.raises(UnderstudyError, match="num_beams is not supported"):
        opened().generate_until(asked(("hello", {"num_beams": 4})), disable_tqdm=True)


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ({}, "name one model"),
        ({"model": "a", "pretrained": "b"}, "name one model"),
        ({"model": "a", "batch_size": 8}, "one sequence at a time"),
        ({"model": "a", "device": "cuda"}, "leave out --device cuda"),
        ({"model": "a", "memroy": "1GiB"}, "no option named memroy"),
        ({"model": "a", "policy": "lfuu"}, "no policy named 'lfuu'"),
    ],
)
def test_what_cannot_work_is_refused(told: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnderstudyError, match=complaint):
        UnderstudyLM(**told)
