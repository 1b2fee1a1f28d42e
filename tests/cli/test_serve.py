"""`understudy serve` as a user meets it: what is refused before anything slow begins."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import Command

from understudy.serve import run
from understudy.serve.settings import Settings


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be served, instead of serving it."""
    calls: list[Any] = []

    def serve(settings: Settings, start: Any, say: Any, listener: socket.socket) -> bool:
        listener.close()
        calls.append(settings)
        start(say)
        return True

    monkeypatch.setattr(run, "serve", serve)
    monkeypatch.setattr(run, "start_engine", lambda *given: calls.append(given[1]))
    monkeypatch.setattr("understudy.cli.serve.quiet_guests", lambda: None)
    return calls


def test_what_the_options_mean(understudy: Command, served: list[Any], tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0].content }}")
    ended = understudy(
        "serve", "org/model", "--port", "0", "--served-model-name", "a", "--served-model-name", "b",
        "--max-model-len", "2048", "-np", "4", "--max-num-batched-tokens", "128", "--max-queue",
        "9", "--kv-memory", "1GiB", "--chat-template", str(template), "--max-body-size", "1MiB",
        "--request-timeout", "60", "--disable-access-log", "--no-page", "--api-key", " key ",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    settings, options = served
    assert (settings.model, settings.names, settings.api_key) == ("org/model", ("a", "b"), "key")
    assert settings.chat_template == "{{ messages[0].content }}"
    assert (settings.max_body_size, settings.request_timeout) == (1 << 20, 60)
    assert not settings.access_log and not settings.page
    expected = {
        "max_context": 2048, "max_num_seqs": 4, "max_num_batched_tokens": 128, "max_queue": 9,
        "kv_memory": "1GiB", "memory": "auto",
    }  # fmt: skip
    assert expected.items() <= options.items()


def test_llama_cpp_names(understudy: Command, served: list[Any]) -> None:
    assert understudy("serve", "m", "--port", "0", "-c", "99", "--parallel", "2").code == 0
    assert (served[1]["max_context"], served[1]["max_num_seqs"]) == (99, 2)
    understudy("serve", "m", "--port", "0", "--ctx-size", "98")
    assert served[3]["max_context"] == 98


def test_a_folder_is_called_by_its_own_name(
    understudy: Command, served: list[Any], tmp_path: Path
) -> None:
    understudy("serve", str(tmp_path), "--port", "0")
    assert served[0].names == (tmp_path.name,)


def test_the_key_may_come_from_the_environment(
    understudy: Command, served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_API_KEY", "from-env")
    understudy("serve", "m", "--port", "0")
    assert served[0].api_key == "from-env"


def test_strangers_are_warned_of(understudy: Command, served: list[Any]) -> None:
    assert "set --api-key" in understudy("serve", "m", "--port", "0", "--host", "0.0.0.0").err
    guarded = understudy("serve", "m", "--port", "0", "--host", "0.0.0.0", "--api-key", "k")
    assert "warning" not in guarded.err
    assert "warning" not in understudy("serve", "m", "--port", "0").err


def test_a_taken_port(understudy: Command, served: list[Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = understudy("serve", "m", "--port", str(port))
    assert ended.code == 2 and not served
    assert ended.err.count("\n") == 1 and f"port {port}" in ended.err and "--port" in ended.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--api-key", " "], "--api-key is empty"),
        (["--chat-template", "/nowhere/x"], "cannot read /nowhere/x"),
        (["--max-body-size", "large"], "cannot read 'large'"),
        (["--max-body-size", "auto"], "write 8MiB"),
        (["--max-body-size", "50%"], "write 8MiB"),
        (["--served-model-name", ""], "--served-model-name is empty"),
        (["--host", "no.such.host.invalid"], "give --host an address"),
        (["--host", "192.0.2.1"], "choose another with --host"),
        (["--port", "70000"], "65535"),
        (["--trust-remote-code"], "--trust-remote-code"),
    ],
)
def test_what_is_refused(
    understudy: Command, served: list[Any], arguments: list[str], said: str
) -> None:
    ended = understudy("serve", "m", *arguments)
    assert ended.code == 2 and not served
    assert said in ended.err and ended.err.count("\n") == 1


def test_a_template_that_is_none(understudy: Command, served: list[Any], tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% if %}")
    ended = understudy("serve", "m", "--chat-template", str(template))
    assert ended.code == 2 and "is not a chat template" in ended.err
