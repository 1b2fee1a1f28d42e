"""doctor: what it says on machines with and without accelerators, on disks that read and refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import Command

from understudy import checkup, machine, native, plan
from understudy.core import UnderstudyError
from understudy.experts.device import PinningRefused, cuda, ends
from understudy.experts.device.pinned import Pinnable
from understudy.policies.resolve import Ends

H100 = cuda.Seen(0, "H100", 80 << 30, "9.0")
SLOW_LINK = Ends(25e9, 45e9, 20e9, 40e9, 9e9, 900e9, 3e-5)
FAST_LINK = Ends(55e9, 20e9, 30e9, 8e9, 12e9, 300e9, 3e-5)


class Crowd:
    """Experts that take no time."""

    expert_bytes = 9437184

    class mlp:
        native_rows = 8


class Device:
    index = 0


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quiet machine without an accelerator, whose memory and processor are quickly measured."""
    monkeypatch.setattr(plan, "memory_bandwidth", lambda: 20e9)
    monkeypatch.setattr(ends, "typical", Crowd)
    monkeypatch.setattr(ends, "host", lambda crowd: ends.Host(18e9, 180e9))
    monkeypatch.setattr(cuda, "visible", list)
    monkeypatch.setattr(machine, "driver", lambda: None)
    monkeypatch.setattr(machine, "load", lambda: 0.1)
    monkeypatch.setattr(native, "why_not", lambda: None)
    monkeypatch.setattr(plan, "direct_io_works", lambda file: True)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``accelerator(ends)``: an H100 whose measurement answers so, or raises."""

    def put(
        found: Ends | UnderstudyError, triton: str | None = None, refused: str | None = None
    ) -> None:
        def both(device: Any, crowd: Any) -> Ends:
            if isinstance(found, UnderstudyError):
                raise found
            return found

        monkeypatch.setattr(cuda, "visible", lambda: [H100])
        monkeypatch.setattr(cuda, "open_cuda", lambda asked: Device())
        monkeypatch.setattr(machine, "driver", lambda: "570.86.15")
        monkeypatch.setattr(ends, "both", both)
        monkeypatch.setattr(checkup, "triton_why_not", lambda device: triton)
        monkeypatch.setattr(checkup, "probe", lambda device, most: Pinnable(8 << 30, 1.5, refused))

    return put


def facts(text: str) -> dict[str, str]:
    """The lines of the first table; the disk's comes after it."""
    rows = (line.split("  ", 1) for line in text.splitlines() if "  " in line)
    found: dict[str, str] = {}
    for name, value in rows:
        found.setdefault(name.strip(), value.strip())
    return found


# ---------------------------------------------------------------------------- without accelerators


def test_a_machine_without_an_accelerator(understudy: Command, models: Path) -> None:
    ended = understudy("doctor")
    assert ended.code == 0
    said = facts(ended.out)
    assert said["accelerator"].startswith("none (torch is ")
    assert "no NVIDIA driver" in said["accelerator"]
    assert said["memory bandwidth"] == "20 GB/s"
    assert "18 GB/s of weights, kernel native (bf16, 9.4 MB)" in said["experts"]
    assert "a further token costs 10 % of the first" in said["experts"]
    assert str(models / "model.safetensors") in ended.out
    assert "8 threads" in ended.out
    assert "missing" not in ended.out
    assert "reading the disk" in ended.err


def test_everything_as_one_line_of_json(understudy: Command, models: Path) -> None:
    ended = understudy("doctor", str(models), "--json")
    assert ended.code == 0
    assert ended.out.count("\n") == 1
    found = ended.json
    assert found["versions"]["understudy"] and found["versions"]["torch"]
    assert found["processor"]["cpus"] >= 1
    assert found["memory"]["bandwidth"] == 20e9
    assert 0 < found["memory"]["auto"] < found["memory"]["free"] <= found["memory"]["total"]
    assert found["experts"] == {
        "expert_bytes": 9437184, "kernel": "native", "why_not_native": None,
        "bandwidth": 18e9, "further": 180e9,
    }  # fmt: skip
    assert len(found["disk"]["speeds"]) == 12
    assert found["disk"]["file"] == str(models / "model.safetensors")
    assert found["accelerators"] == found["missing"] == []
    assert "memory bandwidth" in ended.err


def test_where_nothing_lies_a_file_is_written_and_removed(
    understudy: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkup, "SCRATCH_BYTES", 4 << 20)
    monkeypatch.setenv("UNDERSTUDY_MODELS", str(tmp_path / "nowhere"))
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    ended = understudy("doctor", "--json")
    assert ended.json["disk"]["scratch"] is True
    assert ended.json["disk"]["speeds"][0]["bytes_per_second"] is not None
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written(
    understudy: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    monkeypatch.setenv("UNDERSTUDY_MODELS", str(tmp_path / "nowhere"))
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    ended = understudy("doctor")
    assert ended.code == 0
    assert facts(ended.out)["disk"].startswith("not measured: the cache folder cannot be written")


def test_doctor_of_nothing(understudy: Command) -> None:
    ended = understudy("doctor", "/no/such/place")
    assert ended.code == 2
    assert "error: /no/such/place does not exist" in ended.err


def test_an_accelerator_that_was_asked_for_by_name_must_be_there(
    understudy: Command, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ended = understudy("doctor", "--device", "cuda:0")
    assert ended.code == 2
    assert "sees no accelerator here" in ended.err.splitlines()[-1]
    assert understudy("doctor", "--device", "cpu").code == 0


def test_a_busy_machine_is_told(
    understudy: Command, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "load", lambda: 100.0)
    assert "the machine was busy (load 100.0)" in understudy("doctor").err


# ------------------------------------------------------------------------------- what is missing


@pytest.fixture
def nothing_works(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "why_not", lambda: "no C compiler")
    monkeypatch.setattr(plan, "direct_io_works", lambda file: False)
    monkeypatch.setattr(machine, "driver", lambda: "570.86.15")
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setenv("CC", "no-such-compiler")
    yield


def test_what_is_missing_comes_with_its_cure(
    understudy: Command, models: Path, nothing_works: None
) -> None:
    ended = understudy("doctor")
    assert ended.code == 0
    cures = [line for line in ended.out.splitlines() if line.startswith("missing: ")]
    assert [line.split(";")[0] for line in cures] == [
        "missing: torch that sees the accelerator", "missing: the native kernel",
        "missing: direct I/O",
    ]  # fmt: skip
    assert "pip install --force-reinstall torch" in cures[0]
    assert "apt-get install gcc" in cures[1]
    assert facts(ended.out)["native kernel"] == "no C compiler"
    assert "no direct I/O" in facts(ended.out)["disk"]


@pytest.mark.parametrize(
    ("installed", "cure"), [(None, "pip install triton"), ("3.6.0", "apt-get install gcc")]
)
def test_triton_that_cannot_be_used(
    understudy: Command, models: Path, accelerator: Any, monkeypatch: pytest.MonkeyPatch,
    installed: str | None, cure: str,
) -> None:  # fmt: skip
    accelerator(SLOW_LINK, triton="RuntimeError: no Python.h")
    monkeypatch.setattr(checkup, "_version", lambda name: installed)
    ended = understudy("doctor")
    assert facts(ended.out)["cuda:0 Triton"] == "RuntimeError: no Python.h"
    (line,) = (line for line in ended.out.splitlines() if line.startswith("missing"))
    assert cure in line


def test_why_triton_does_not_work_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    class Broken(RuntimeError):
        pass

    def works(device: Any) -> bool:
        raise Broken("gcc: fatal error: Python.h\nand much more")

    fake = ModuleType("understudy.experts.device.trial")
    fake.__dict__["works"] = works
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr("understudy.experts.device.trial", fake, raising=False)
    asked: Any = Device()
    assert checkup.triton_why_not(asked) == "Broken: gcc: fatal error: Python.h"
    fake.__dict__["works"] = lambda device: True
    assert checkup.triton_why_not(asked) is None
    fake.__dict__["works"] = lambda device: False
    assert "wrong answer" in str(checkup.triton_why_not(asked))


# ------------------------------------------------------------------------------- with accelerators


def test_a_slow_link_is_helped_by_the_processor(
    understudy: Command, models: Path, accelerator: Any
) -> None:
    accelerator(SLOW_LINK)
    said = facts(understudy("doctor").out)
    assert said["accelerator"].startswith("NVIDIA driver 570.86.15")
    assert said["cuda:0"] == "H100, 80 GiB, compute capability 9.0"
    assert said["cuda:0 Triton"] == "works: a kernel was built and ran"
    assert said["cuda:0 pinned"] == "8 GiB of host memory in 1.5 s; no more was tried"
    assert said["cuda:0 link"] == (
        "25 GB/s from pinned memory, 20 GB/s beside the processor; 9 GB/s from pageable memory"
    )
    assert said["cuda:0 processor"] == "45 GB/s of experts' weights, 40 GB/s beside the link"
    assert said["cuda:0 phi"].startswith(
        "0.33: of 8 misses 3 are best fetched while the processor computes 5 in place; "
        "--resolver cpu-split: misses take "
    )


def test_a_fast_link_is_left_alone(understudy: Command, models: Path, accelerator: Any) -> None:
    accelerator(FAST_LINK)
    ended = understudy("doctor", "--json")
    (seen,) = ended.json["accelerators"]
    assert seen["phi"] == pytest.approx(30 / 38)
    assert seen["resolver"][0] == "fetch"
    assert seen["ends"]["link"] == 55e9


def test_memory_that_cannot_be_pinned_is_told(
    understudy: Command, models: Path, accelerator: Any
) -> None:
    accelerator(PinningRefused("the system refuses to pin 256 MiB"), refused="CUDA error 2")
    ended = understudy("doctor")
    assert ended.code == 0
    pinned = facts(ended.out)["cuda:0 pinned"]
    assert pinned.startswith("8 GiB of host memory, then refused: CUDA error 2. ")
    assert facts(ended.out)["cuda:0 link"] == "not measured: the system refuses to pin 256 MiB"
    assert "cuda:0 phi" not in ended.out


def test_others_are_listed_and_not_measured(
    understudy: Command, models: Path, accelerator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator(SLOW_LINK)
    monkeypatch.setattr(cuda, "visible", lambda: [H100, cuda.Seen(1, "L4", 24 << 30, "8.9")])
    said = facts(understudy("doctor").out)
    assert said["cuda:1"] == "L4, 24 GiB, compute capability 8.9"
    assert "cuda:1 phi" not in said


@pytest.mark.parametrize(
    ("both", "words"),
    [
        (Ends(1.0, 1e9, 1.0, 1e9), "of 8 misses none is best fetched"),
        (Ends(1e9, 1.0, 1e9, 1.0), "of 8 misses all are best fetched"),
        (Ends(1.0, 7.0, 1.0, 7.0), "of 8 misses 1 is best fetched while the processor computes 7"),
    ],
)
def test_what_phi_means(both: Ends, words: str) -> None:
    assert checkup.split_in_words(both).startswith(words)
