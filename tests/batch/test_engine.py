"""The batching engine over seats without a model: answers, company, failures, ends."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from batch.fake_seats import VOCABULARY, FakeSeats, next_token
from tokenizers import Tokenizer, models, pre_tokenizers

from understudy.batch import (
    Ask,
    Busy,
    CannotFit,
    Delta,
    Draining,
    EngineDied,
    Report,
    Sampling,
    StepReport,
)
from understudy.batch.engine import BatchEngine
from understudy.core import Counters, ReadFailed

GREEDY = Sampling(temperature=0)
PATIENCE = 20  # seconds; nothing here takes one


def expected(prompt: tuple[int, ...], new: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Listener:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.over = threading.Event()

    def __call__(self, delta: Delta) -> None:
        assert not self.over.is_set(), "nothing comes after the last delta"
        self.deltas.append(delta)
        if delta.last:
            self.over.set()

    def wait(self) -> Delta:
        assert self.over.wait(PATIENCE), "left waiting"
        return self.deltas[-1]

    @property
    def tokens(self) -> list[int]:
        return [t for delta in self.deltas for t in delta.tokens]


def tokenizer() -> Any:
    words = {f"w{i}": i for i in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


TOKENIZER = tokenizer()


def engine(seats: Any, context: int = 400, scored: int = 1000, **more: Any) -> BatchEngine:
    model = SimpleNamespace(
        config=transformers.MixtralConfig(vocab_size=VOCABULARY, eos_token_id=None),
        generation_config=SimpleNamespace(eos_token_id=None),
        understudy=SimpleNamespace(counters=Counters()),
    )
    plan = SimpleNamespace(context=context, scored_positions=scored)
    fake = SimpleNamespace(model=model, plan=plan, tokenizer=TOKENIZER)
    return BatchEngine(fake, seats, **{"max_num_batched_tokens": 16, **more})  # type: ignore[arg-type]


@pytest.fixture
def opened() -> Iterator[Callable[..., BatchEngine]]:
    engines: list[BatchEngine] = []

    def make(seats: Any, **more: Any) -> BatchEngine:
        engines.append(engine(seats, **more))
        return engines[-1]

    yield make
    for e in engines:
        e.close()


class Held(FakeSeats):
    """Seats whose steps happen when the test says so."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.may, self.stepping = threading.Semaphore(0), threading.Event()

    def forward(self, chunks: Any) -> Any:
        self.stepping.set()
        assert self.may.acquire(timeout=PATIENCE)
        return super().forward(chunks)


def test_an_answer_comes_token_by_token_with_a_report(opened: Any) -> None:
    batch, heard = opened(FakeSeats()), Listener()
    batch.submit(Ask((4, 5, 6), 7, GREEDY), heard)
    last = heard.wait()
    assert heard.tokens == expected((4, 5, 6), 7)
    assert len(heard.deltas) == 7 and last.finish == "length"
    text = "".join(d.text for d in heard.deltas)
    assert text == " " + TOKENIZER.decode(expected((4, 5, 6), 7))  # it goes on from a word
    report = last.report
    assert report is not None
    assert (report.prompt_tokens, report.completion_tokens) == (3, 7)
    assert report.mean_batch == 1 and report.ttft_seconds > 0 and report.tpot_seconds > 0
    assert report.e2e_seconds >= report.ttft_seconds + report.decode_seconds


def test_company_changes_no_answer(opened: Any) -> None:
    dice = random.Random(3)
    seats = FakeSeats(capacity=120)  # room is short: some are pushed out and start over
    batch = opened(seats, context=100, max_num_seqs=6)
    asks = []
    for _ in range(60):
        prompt = tuple(dice.randrange(VOCABULARY) for _ in range(dice.randrange(1, 40)))
        heard = Listener()
        asks.append((prompt, dice.randrange(1, 40), heard))
        batch.submit(Ask(prompt, asks[-1][1], GREEDY), heard)
    for prompt, new, heard in asks:
        assert heard.wait().finish == "length"
        assert heard.tokens == expected(prompt, new)
    snapshot = batch.snapshot()
    assert snapshot.preemptions > 0, "the test wants some of them"
    assert (snapshot.running, snapshot.waiting, snapshot.kv_used) == (0, 0, 0)
    assert snapshot.prefix_queries == 0, "these seats look nothing up"
    assert max(len(step) for step in seats.steps) > 3


def test_a_seed_is_an_answers_own(opened: Any) -> None:
    batch = opened(FakeSeats())
    wild = Sampling(temperature=3.0, seed=11)
    alone = Listener()
    batch.submit(Ask((1, 2), 20, wild), alone)
    alone.wait()
    crowd = [Listener() for _ in range(5)]
    for i, heard in enumerate(crowd):
        batch.submit(Ask((1, 2), 20, Sampling(temperature=3.0, seed=11 if i == 3 else i)), heard)
    for heard in crowd:
        heard.wait()
    assert crowd[3].tokens == alone.tokens
    assert len({tuple(heard.tokens) for heard in crowd}) == 5


def test_who_is_cancelled_is_out_within_one_step(opened: Any) -> None:
    seats = Held()
    batch, heard, other = opened(seats), Listener(), Listener()
    ticket = batch.submit(Ask((1,), 300, GREEDY), heard)
    seats.may.release()
    while not heard.deltas:
        pass
    batch.cancel(ticket)
    batch.submit(Ask((2,), 2, GREEDY), other)
    seats.may.release(3)
    assert heard.wait().finish == "abort"
    assert other.wait().finish == "length"
    assert len(heard.tokens) <= 2
    batch.cancel(ticket)  # once more does no harm


def test_a_failed_step_fails_its_requests_and_no_other(opened: Any) -> None:
    seats = FakeSeats()
    batch, heard = opened(seats), Listener()
    seats.fail = ReadFailed("shard 3 has shrunk")
    batch.submit(Ask((1, 2), 5, GREEDY), heard)
    assert isinstance(heard.wait().error, ReadFailed) and heard.deltas[-1].finish is None
    again = Listener()
    batch.submit(Ask((1, 2), 5, GREEDY), again)
    assert again.wait().finish == "length" and again.tokens == expected((1, 2), 5)
    assert batch.snapshot().alive and not seats.held


def test_when_the_thread_dies_everybody_is_told(opened: Any) -> None:
    seats = Held()
    batch, running, waiting = opened(seats, max_num_seqs=1), Listener(), Listener()
    batch.submit(Ask((1, 2), 50, GREEDY), running)
    assert seats.stepping.wait(PATIENCE)
    batch.submit(Ask((3,), 5, GREEDY), waiting)
    seats.fail = SystemExit("out of the blue")
    seats.may.release()
    for heard in (running, waiting):
        assert isinstance(heard.wait().error, EngineDied)
    snapshot = batch.snapshot()
    assert not snapshot.alive and "out of the blue" in (snapshot.error or "")
    with pytest.raises(EngineDied, match="restart"):
        batch.submit(Ask((1,), 1, GREEDY), Listener())
    assert not batch.drain(0) or True  # does not hang
    assert seats.closed


def test_a_broken_scheduler_leaves_nobody_waiting(opened: Any) -> None:
    seats = FakeSeats()
    batch, heard = opened(seats), Listener()

    def broken(row: Any) -> None:
        raise AssertionError("the book is wrong")

    seats.admit = seats.release = broken  # type: ignore[method-assign,assignment]
    batch.submit(Ask((1,), 1, GREEDY), heard)
    assert isinstance(heard.wait().error, EngineDied)


@pytest.mark.parametrize("end", ["answered", "closed"])
def test_seats_that_take_nobody_back_leave_nobody_waiting(opened: Any, end: str) -> None:
    seats = Held()
    batch, first, second = opened(seats), Listener(), Listener()
    batch.submit(Ask((1,), 1 if end == "answered" else 50, GREEDY), first)
    batch.submit(Ask((2, 3), 50, GREEDY), second)
    assert seats.stepping.wait(PATIENCE)

    def broken(row: Any) -> None:
        raise AssertionError("the book is wrong")

    seats.release = broken  # type: ignore[method-assign]
    seats.may.release(100)
    if end == "closed":
        batch.close()
    for heard in (first, second):
        assert isinstance(heard.wait().error, EngineDied)
    assert not batch.snapshot().alive


def test_a_full_house_says_when_to_come_back(opened: Any) -> None:
    seats = Held()
    batch = opened(seats, max_num_seqs=1, max_queue=2)
    heard = [Listener() for _ in range(3)]
    for h in heard:
        batch.submit(Ask((1,), 1, GREEDY), h)
    with pytest.raises(Busy) as refused:
        batch.submit(Ask((1,), 1, GREEDY), Listener())
    assert refused.value.retry_after and refused.value.retry_after > 0
    seats.may.release(10)
    for h in heard:
        h.wait()
    batch.submit(Ask((1,), 1, GREEDY), Listener())


@pytest.mark.parametrize(
    ("prompt", "new", "reason"),
    [((), 5, "empty"), ((1,) * 90, 20, "context of 100"), ((VOCABULARY,), 1, "not one of"),
     ((-1,), 1, "not one of")],
)  # fmt: skip
def test_what_could_never_run_is_refused_with_the_reason(
    opened: Any, prompt: tuple[int, ...], new: int, reason: str
) -> None:
    batch = opened(FakeSeats(), context=100)
    with pytest.raises(CannotFit, match=reason) as refused:
        batch.submit(Ask(prompt, new, GREEDY), Listener())
    assert "\n" not in str(refused.value)


def test_logprobs_of_whole_prompts_are_bounded_by_what_a_step_may_hold(opened: Any) -> None:
    seats = FakeSeats(whole_prompts=True)
    batch = opened(seats, scored=30)
    with pytest.raises(CannotFit, match="31 prompt tokens at once exceed the 30"):
        batch.submit(Ask((1,) * 31, 1, GREEDY, prompt_logprobs=0), Listener())
    heard = [Listener() for _ in range(4)]
    for h in heard:
        batch.submit(Ask((1,) * 20, 3, GREEDY, prompt_logprobs=0), h)
    for h in heard:
        h.wait()
        (scored,) = [d.prompt_logprobs for d in h.deltas if d.prompt_logprobs]
        assert len(scored) == 20
    assert max(sum(n for _, n, of in step if of == "all") for step in seats.steps) <= 30


def test_draining_finishes_what_runs_and_takes_nothing_new(opened: Any) -> None:
    batch, heard = opened(FakeSeats()), Listener()
    batch.submit(Ask((1, 2), 60, GREEDY), heard)
    assert batch.drain(PATIENCE)
    assert heard.wait().finish == "length" and len(heard.tokens) == 60
    with pytest.raises(Draining):
        batch.submit(Ask((1,), 1, GREEDY), Listener())


def test_draining_gives_up_after_its_time(opened: Any) -> None:
    seats = Held()
    batch, heard = opened(seats), Listener()
    batch.submit(Ask((1, 2), 60, GREEDY), heard)
    assert not batch.drain(0.05)
    seats.may.release(5)
    assert heard.wait().finish == "abort"


def test_closing_aborts_and_returns(opened: Any) -> None:
    seats = FakeSeats()
    batch, heard = opened(seats), Listener()
    batch.submit(Ask((1, 2), 390, GREEDY), heard)
    batch.close()
    assert heard.wait().finish in ("abort", "length")
    batch.close()
    assert seats.closed and not seats.held


def test_one_bad_listener_is_nobody_elses_trouble(opened: Any) -> None:
    batch, heard = opened(FakeSeats()), Listener()

    def bad(delta: Delta) -> None:
        raise OSError("gone")

    batch.submit(Ask((1, 2), 300, GREEDY), bad)
    batch.submit(Ask((3, 4), 10, GREEDY), heard)
    assert heard.wait().finish == "length" and heard.tokens == expected((3, 4), 10)
    assert batch.snapshot().alive


def test_prompt_logprobs_foretell_each_next_token(opened: Any) -> None:
    prompt = tuple(i * 7 % VOCABULARY for i in range(40))  # three chunks
    batch, heard = opened(FakeSeats()), Listener()
    batch.submit(Ask(prompt, 1, GREEDY, logprobs=1, prompt_logprobs=1), heard)
    heard.wait()
    (delta,) = [d for d in heard.deltas if d.prompt_logprobs is not None]
    told = delta.prompt_logprobs
    assert told is not None and len(told) == len(prompt) and told[0] is None
    certain = torch.zeros(VOCABULARY)
    certain[0] = 5.0
    chances = certain.log_softmax(0)
    for i, found in enumerate(told[1:], start=1):
        best = next_token(prompt[:i])
        assert found is not None and found.token == prompt[i]
        assert found.logprob == pytest.approx(float(chances[0 if best == prompt[i] else 1]))
        assert found.top[0][0] == best
    assert delta.logprobs[0].token == expected(prompt, 1)[0]


def test_a_prompt_may_be_scored_without_an_answer(opened: Any) -> None:
    batch, heard = opened(FakeSeats()), Listener()
    batch.submit(Ask((5, 6, 7), 0, GREEDY, prompt_logprobs=0), heard)
    last = heard.wait()
    assert last.finish == "length" and not heard.tokens
    assert last.prompt_logprobs is not None
    assert [p and p.token for p in last.prompt_logprobs] == [None, 6, 7]


def test_observers_hear_of_everything_and_may_fail(opened: Any) -> None:
    class Watch:
        def __init__(self) -> None:
            self.steps: list[StepReport] = []
            self.gaps: list[float] = []
            self.ends: list[tuple[str, Report]] = []

        def on_step(self, step: StepReport) -> None:
            self.steps.append(step)
            raise RuntimeError("a bad watcher")

        def on_token(self, seconds: float) -> None:
            self.gaps.append(seconds)

        def on_finish(self, ask: Ask, finish: str, report: Report) -> None:
            self.ends.append((finish, report))

    batch, watch, heard = opened(FakeSeats()), Watch(), Listener()
    batch.add_observer(watch)
    batch.submit(Ask((1,) * 20, 5, GREEDY), heard)
    heard.wait()
    batch.close()
    assert sum(s.prompt_tokens for s in watch.steps) == 20
    assert sum(s.new_tokens for s in watch.steps) == 5
    assert len(watch.gaps) == 4 and watch.ends[0][0] == "length"
