"""The ways a command ends, from outside: signals, closed pipes, help without heavy imports."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

SLOW_TALKER = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from cli import fake_engine
fake_engine.install().Engine.delay = 0.05
from understudy.cli import main
main(sys.argv[1:])
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_TALKER, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_stops_within_a_second_with_130() -> None:
    talker = start("run", "model", "hello", "-n", "200")
    assert talker.stdout is not None
    talker.stdout.read(1)
    began = time.monotonic()
    talker.send_signal(signal.SIGINT)
    _, err = talker.communicate(timeout=20)
    assert talker.returncode == 130
    assert time.monotonic() - began < 1.0
    assert "Traceback" not in err


def test_a_reader_that_goes_away_is_no_error() -> None:
    talker = start("run", "model", "hello", "-n", "100")
    assert talker.stdout is not None
    assert talker.stderr is not None
    talker.stdout.read(1)
    talker.stdout.close()
    err = talker.stderr.read()
    talker.wait(timeout=20)
    assert "Traceback" not in err
    assert "Exception" not in err
    assert "error" not in err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom understudy.cli import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit as end: print(end.code, {'torch', 'transformers'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "0 set()"
    assert "--max-new-tokens" in out.stdout


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["--version"]])
def test_what_a_person_types_first(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "understudy", *arguments]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.startswith("understudy " if "--version" in arguments else "Usage: understudy")
    assert out.stderr == ""


def test_a_mistyped_command_suggests_the_nearest() -> None:
    command = [sys.executable, "-m", "understudy", "rum"]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 2
    assert out.stderr.startswith("error: No such command 'rum'")
    assert out.stderr.count("\n") == 1
