"""The real thing: `understudy serve` as a process, a reference model, the official client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serve.conftest import COARSE

openai = pytest.importorskip("openai")
PROMPT = "Question: Sort the letters: d, a, c, b\nAnswer:"


class Process:
    """A server that is up. ``lines``: what it has said."""

    def __init__(self) -> None:
        self.start(port=0)

    def start(self, port: int) -> None:
        command = [sys.executable, "-m", "understudy", "serve", str(COARSE), "--port", str(port)]
        memory = ["--memory", "200MiB", "--dtype", "float32", "--max-model-len", "512"]
        self.process = subprocess.Popen(
            [*command, *memory],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("ready: "):
                break
        self.url = self.lines[-1].split()[1]
        self.listening = threading.Thread(target=self._listen, daemon=True)
        self.listening.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self.lines += self.process.stderr


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    made = Process()
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture(scope="module")
def alone(process: Process) -> Any:
    """The same model in this process, resident, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(COARSE, dtype=torch.float32)


def test_what_a_user_sees(process: Process) -> None:
    assert process.lines[0] == "loading coarse ...\n"
    assert process.lines[1].startswith("plan: ")
    assert process.lines[-1].startswith("ready: http://127.0.0.1:")


def test_greedy_text_is_that_of_transformers(process: Process, alone: Any, tokenizer: Any) -> None:
    with openai.OpenAI(base_url=process.url + "/v1", api_key="any") as ai:
        made = ai.completions.create(model="coarse", prompt=PROMPT, temperature=0, max_tokens=24)
        pieces = ai.completions.create(
            model="coarse", prompt=PROMPT, temperature=0, max_tokens=24, stream=True
        )
        streamed = "".join(piece.choices[0].text for piece in pieces)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    out = alone.generate(**inputs, max_new_tokens=24, do_sample=False)
    expected = tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert made.choices[0].text == streamed == expected


def test_the_logprobs_of_a_prompt_are_those_of_transformers(
    process: Process, alone: Any, tokenizer: Any
) -> None:
    import torch

    ids = tokenizer(PROMPT + " a, b, c, d").input_ids
    body = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    told = httpx.post(process.url + "/v1/completions", json=body).json()["choices"][0]["logprobs"]
    with torch.inference_mode():
        logits = alone(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [logits[at, token].item() for at, token in enumerate(ids[1:])]
    assert told["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)
    best = [max(top.values()) for top in told["top_logprobs"][1:-1]]
    assert best == pytest.approx(logits[:-1].max(-1).values.tolist(), abs=1e-4)
    assert len(told["tokens"]) == len(ids) + 1


def test_structure_is_kept(process: Process) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "tell", "parameters": schema}}
    user = [{"role": "user", "content": "How many?"}]
    with openai.OpenAI(base_url=process.url + "/v1", api_key="any") as ai:
        shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        made = ai.chat.completions.create(
            model="coarse", messages=user, seed=1, max_tokens=64, response_format=shape
        )
        assert 0 <= json.loads(made.choices[0].message.content)["n"] <= 99
        called = ai.chat.completions.create(
            model="coarse", messages=user, temperature=0, max_tokens=200, tools=[tool],
            tool_choice="required", parallel_tool_calls=False,
        )  # fmt: skip
        choice = called.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls[0].function.name == "tell"
        assert "n" in json.loads(choice.message.tool_calls[0].function.arguments)


def test_it_is_seen_from_outside(process: Process) -> None:
    body = {"prompt": "Hello", "max_tokens": 4, "understudy": True}
    made = httpx.post(process.url + "/v1/completions", json=body).json()
    assert made["understudy"]["hits"] > 0 and made["understudy"]["mean_batch"] >= 1
    metrics = httpx.get(process.url + "/metrics").text
    assert "understudy:time_to_first_token_seconds_bucket" in metrics
    assert 'handler="/v1/completions"' in metrics
    assert httpx.get(process.url + "/").headers["content-type"].startswith("text/html")


def test_sigkill_in_mid_stream_ends_no_answer_and_another_takes_its_port(process: Process) -> None:
    def text() -> str:
        body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0}
        made = httpx.post(process.url + "/v1/completions", json=body, timeout=30)
        return str(made.json()["choices"][0]["text"])

    before, url, lines = text(), process.url, []
    body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with (
        pytest.raises(httpx.HTTPError),
        httpx.stream("POST", url + "/v1/completions", json=body, timeout=30) as stream,
    ):
        for line in stream.iter_lines():
            process.process.kill()
            lines.append(line)
    assert not any("[DONE]" in line or '"length"' in line for line in lines)
    process.process.wait()
    process.start(port=int(url.rsplit(":", 1)[1]))
    assert process.url == url
    assert text() == before


def test_sigterm_in_mid_stream_finishes_what_runs(process: Process) -> None:
    """The last one: the server is gone afterwards."""
    body = {"prompt": "Once", "max_tokens": 60, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", process.url + "/v1/completions", json=body, timeout=30) as stream:
        lines = (line for line in stream.iter_lines() if line)
        pieces = [next(lines)]
        process.process.send_signal(signal.SIGTERM)
        pieces += lines
    assert pieces[-1] == "data: [DONE]"
    assert json.loads(pieces[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert process.process.wait(20) == 0
    process.listening.join(5)
    assert any("finishing what runs" in line for line in process.lines)
