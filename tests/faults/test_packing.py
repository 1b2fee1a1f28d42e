"""Packing that goes wrong ends in one line, and never leaves half a folder under the final name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import configs

import understudy
from understudy import packing
from understudy.checkpoint import Checkpoint
from understudy.core import CheckpointError, NotEnoughDisk, UnderstudyError
from understudy.formats import CannotPack, int8

EXPERTS = configs.LAYERS * configs.EXPERTS


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "source"
    configs.build("qwen3_moe", folder)
    return folder


@pytest.fixture(scope="module")
def ready(source: Path) -> Path:
    return packing.pack(source, "int8").path


@pytest.fixture
def folder(ready: Path, tmp_path: Path) -> Path:
    """A packed folder of one's own to damage."""
    return Path(shutil.copytree(ready, tmp_path / "packed"))


def refusal(kind: type[Exception], action: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(kind) as caught:
        action(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


# -------------------------------------------------------------------------- a damaged folder


def test_cut_experts(folder: Path) -> None:
    file = folder / "experts.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert "was cut or replaced" in refusal(CheckpointError, understudy.load, folder, "1GiB")


def test_missing_experts(folder: Path) -> None:
    (folder / "experts.safetensors").unlink()
    assert "copy the whole folder" in refusal(CheckpointError, Checkpoint.open, folder)


def test_manifest_of_another_version(folder: Path) -> None:
    edit(folder, version=2)
    text = refusal(CheckpointError, Checkpoint.open, folder)
    assert "version 2" in text
    assert "pack the model again" in text


@pytest.mark.parametrize(
    "change",
    [
        {"records": []},
        {"checksums": []},
        {"record_of_layer": None},
        {"dense_checksum": "x"},
        {"records": [{"nbytes": 4096, "parts": [{"name": "up", "dtype": "int8", "shape": [5000],
                                                 "start": 0}]}]},
    ],
)  # fmt: skip
def test_damaged_manifest(folder: Path, change: dict[str, Any]) -> None:
    edit(folder, **change)
    assert "pack again" in refusal(CheckpointError, Checkpoint.open, folder)


def test_manifest_of_another_model(folder: Path, tmp_path: Path) -> None:
    configs.build("mixtral", tmp_path / "other")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "other" / name, folder / name)
    text = refusal(CheckpointError, understudy.load, folder, "1GiB")
    assert "do not belong together" in text


@pytest.mark.parametrize("name", ["experts.safetensors", "model.safetensors"])
def test_a_changed_byte_is_found_by_verify(folder: Path, name: str) -> None:
    with open(folder / name, "r+b") as file:
        file.seek(-5000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    assert "checksum" in refusal(CheckpointError, packing.verify, folder)


def test_only_packed_folders_have_checksums(source: Path) -> None:
    assert "not made by" in refusal(CheckpointError, packing.verify, source)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "understudy.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ------------------------------------------------------------------------------ interrupted

KILLED = """
import os, signal, sys
from understudy import packing
note, noted = packing._Journal.note, []
def note_and_die(self, *args):
    note(self, *args)
    noted.append(args)
    if len(noted) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
packing._Journal.note = note_and_die
packing.pack(sys.argv[1], "int8", packing.Path(sys.argv[2]))
"""


def test_killed_and_continued(
    source: Path, ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "packed"
    ended = subprocess.run([sys.executable, "-c", KILLED, source, target], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not target.exists()
    partial = tmp_path / ".packed.partial"
    with open(partial / "journal", "a") as journal:
        journal.write("1 3")  # the line that was being written
    with open(partial / "experts.safetensors", "r+b") as file:
        file.seek(4096)
        file.write(b"lost")  # a record that a power cut took although the journal knows it

    packed = count(monkeypatch)
    packing.pack(source, "int8", target)
    assert len(packed) == 2 * (EXPERTS - 4)  # two matrices each; four records were kept
    assert not partial.exists()
    same = (target / "experts.safetensors").read_bytes()
    assert same == (ready / "experts.safetensors").read_bytes()
    assert packing.verify(target) == EXPERTS


def test_killed_and_the_source_changed(source: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(source, tmp_path / "mine"))
    target = tmp_path / "packed"
    subprocess.run([sys.executable, "-c", KILLED, mine, target], check=False)
    os.utime(mine / "model.safetensors", ns=(1, 1))
    text = refusal(UnderstudyError, packing.pack, mine, "int8", target)
    assert "another source" in text
    assert "delete it" in text
    assert not target.exists()


def count(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every whole matrix that is packed from now on."""
    packed, pack = [], int8.Int8.pack

    def counted(self: Any, matrix: Any) -> Any:
        if len(matrix) > 1:
            packed.append(matrix)
        return pack(self, matrix)

    monkeypatch.setattr(int8.Int8, "pack", counted)
    return packed


# ------------------------------------------------------------------------------ no disk, no name


def test_too_little_disk_is_seen_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10, 0, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    text = refusal(NotEnoughDisk, packing.pack, source, "int8", tmp_path / "packed")
    assert "10 bytes are free" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["posix_fallocate", "fsync"])
def test_the_disk_fills_up(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, where, full)
        text = refusal(NotEnoughDisk, packing.pack, source, "int8", tmp_path / "packed")
    assert "goes on where it stopped" in text
    assert not (tmp_path / "packed").exists()
    packing.pack(source, "int8", tmp_path / "packed")
    assert packing.verify(tmp_path / "packed") == EXPERTS


def test_refusals_before_any_work(source: Path, ready: Path, tmp_path: Path) -> None:
    pack = packing.pack
    assert "exists already" in refusal(UnderstudyError, pack, source, "int8", tmp_path)
    assert "int8, int4" in refusal(UnderstudyError, pack, source, "mxfp4", tmp_path / "a")
    assert "in int8 already" in refusal(UnderstudyError, pack, ready, "int4", tmp_path / "a")
    assert "is no folder" in refusal(UnderstudyError, pack, source, "int8", tmp_path / "b" / "c")
    assert not list(tmp_path.iterdir())


def test_a_row_that_int4_cannot_cut_is_named(source: Path, tmp_path: Path) -> None:
    text = refusal(CannotPack, packing.pack, source, "int4", tmp_path / "packed")
    assert "mlp.experts.down_proj" in text
    assert "use int8" in text
    assert not list(tmp_path.iterdir())
