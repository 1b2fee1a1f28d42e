"""run and chat: where prompts come from, where text goes, what options reach the engine."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from cli.conftest import Command


def test_text_goes_to_stdout_and_the_plan_to_stderr(understudy: Command) -> None:
    ended = understudy("run", "model", "hello", "-n", "3")
    assert ended.code == 0
    assert ended.out == " once upon a\n"
    assert ended.err.startswith("plan: 16 of 16 experts resident (100 %), dense 9.8 KiB")


def test_the_prompt_comes_from_argument_file_or_stdin(understudy: Command, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("12345\n")
    asked = ("run", "model", "-n", "1", "--json")
    assert understudy(*asked, "123").json["prompt_tokens"] == 3
    assert understudy(*asked, "--file", str(file)).json["prompt_tokens"] == 5
    assert understudy(*asked, typed="1234\n").json["prompt_tokens"] == 4
    assert understudy(*asked, "-", typed="12").json["prompt_tokens"] == 2


def test_json_is_the_only_line_on_stdout(understudy: Command) -> None:
    ended = understudy("run", "model", "hello", "-n", "4", "--json")
    assert ended.out.count("\n") == 1
    assert ended.json["text"] == " once upon a time"
    assert ended.json["tokens"] == 4
    assert ended.json["counters"]["misses"] == 4 + 3
    assert ended.json["plan"]["slots"] == 16


def test_stats_are_a_table_beside_the_text(understudy: Command) -> None:
    ended = understudy("run", "model", "hello", "-n", "5", "--stats")
    assert ended.out == " once upon a time once\n"
    assert "12 hits (60 %), 0 late, 8 misses" in ended.err
    assert "0.00 s waiting for experts; 1.0 ms per token" in ended.err


def test_options_reach_the_engine(understudy: Command, engine: ModuleType) -> None:
    understudy(
        *("run", "model", "hi", "--memory", "1MiB", "--prefetch", "last-token", "--depth", "2"),
        *("--evictor", "lfu", "--io-threads", "8", "--no-direct-io", "--dtype", "float32"),
        *("--max-context", "200", "--prefill-chunk-size", "64", "--threads", "1"),
        *("--kernel", "native:4", "--frame", "eager"),
        *("--route", "buddy:rho=2", "--profile", "p.safetensors", "--slots", "50%"),
        *("--device", "cuda:1", "--device-memory", "12GiB", "--decode", "host"),
    )
    settings = engine.Engine.made[0]
    del settings["on_status"]
    assert settings == {
        "memory": "1MiB",
        "max_context": 200,
        "evictor": "lfu",
        "kernel": "native:4",
        "frame": "eager",
        "predictor": "last-token",
        "depth": 2,
        "io_threads": 8,
        "prefill_chunk_size": 64,
        "dtype": "float32",
        "threads": 1,
        "direct_io": False,
        "route": "buddy:rho=2",
        "resolver": "fetch",
        "slots": "50%",
        "profile": Path("p.safetensors"),
        "device": "cuda:1",
        "device_memory": "12GiB",
        "decode": "host",
    }


def test_every_option_has_an_environment_twin(
    understudy: Command, engine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_MEMORY", "1MiB")
    monkeypatch.setenv("UNDERSTUDY_PREDICTOR", "none")
    monkeypatch.setenv("UNDERSTUDY_MAX_NEW_TOKENS", "2")
    monkeypatch.setenv("UNDERSTUDY_JSON", "1")
    monkeypatch.setenv("UNDERSTUDY_DIRECT_IO", "0")
    ended = understudy("run", "model", "hello", "--memory", "2MiB")
    assert ended.json["tokens"] == 2
    assert engine.Engine.made[0]["memory"] == "2MiB"  # what is typed wins
    assert engine.Engine.made[0]["predictor"] == "none"
    assert engine.Engine.made[0]["direct_io"] is False


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("x", "--file", "y"), "error: two prompts: give either the argument or --file"),
        (("--file", "/no/such"), "error: cannot read /no/such: No such file or directory"),
        (("",), "error: the prompt is empty"),
        (("x" * 300,), "error: 300 tokens are too many"),
        (("x", "--evictor", "lruu"), "error: no evictor named 'lruu'; did you mean 'lru'?"),
        (("x", "--prefetch", "nextgate"), "did you mean 'next-gate'?"),
        (("x", "--evictor", "belady"), "error: evictor 'belady' knows the future"),
        (("x", "--memory", "lots"), "error: cannot read 'lots' as an amount of memory"),
        (("x", "--memory", "20000"), "error: memory 20000 bytes is too small for model: 1MiB is"),
        (("x", "--max-new-tokens", "0"), "error: Invalid value for '--max-new-tokens'"),
        (("x", "--bogus"), "error: No such option"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    understudy: Command, arguments: tuple[str, ...], complaint: str
) -> None:
    ended = understudy("run", "model", *arguments)
    lines = [line for line in ended.err.splitlines() if not line.startswith("plan: ")]
    assert ended.code == 2
    assert len(lines) == 1
    assert complaint in lines[0]
    assert "Traceback" not in ended.err
    assert ended.out == ""


def test_chat_needs_a_template(understudy: Command) -> None:
    ended = understudy("chat", "model")
    assert ended.code == 2
    assert "error: model has no chat template" in ended.err


def test_chat_answers_line_by_line(understudy: Command, engine: ModuleType) -> None:
    engine.Engine.template = "{{ messages }}"
    ended = understudy("chat", "model", "-n", "2", typed="hello\n\nagain\n/clear\nnew\n/exit\nno\n")
    assert ended.code == 0
    assert ended.out == " once upon\n" * 3


def test_a_conversation_that_grew_too_long_goes_on_without_the_last_line(
    understudy: Command, engine: ModuleType
) -> None:
    engine.Engine.template = "{{ messages }}"
    typed = "hello\n" + "x" * 300 + "\nstill there?\n"
    ended = understudy("chat", "model", "-n", "2", typed=typed)
    assert ended.code == 0
    assert ended.out == " once upon\n" * 2
    assert "error: 315 tokens are too many; shorten them; /clear starts afresh" in ended.err
