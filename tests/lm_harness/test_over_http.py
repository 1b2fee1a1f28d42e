"""lm-eval's own HTTP client against the server: the numbers of the model inside lm-eval."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from serve.conftest import running

from understudy.batch.opening import start

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-eval is not installed (pip install 'understudy[lm-eval]')"
)

HERE = Path(__file__).parent
FINE = HERE.parents[1] / "models" / "fine"
LOADED = {"memory": "50MiB", "threads": 1, "dtype": "float32"}


def task(folder: Path) -> Any:
    """The task's files with absolute paths, and a manager that knows nothing else."""
    from lm_eval.tasks import TaskManager

    import understudy.lm_harness  # noqa: F401 - its name in lm-eval

    text = (HERE / "largest.yaml").read_text()
    text = text.replace("largest.jsonl", str(HERE / "largest.jsonl"))
    text = text.replace("dataset_kwargs:\n", f"dataset_kwargs:\n  cache_dir: {folder / 'cache'}\n")
    (folder / "largest.yaml").write_text(text)
    return TaskManager(include_path=str(folder), include_defaults=False)


def scores(folder: Path, model: str, arguments: dict[str, Any]) -> list[list[tuple[float, bool]]]:
    """Log-likelihood of every choice of every question, and whether it is the greedy one."""
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["understudy_largest"],
        task_manager=task(folder),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert found["results"]["understudy_largest"]["acc,none"] == 1.0
    samples = sorted(found["samples"]["understudy_largest"], key=lambda s: s["doc_id"])
    return [[(float(r[0]), bool(r[1])) for r in sample["filtered_resps"]] for sample in samples]


@pytest.mark.skipif(not FINE.is_dir(), reason="models/fine is not here")
def test_loglikelihoods_are_those_of_the_model_in_process(tmp_path: Path) -> None:
    inside = scores(tmp_path, "understudy", {"model": str(FINE), **LOADED})
    batch = start(FINE, max_num_seqs=4, **LOADED)
    try:
        with running(batch, names=("fine",)) as server:
            over_http = scores(
                tmp_path,
                "local-completions",
                {
                    "model": "fine",
                    "base_url": f"{server.url}/v1/completions",
                    "tokenizer": str(FINE),
                    "num_concurrent": 4,
                    "tokenized_requests": True,
                    "max_length": 1024,
                },
            )
    finally:
        batch.close()
        batch.engine.close()
    assert len(over_http) == len(inside)
    for ours, theirs in zip(inside, over_http, strict=True):
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
        assert [s for s, _ in theirs] == pytest.approx([s for s, _ in ours], abs=1e-4)
