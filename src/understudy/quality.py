"""What a policy does to the answers: scored one decode step at a time, against the exact run.

Knows: engines, policies, texts as tokens, problems with one right answer. Does not know: terminals,
what a policy does. Scoring whole windows in one forward would hide what a policy does: it acts
while decoding, and on the cache that a step really has.

    prompt of P tokens in one forward (always exact) -> N real tokens, fed one by one
    each step's distribution -> NLL of the real token, KL from the exact run, same favourite

Every figure is per decoded token. Intervals are 95 %, by a bootstrap in two stages: prompt sets are
drawn with replacement, and inside each the blocks of `BLOCK` tokens, since neighbours are not
independent. Differences are paired: the same tokens under both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from understudy import tasks, texts
from understudy.bench import ON_DEMAND, Policy, total
from understudy.checkpoint import Checkpoint
from understudy.core import Counters, UnderstudyError
from understudy.engine import Engine, tokenizer_in
from understudy.registry import parse

BLOCK = 32
DRAWS = 2000
LEAST_SETS = 5

Report = Callable[[int, int], None]  # (done, in all)
Bar = Callable[[str], Report]
Numbers = np.ndarray


# ------------------------------------------------------------------------------------- material


@dataclass(frozen=True, slots=True)
class Text:
    """One sequence to score: ``prompt`` tokens are read, the rest is decoded as dictated."""

    domain: str
    number: int  # of its prompt set
    ids: tuple[int, ...]
    prompt: int

    @property
    def scored(self) -> int:
        """Decode steps: the first token after the prompt comes of the prompt's own forward."""
        return len(self.ids) - self.prompt - 1


def prompt_sets(
    tokenizer: Any, domains: dict[str, str], *, sets: int, prompt: int, scored: int
) -> list[Text]:
    """``sets`` pieces of each domain, spread evenly over it; a set is one piece of every domain."""
    if sets < LEAST_SETS:
        raise UnderstudyError(f"--sets must be at least {LEAST_SETS}, else intervals mean nothing")
    length, found = prompt + scored + 1, []
    for domain, text in domains.items():
        for number in range(sets):
            # Ten characters per token are more than any text needs.
            start = len(text) * number // sets
            ids = tokenizer(text[start : start + 10 * length]).input_ids[:length]
            if len(ids) < length or start + len(text) // sets > len(text):
                raise UnderstudyError(
                    f"{domain}: too short for {sets} pieces of {length} tokens; ask for fewer "
                    "--sets or --tokens, or name a longer file"
                )
            found.append(Text(domain, number, tuple(ids), prompt))
    return sorted(found, key=lambda one: one.number)


# -------------------------------------------------------------------------------------- scoring


@dataclass(slots=True)
class Scores:
    """One number per decoded token, all texts one after the other."""

    nll: Numbers
    kl: Numbers
    same: Numbers
    counters: Counters
    seconds: float  # of all decode steps
    identical: bool  # whether every logit has the bits of the exact run
    right: Numbers = field(default_factory=lambda: np.zeros(0))  # one per problem

    @property
    def tokens(self) -> int:
        return len(self.nll)


class Exact:
    """The exact run's logits, in a file: a large vocabulary would not fit beside the model."""

    def __init__(self, folder: Path, texts: Sequence[Text]) -> None:
        self.texts, self._folder = texts, folder
        self._logits: np.memmap[Any, Any] | None = None
        self._at = 0

    def keep(self, logits: Sequence[torch.Tensor]) -> None:
        """The steps of one text, in the order of `texts`."""
        rows = torch.stack(list(logits)).float().numpy()
        if self._logits is None:
            steps = sum(one.scored for one in self.texts)
            self._logits = np.memmap(
                self._folder / "exact", np.float32, "w+", shape=(steps, rows.shape[1])
            )
        self._logits[self._at : self._at + len(rows)] = rows
        self._at += len(rows)

    def of(self, start: int, count: int) -> torch.Tensor:
        assert self._logits is not None
        return torch.from_numpy(np.array(self._logits[start : start + count]))


@contextmanager
def exact_run(texts: Sequence[Text]) -> Iterator[Exact]:
    with TemporaryDirectory(prefix="understudy-") as folder:
        yield Exact(Path(folder), texts)


def score(
    engine: Engine, exact: Exact, problems: Sequence[tasks.Problem], report: Report, *, first: bool
) -> Scores:
    """Run all texts and problems. ``first``: this is the exact run, and is kept."""
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    counted, seconds, at, identical = [], 0.0, 0, True
    everything = len(exact.texts) + len(problems)
    for done, text in enumerate(exact.texts, 1):
        answer = text.ids[text.prompt :]
        made = engine.generate(
            text.ids[: text.prompt],
            max_new_tokens=len(answer),
            dictated=answer,
            ignore_eos=True,
            keep_logits=True,
        )
        assert made.logits is not None
        logits = torch.stack(made.logits[1:]).float()
        if first:
            exact.keep(made.logits[1:])
        reference = exact.of(at, len(logits))
        at += len(logits)
        identical = identical and torch.equal(reference, logits)
        parts.append(_rows(reference, logits, torch.tensor(answer[1:])))
        counted.append(made.decode_counters)
        seconds += made.tpot * text.scored
        report(done, everything)
    right = [
        float(_solved(engine, problem, lambda n: report(len(exact.texts) + n, everything), n))
        for n, problem in enumerate(problems, 1)
    ]
    nll, kl, same = (torch.cat(column).double().numpy() for column in zip(*parts, strict=True))
    return Scores(nll, kl, same, total(counted), seconds, identical, np.array(right))


def _rows(
    exact: torch.Tensor, other: torch.Tensor, following: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    p, q = exact.log_softmax(-1), other.log_softmax(-1)
    nll = -q.gather(1, following[:, None])[:, 0]
    kl = (p.exp() * (p - q)).sum(-1)
    return nll, kl, (exact.argmax(-1) == other.argmax(-1)).float()


def _solved(
    engine: Engine, problem: tasks.Problem, report: Callable[[int], None], number: int
) -> bool:
    """Whether the greedy answer, up to the end of its line, is the right one."""
    longest = len(engine.encode(problem.answer)) + 3
    made = engine.generate(tasks.ask(problem.prompt), max_new_tokens=longest)
    report(number)
    return made.text.split("\n")[0].strip() == problem.answer


# -------------------------------------------------------------------------------------- figures


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """One policy, compared. Nats, bytes, seconds and counts per decoded token; ``solved``: share of
    the problems, and its difference to the exact run. ``by_domain``: NLL lost."""

    policy: str
    exact: bool
    nll: float
    delta_nll: Figure
    kl: Figure
    same_top1: Figure
    by_domain: dict[str, Figure]
    solved: float | None
    delta_solved: Figure | None
    substituted: float
    skipped: float
    substituted_mass: float
    skipped_mass: float
    bytes: float
    hit_rate: float
    stall: float
    seconds: float
    identical: bool

    @property
    def never_acted(self) -> bool:
        """A lossy policy that changed nothing: its figures say nothing about it."""
        return not self.exact and not self.substituted and not self.skipped and self.identical

    @property
    def broken(self) -> bool:
        """It says that it is exact, and is not."""
        return self.exact and not self.identical


def compare(policy: Policy, texts: Sequence[Text], exact: Scores, own: Scores) -> Verdict:
    """What ``own`` differs by from the exact run."""
    lost, n, c = own.nll - exact.nll, own.tokens, own.counters
    return Verdict(
        policy=policy.name,
        exact=policy.exact,
        nll=float(own.nll.mean()),
        delta_nll=figure(lost, texts),
        kl=figure(own.kl, texts),
        same_top1=figure(own.same, texts),
        by_domain={
            domain: figure(lost, texts, domain)
            for domain in dict.fromkeys(one.domain for one in texts)
        },
        solved=float(own.right.mean()) if len(own.right) else None,
        delta_solved=_paired(own.right - exact.right) if len(own.right) else None,
        substituted=c.substituted / n,
        skipped=c.skipped / n,
        substituted_mass=c.substituted_mass / n,
        skipped_mass=c.skipped_mass / n,
        bytes=c.bytes_read / n,
        hit_rate=c.hits / max(1, c.lookups),
        stall=c.stall_seconds / n,
        seconds=own.seconds / n,
        identical=own.identical,
    )


def figure(values: Numbers, texts: Sequence[Text], domain: str | None = None) -> Figure:
    """Mean and interval of one number per decoded token of ``texts``; of one domain, if named."""
    sets: dict[int, list[Numbers]] = {}
    start = 0
    for one in texts:
        piece = values[start : start + one.scored]
        start += one.scored
        if domain in (None, one.domain):
            blocks = [piece[i : i + BLOCK] for i in range(0, len(piece), BLOCK)]
            sets.setdefault(one.number, []).extend(blocks)
    sums = [np.array([b.sum() for b in blocks]) for blocks in sets.values()]
    sizes = [np.array([len(b) for b in blocks]) for blocks in sets.values()]
    mean = sum(s.sum() for s in sums) / sum(s.sum() for s in sizes)
    low, high = np.quantile(list(_draws(sums, sizes)), [0.025, 0.975])
    return Figure(float(mean), float(low), float(high))


def _draws(sums: Sequence[Numbers], sizes: Sequence[Numbers]) -> Iterator[float]:
    """Means of resampled sets of resampled blocks; the same every time."""
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        top, below = 0.0, 0
        for chosen in rng.integers(0, len(sums), len(sums)):
            blocks = rng.integers(0, len(sums[chosen]), len(sums[chosen]))
            top += sums[chosen][blocks].sum()
            below += sizes[chosen][blocks].sum()
        yield top / below


def _paired(differences: Numbers) -> Figure:
    drawn = np.random.default_rng(0).integers(0, len(differences), (DRAWS, len(differences)))
    low, high = np.quantile(differences[drawn].mean(1), [0.025, 0.975])
    return Figure(float(differences.mean()), float(low), float(high))


# ------------------------------------------------------------------------------------- the whole


@dataclass(frozen=True, slots=True)
class Exam:
    """What every policy is put through. ``settings``: further options of the engine."""

    model: str
    memory: str | int
    data: tuple[str, ...] = ()
    sets: int = LEAST_SETS
    prompt: int = 64
    scored: int = 127
    problems: int = 0
    seed: int = 0
    settings: tuple[tuple[str, Any], ...] = ()

    def open(self, policy: Policy, model: str | None = None) -> Engine:
        options = {**dict(self.settings), **policy.options(), "seed": self.seed}
        return Engine(model or self.model, memory=self.memory, **options)

    def questions(self) -> list[tasks.Problem]:
        held = tasks.problems(self.seed, held=True)
        return [problem for problem, _ in zip(held, range(self.problems), strict=False)]


class Session:
    """The exact run once, then any number of policies against it."""

    def __init__(self, exam: Exam, exact: Exact, report: Report) -> None:
        self.exam, self._exact = exam, exact
        self.problems = exam.questions()
        with exam.open(ON_DEMAND) as engine:
            self.baseline = score(engine, exact, self.problems, report, first=True)

    def judge(self, policy: Policy, report: Report, model: str | None = None) -> Verdict:
        """``model``: another checkpoint of the same model (fewer bits) in its place."""
        with self.exam.open(policy, model) as engine:
            own = score(engine, self._exact, self.problems, report, first=False)
            lossless = policy.exact and not engine.model.understudy.anatomy.lossy
        verdict = compare(policy, self._exact.texts, self.baseline, own)
        return replace(verdict, exact=lossless)

    def baseline_verdict(self) -> Verdict:
        return compare(ON_DEMAND, self._exact.texts, self.baseline, self.baseline)


@contextmanager
def session(exam: Exam, report: Report) -> Iterator[Session]:
    """Opens the exam: cuts the texts, runs the exact run."""
    domains = texts.domains(exam.data)
    pieces = prompt_sets(
        tokenizer_in(Checkpoint.open(exam.model).path),
        domains,
        sets=exam.sets,
        prompt=exam.prompt,
        scored=exam.scored,
    )
    with exact_run(pieces) as exact:
        yield Session(exam, exact, report)


def controls(policy: Policy) -> list[Policy]:
    """For `buddy`: the same gates with a random resident expert, and with nobody, in its place."""
    name, parameters = parse(policy.route)
    if name != "buddy" or parameters.get("stand_in") in ("random", "drop"):
        return []
    told = {k: v for k, v in parameters.items() if k != "stand_in"}
    made = []
    for stand_in in ("random", "drop"):
        route = ":".join([name, f"stand_in={stand_in}", *(f"{k}={v}" for k, v in told.items())])
        label = f"{policy.name} [{stand_in}]"
        made.append(
            Policy(label, policy.evictor, policy.predictor, policy.slots, route, policy.resolver)
        )
    return made


def packed(model: str, format: str, bar: Bar) -> Path:
    """``model`` with its experts in fewer bits, packed now if it is not in the cache."""
    from understudy import packing
    from understudy.native import cache_folder

    checkpoint = Checkpoint.open(model)
    digest = hashlib.sha256()
    for file in sorted(checkpoint.files):
        stat = file.stat()
        digest.update(repr((str(file), stat.st_size, stat.st_mtime_ns)).encode())
    name = f"{checkpoint.path.name}-{digest.hexdigest()[:8]}-{format}"
    folder = cache_folder() / "fewer-bits" / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        packing.pack(model, format, folder, bar=bar)
    return folder
