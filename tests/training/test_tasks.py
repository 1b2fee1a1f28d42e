"""Every problem's answer is right by an independent check, and the held-out split is clean."""

import itertools

import pytest

from understudy import tasks

LEVELS = {task: levels + tasks.LONGER.get(task, ()) for task, levels in tasks.LEVELS.items()}
CASES = [(task, level) for task, levels in LEVELS.items() for level in levels]


def _right(problem: tasks.Problem) -> bool:
    """The answer checked from the written question alone."""
    _, *words = problem.prompt.split()
    given = problem.answer
    match problem.task:
        case "add":
            return int(given) == int(words[0]) + int(words[2])
        case "largest":
            numbers = [int(word) for word in words if word != ","]
            return int(given) in numbers and all(int(given) >= one for one in numbers)
        case "reverse":
            return given.split()[::-1] == words
        case "sort":
            letters = given.split()
            return sorted(words) == sorted(letters) and letters == sorted(letters)
        case "count":
            return int(given) == sum(word == words[0] for word in words[2:])
        case "recall":
            return f"{words[0]} {given}" in " ".join(words[2:]).split(" , ")
        case "close":
            return _balanced(words + given.split())
    raise AssertionError(problem.task)


def _balanced(brackets: list[str]) -> bool:
    text = "".join(brackets)
    for _ in brackets:
        text = text.replace("()", "").replace("[]", "").replace("{}", "")
    return not text


@pytest.mark.parametrize(("task", "level"), CASES)
def test_answers_are_right(task: str, level: int) -> None:
    for seed in range(200):
        problem = tasks.make(task, level, seed)
        assert _right(problem), problem


@pytest.mark.parametrize(("task", "level"), CASES)
def test_same_seed_same_problem(task: str, level: int) -> None:
    assert tasks.make(task, level, 7) == tasks.make(task, level, 7)
    assert len({tasks.make(task, level, seed).prompt for seed in range(60)}) > 20


def test_levels_get_longer() -> None:
    for task, levels in LEVELS.items():
        sizes = [
            sum(len(tasks.make(task, level, seed).prompt) for seed in range(100))
            for level in levels
        ]
        assert sizes == sorted(sizes), task


def test_no_training_problem_is_held_out() -> None:
    drawn = list(itertools.islice(tasks.problems(seed=1, held=False), 5000))
    assert not any(tasks.held_out(problem.prompt) for problem in drawn)
    assert {problem.task for problem in drawn} == set(tasks.MAKERS)


def test_held_problems_are_different_and_held_out() -> None:
    found = tasks.held_problems("reverse", 5, 40)
    assert len({problem.prompt for problem in found}) == 40
    assert all(tasks.held_out(problem.prompt) for problem in found)
    few = tasks.held_problems("add", 1, 500)
    assert 0 < len(few) <= 100, "one digit plus one digit: a hundred problems, few held out"
