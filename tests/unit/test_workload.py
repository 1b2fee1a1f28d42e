"""Who asks when for how much: traces, rates, clipping, prompts."""

from __future__ import annotations

from itertools import pairwise
from math import inf
from pathlib import Path
from random import Random
from statistics import mean, stdev

import pytest

from understudy.core import UnderstudyError
from understudy.traffic import Request
from understudy.traffic.workload import Prompts, at_rate, clip, from_trace, of_random_length

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AZURE = Path(__file__).parents[3] / "shared" / "data" / "arrivals"


def trace(tmp_path: Path, *lines: str, head: str = HEAD) -> Path:
    file = tmp_path / "trace.csv"
    file.write_text(head + "".join(f"{line}\n" for line in lines))
    return file


def test_times_count_from_the_first_arrival_and_are_sorted(tmp_path: Path) -> None:
    file = trace(
        tmp_path,
        "2023-11-16 18:15:46.5000000,374,44",
        "2023-11-16 18:15:49.0000000,100,1",
        "2023-11-16 18:15:48.2500000,396,109",
    )
    assert from_trace(file, 100, time_scale=2, length_scale=0.1) == [
        Request(0.0, 37, 4), Request(3.5, 40, 11), Request(5.0, 10, 1),
    ]  # fmt: skip
    assert len(from_trace(file, 2)) == 2


@pytest.mark.parametrize(
    ("lines", "head", "said"),
    [
        ((), HEAD, "holds no requests"),
        (("1,2",), "a,b\n", "has no columns TIMESTAMP"),
        (("2023-11-16 18:15:46.5,3,4", "yesterday,3,4"), HEAD, "line 3 is not a time"),
        (("2023-11-16 18:15:46.5,3",), HEAD, "line 2 is not a time"),
    ],
)
def test_a_file_that_is_no_trace(
    tmp_path: Path, lines: tuple[str, ...], head: str, said: str
) -> None:
    with pytest.raises(UnderstudyError, match=said) as error:
        from_trace(trace(tmp_path, *lines, head=head), 10)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not AZURE.is_dir(), reason="the public traces are not here")
@pytest.mark.parametrize("name", ["code", "conv"])
def test_the_public_traces_are_read(name: str) -> None:
    found = from_trace(AZURE / f"AzureLLMInferenceTrace_{name}.csv", 1000)
    assert len(found) == 1000
    assert found[0].at == 0
    assert 0 < found[-1].at < 3600


def test_rates() -> None:
    asked = [Request(9.0, 1, 1)] * 4000
    assert {one.at for one in at_rate(asked, inf, 1.0, Random(1))} == {0.0}
    spread = []
    for burstiness in (0.25, 1.0, 16.0):
        times = [one.at for one in at_rate(asked, 50.0, burstiness, Random(1))]
        gaps = [b - a for a, b in pairwise(times)]
        assert mean(gaps) == pytest.approx(1 / 50, rel=0.1)
        spread.append(stdev(gaps) * 50)
    assert spread == pytest.approx([2.0, 1.0, 0.25], rel=0.1)


def test_lengths_stay_within_their_spread() -> None:
    drawn = of_random_length(500, 100, 10, 0.5, Random(1))
    assert {one.prompt_tokens for one in drawn} <= set(range(50, 151))
    assert {one.output_tokens for one in drawn} == set(range(5, 16))
    assert set(of_random_length(3, 100, 10, 0.0, Random(1))) == {Request(0.0, 100, 10)}


def test_what_is_too_long_is_clipped_and_counted() -> None:
    asked = [Request(0, 50, 14), Request(0, 51, 14), Request(1, 9, 99), Request(2, 99, 99)]
    fitted, clipped = clip(asked, 64)
    assert clipped == 3
    assert fitted == [
        Request(0, 50, 14), Request(0, 50, 14), Request(1, 9, 32), Request(2, 32, 32),
    ]  # fmt: skip


def test_prompts_are_pieces_of_the_text() -> None:
    ids = list(range(100))
    prompts = Prompts(ids, Random(3))
    for length in (1, 10, 99, 100, 250):
        piece = prompts.take(length)
        assert len(piece) == length
        assert all(b == (a + 1) % 100 for a, b in pairwise(piece))
    assert prompts.take(10) != prompts.take(10)
    assert Prompts(ids, Random(3)).take(10) == Prompts(ids, Random(3)).take(10)
    shuffled = Prompts(ids, Random(3), shuffled=True).take(50)
    assert set(shuffled) <= set(ids)
    assert shuffled != sorted(shuffled)
