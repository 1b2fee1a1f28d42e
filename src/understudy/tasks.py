"""Small problems with one right answer, made from a seed.

Knows seven kinds of problem and their difficulty levels, and which problems are held out.
Does not know tokens, models or files: a problem is a pair of strings, and an answer is right
when the strings are equal. Letters are written one by one with spaces between, so that each is
one piece for the tokenizer and the problem, not the spelling, is what has to be learned.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CLOSERS = {"(": ")", "[": "]", "{": "}"}
HELD_OUT_ONE_IN = 50


@dataclass(frozen=True)
class Problem:
    """One question, its only right answer, and where it came from."""

    task: str
    level: int
    prompt: str
    answer: str


def ask(prompt: str) -> str:
    """The text before an answer; the chat template writes a user's message the same way."""
    return f"Question: {prompt}\nAnswer:"


def held_out(prompt: str) -> bool:
    """Whether a problem is kept from training. It depends on the text alone, so no seed leaks."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_ONE_IN == 0


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _add(rng: random.Random, level: int) -> tuple[str, str]:
    left, right = _number(rng, level), _number(rng, level)
    return f"add {left} + {right}", str(left + right)


def _largest(rng: random.Random, level: int) -> tuple[str, str]:
    numbers = [_number(rng, rng.randint(1, 3)) for _ in range(level)]
    return "largest " + " , ".join(map(str, numbers)), str(max(numbers))


def _reverse(rng: random.Random, level: int) -> tuple[str, str]:
    letters = rng.choices(LETTERS, k=level)
    return "reverse " + " ".join(letters), " ".join(reversed(letters))


def _sort(rng: random.Random, level: int) -> tuple[str, str]:
    letters = rng.choices(LETTERS, k=level)
    return "sort " + " ".join(letters), " ".join(sorted(letters))


def _count(rng: random.Random, level: int) -> tuple[str, str]:
    wanted, *others = rng.sample(LETTERS, 4)
    letters = rng.choices([wanted, wanted, *others], k=level)
    return f"count {wanted} in " + " ".join(letters), str(letters.count(wanted))


def _recall(rng: random.Random, level: int) -> tuple[str, str]:
    keys = rng.sample(LETTERS, level)
    values = rng.choices("0123456789", k=level)
    wanted = rng.randrange(level)
    pairs = " , ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    return f"recall {keys[wanted]} from {pairs}", values[wanted]


def _close(rng: random.Random, level: int) -> tuple[str, str]:
    """Open and already closed brackets, `level` in all; asked is what closes the open ones."""
    text: list[str] = []
    stack: list[str] = []
    while len(text) < level or not stack:
        if stack and len(text) < level and rng.random() < 0.35:
            text.append(CLOSERS[stack.pop()])
        else:
            stack.append(rng.choice("([{"))
            text.append(stack[-1])
    return "close " + " ".join(text), " ".join(CLOSERS[one] for one in reversed(stack))


MAKERS: dict[str, Callable[[random.Random, int], tuple[str, str]]] = {
    "add": _add,
    "largest": _largest,
    "reverse": _reverse,
    "sort": _sort,
    "count": _count,
    "recall": _recall,
    "close": _close,
}
"""How each kind of problem is made."""

LEVELS: dict[str, tuple[int, ...]] = {
    "add": (1, 2, 3),
    "largest": (2, 3, 5),
    "reverse": (3, 5, 7),
    "sort": (3, 5, 7),
    "count": (4, 7, 10),
    "recall": (2, 4, 8),
    "close": (3, 5, 8),
}
"""Easy, middle and hard, in the task's own unit: digits, numbers, letters, pairs, brackets."""

LONGER: dict[str, tuple[int, ...]] = {
    "largest": (6, 8),
    "reverse": (8,),
    "sort": (8,),
    "recall": (12, 16),
    "close": (10, 12),
}
"""Levels beyond any in training, in evaluation only: the trained ones become easy."""


def make(task: str, level: int, seed: int) -> Problem:
    """The problem of this kind, level and seed; the same one every time."""
    rng = random.Random(f"{task}/{level}/{seed}")
    return Problem(task, level, *MAKERS[task](rng, level))


def problems(seed: int, *, held: bool) -> Iterator[Problem]:
    """Endless problems, kinds and levels drawn evenly, from one side of the held-out split."""
    rng = random.Random(seed)
    while True:
        task = rng.choice(list(LEVELS))
        problem = make(task, rng.choice(LEVELS[task]), rng.getrandbits(48))
        if held_out(problem.prompt) == held:
            yield problem


def held_problems(task: str, level: int, count: int, seed: int = 0) -> list[Problem]:
    """Up to `count` different held-out problems; fewer where the level does not have as many."""
    found: dict[str, Problem] = {}
    for offset in range(count * HELD_OUT_ONE_IN * 4):
        problem = make(task, level, seed * 10**9 + offset)
        if held_out(problem.prompt):
            found.setdefault(problem.prompt, problem)
            if len(found) == count:
                break
    return list(found.values())
