"""``POST /v1/completions``: a text goes on. Also how evaluators get the logprobs of a text.

Knows: OpenAI's older endpoint. Does not know: how a stream is sent.

lm-eval sends batches of token ids with ``echo: true, logprobs: 1, max_tokens: 1`` and reads
``token_logprobs[context:-1]``: every token of the prompt has an entry, and the one new token too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from understudy.batch import Ask, Delta, TokenLogprob
from understudy.serve import shapes
from understudy.serve.asks import ask_of, known_tokens, several, text_tokens
from understudy.serve.collected import Offsets, legacy_logprobs
from understudy.serve.errors import require
from understudy.serve.forms import Form
from understudy.serve.protocol import CompletionRequest
from understudy.serve.served import Served
from understudy.serve.settings import MAX_ANSWERS

NEW_TOKENS = 16  # OpenAI's default


class CompletionForm(Form):
    """The answers to one `CompletionRequest`."""

    prefix = "cmpl"
    operation = "text_completion"

    def __init__(self, served: Served, body: CompletionRequest, experts: bool) -> None:
        n, prompts = body.n or 1, body.prompt
        require(
            n * len(prompts) <= MAX_ANSWERS,
            f"prompts times n exceed {MAX_ANSWERS}",
            "n",
        )
        asked = [prompt_ask(served, body, prompt) for prompt in prompts]
        asks = [ask for each in asked for ask in several(each, n)]
        super().__init__(served, body, asks, experts)
        self._echo, self._logprobs = bool(body.echo), body.logprobs is not None
        self._prompts = [
            prompt if isinstance(prompt, str) else _text(served, ask)
            for prompt, ask in zip(prompts, asked, strict=True)
        ]
        self._offsets = [
            Offsets(served.tokenizer, () if self._echo else ask.prompt, ask.skip_special_tokens)
            for ask in asks
        ]

    def choices(self, number: int, delta: Delta, begun: bool) -> Iterator[BaseModel]:
        text = ("" if begun else self._echoed(number)) + delta.text
        logprobs = None
        if self._logprobs:
            tokens = delta.tokens if begun else (*self._echoed_tokens(number), *delta.tokens)
            told = [*(delta.prompt_logprobs or ()), *delta.logprobs]
            logprobs = self._written(number, tokens, told)
        if text or delta.last or (logprobs and logprobs.tokens):
            yield self._choice(number, text, logprobs)

    def chunk(self, choices: Sequence[Any], **more: Any) -> BaseModel:
        return shapes.Completion(choices=list(choices), **self._head, **more)

    def whole(self) -> BaseModel:
        choices = []
        for number, answer in enumerate(self.answers):
            logprobs = None
            if self._logprobs:
                tokens = [*self._echoed_tokens(number), *answer.tokens]
                logprobs = self._written(
                    number, tokens, [*answer.prompt_logprobs, *answer.logprobs]
                )
            choices.append(self._choice(number, self._echoed(number) + answer.text, logprobs))
        return self.chunk(choices, **self.tail())

    def _choice(
        self, number: int, text: str, logprobs: shapes.LegacyLogprobs | None
    ) -> shapes.CompletionChoice:
        answer = self.answers[number]
        reason: shapes.LegacyFinish | None = None
        if answer.finish:
            reason = "length" if answer.finish == "length" else "stop"
        return shapes.CompletionChoice(
            index=number,
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            stop_reason=answer.stop_reason,
        )

    def _written(
        self, number: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None]
    ) -> shapes.LegacyLogprobs:
        offsets = self._offsets[number].of(tokens)
        return legacy_logprobs(self._spelling, tokens, logprobs, offsets)

    def _echoed(self, number: int) -> str:
        return self._prompts[number // self._n] if self._echo else ""

    def _echoed_tokens(self, number: int) -> tuple[int, ...]:
        return self.asks[number].prompt if self._echo else ()


def prompt_ask(served: Served, body: CompletionRequest, prompt: str | list[int]) -> Ask:
    if isinstance(prompt, str):
        tokens = text_tokens(served, prompt, body.add_special_tokens)
    else:
        tokens = known_tokens(served, prompt)
    return ask_of(
        served,
        body,
        tokens,
        new_tokens=NEW_TOKENS if body.max_tokens is None else body.max_tokens,
        param="prompt",
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        skip_special_tokens=body.skip_special_tokens is not False,
    )


def _text(served: Served, ask: Ask) -> str:
    """What the echo of token ids is."""
    decoded: str = served.tokenizer.decode(
        list(ask.prompt), skip_special_tokens=ask.skip_special_tokens
    )
    return decoded
