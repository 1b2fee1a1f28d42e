"""The real engine behind the real command line: every mistake is one line that names the cure and
exit code 2, without a traceback, and nothing is left half-written."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from understudy.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run("inspect", folder)`` -> exit code, stdout, stderr."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        printed = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, printed.out, printed.err

    return command


def complaint(ended: tuple[int, str, str]) -> str:
    """The one line of a mistake."""
    code, out, err = ended
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        (("--memory", "1KiB"), "smallest that works"),
        (("--memory", "lots"), "8GiB"),
        (("--evictor", "lruu"), "did you mean 'lru'"),
        (("--evictor", "belady"), "use lru"),
        (("--predictor", "nextgate"), "did you mean 'next-gate'"),
        (("--max-context", "9999999"), "ask for less"),
        (("--dtype", "int9"), "float32"),
        (("--max-context", "16", "--max-new-tokens", "64"), "max-context"),
    ],
)
def test_options_that_cannot_work(
    run: Run, speaking_model: Path, options: tuple[str, ...], cure: str
) -> None:
    assert cure in complaint(run("run", speaking_model, "hello", *options))


def test_no_such_model_offline(run: Run) -> None:
    assert "local folder" in complaint(run("inspect", "nobody/nothing"))


def test_a_family_without_the_interface(run: Run, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=32,
                        num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(tmp_path)
    line = complaint(run("run", tmp_path, "hello"))
    assert "llama" in line
    assert "understudy families" in line


def test_a_truncated_shard(run: Run, speaking_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(speaking_model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "download" in complaint(run("run", broken, "hello"))


def test_no_room_for_the_twin(
    run: Run, speaking_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    shutil.copytree(speaking_model, tmp_path / "models" / "fine")
    cache = tmp_path / "cache"
    monkeypatch.setenv("UNDERSTUDY_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(cache))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    code, _, err = run("demo")
    assert code == 2
    assert "UNDERSTUDY_CACHE" in err
    assert not cache.exists() or {p.name for p in cache.iterdir()} <= {"kernels"}  # no twin


def test_families_are_one_line_of_json(run: Run) -> None:
    code, out, _ = run("families", "--json")
    found = json.loads(out)["families"]
    assert code == 0
    assert out.count("\n") == 1
    assert sum(f["supported"] for f in found.values()) >= 55
    assert all(isinstance(f["reason"], str) for f in found.values())


def test_ctrl_c_in_the_middle_of_an_answer(speaking_model: Path) -> None:
    command = [sys.executable, "-m", "understudy", "run", str(speaking_model), "hello",
               "--max-new-tokens", "3000", "--memory", "60%"]  # fmt: skip
    heard = "import signal, sys, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = heard + "sys.argv = sys.argv[1:]; runpy.run_module('understudy', run_name='__main__')"
    command[1:3] = ["-c", code, "understudy"]
    talker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert talker.stdout is not None
    talker.stdout.read(8)  # it speaks
    began = time.monotonic()
    talker.send_signal(signal.SIGINT)
    _, err = talker.communicate(timeout=30)
    assert talker.returncode == 130
    assert time.monotonic() - began < 1.0
    assert b"Traceback" not in err


def test_the_answer_on_the_command_line_is_that_of_transformers(
    run: Run, speaking_model: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(speaking_model)
    plain = AutoModelForCausalLM.from_pretrained(speaking_model, experts_implementation="eager")
    ids = torch.tensor([tokenizer("hello").input_ids])
    expected = plain.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    code, out, _ = run("run", speaking_model, "hello", "-n", "12", "--memory", "60%", "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["text"] == tokenizer.decode(expected)


# ------------------------------------------------------------------------------------- packing


def test_pack_says_what_it_costs_and_the_result_runs(
    run: Run, speaking_model: Path, tmp_path: Path
) -> None:
    target, text = tmp_path / "small", tmp_path / "text.txt"
    text.write_text("Some words to measure on. " * 10)
    code, out, err = run(
        "pack", speaking_model, "--format", "int4", "-o", target, "--text", text,
        "--memory", "1GiB", "--json",
    )  # fmt: skip
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert result["lossy"] is True
    assert result["quality"]["tokens"] == 259
    assert "int4 is LOSSY: on 259 tokens NLL" in err
    code, out, err = run("run", target, "Some words", "-n", "4", "--memory", "1GiB")
    assert code == 0
    assert "experts in int4: LOSSY, delta NLL" in err
    assert "lossy" in run("inspect", target)[1]
    assert "what was packed" in run("pack", target, "--verify")[1]


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ((), "--format int8 or --format int4"),
        (("--format", "int5"), "one of int8, int4"),
        (("--format", "int8", "-o", "."), "name another with -o"),
        (("--format", "int8", "--text", "nowhere.txt"), "cannot read nowhere.txt"),
        (("--verify",), "not made by `understudy pack`"),
    ],
)
def test_mistakes_in_packing(
    run: Run, speaking_model: Path, options: tuple[str, ...], cure: str
) -> None:
    assert cure in complaint(run("pack", speaking_model, *options))
    assert not list(speaking_model.parent.glob(f"{speaking_model.name}-*"))
    assert not list(speaking_model.parent.glob(".*.partial"))
