"""The budget holds when the kernel watches: 2,000 tokens inside a memory cgroup of the budget plus
700 MiB for the interpreter, torch and transformers, on a model that would not fit there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

MIB = 1 << 20
BUDGET = 96 * MIB
OVERHEAD = 700 * MIB

RUN = """
import sys
import torch, understudy
with understudy.load(sys.argv[1], memory=int(sys.argv[2]), max_context=2600) as model:
    ids = torch.randint(512, (1, 600))  # enough to ask for every expert
    out = model.generate(ids, max_new_tokens=2000, min_new_tokens=2000, do_sample=False,
                         pad_token_id=0)
    plan = model.understudy.plan
    print(out.shape[1] - 600, "tokens,", model.understudy.counters.evictions, "evictions")
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 780 MiB of experts of 4 MiB each, bf16, random."""
    config = MixtralConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1344, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=4, num_local_experts=64,
        num_experts_per_tok=2, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("larger-than-its-budget")
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def limited() -> Iterator[Path]:
    """A memory cgroup (v1 or v2) limited to the budget and the overhead."""
    root = Path("/sys/fs/cgroup")
    v1 = (root / "memory" / "memory.limit_in_bytes").exists()
    group = (root / "memory" if v1 else root) / f"understudy-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = group / ("memory.limit_in_bytes" if v1 else "memory.max")
        limit.write_text(str(BUDGET + OVERHEAD))
    except OSError as e:
        if group.exists():
            group.rmdir()
        pytest.skip(f"cannot make a memory cgroup here: {e.strerror}")
    yield group
    group.rmdir()


def run_inside(group: Path, checkpoint: Path, memory: int) -> subprocess.CompletedProcess[str]:
    enter = f'echo $$ > {group / "cgroup.procs"} && exec {sys.executable} -c "$0" "$@"'
    command = ["sh", "-c", enter, RUN, str(checkpoint), str(memory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_two_thousand_tokens_inside_the_budget(checkpoint: Path, limited: Path) -> None:
    done = run_inside(limited, checkpoint, BUDGET)
    assert done.returncode == 0, f"killed or failed ({done.returncode}): {done.stderr[-500:]}"
    assert done.stdout.startswith("2000 tokens")


def test_a_budget_larger_than_the_cgroup_is_killed(checkpoint: Path, limited: Path) -> None:
    """The control: the kernel really watches, and the model really does not fit."""
    done = run_inside(limited, checkpoint, 4 * (BUDGET + OVERHEAD))
    assert done.returncode == -signal.SIGKILL
