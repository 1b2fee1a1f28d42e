"""The file of a profile: it says of which model it is, and is there whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from understudy.profile import Profile, ProfileError

TENSORS = {
    "coactivation": torch.tensor([[[0, 3], [3, 0]]]),
    "similarity": torch.tensor([[[1.0, 0.5], [0.25, 1.0]]]),
    "entropy": torch.linspace(0, 1, 101)[None],
}
PROVENANCE = {"model": "tiny", "fingerprint": "abc", "tokens": {"read": 7}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    Profile(TENSORS, PROVENANCE).save(path)
    return path


def test_what_is_saved_is_read(file: Path) -> None:
    read = Profile.load(file, "abc")
    assert read.name == "tiny.safetensors"
    assert read.provenance == PROVENANCE
    assert read.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(read.tensor(name), tensor) for name, tensor in TENSORS.items())
    assert read.coactivation == [[[0, 3], [3, 0]]]
    assert read.similarity == [[[1.0, 0.5], [0.25, 1.0]]]
    assert read.entropy[0][50] == 0.5
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_of_another_model(file: Path) -> None:
    with pytest.raises(ProfileError, match=r"made for another model \(tiny\); make one for this"):
        Profile.load(file, "abd")
    assert Profile.load(file).provenance["model"] == "tiny"  # to look at, of whatever model


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_cut_off(file: Path, share: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ProfileError, match="cannot be read as a profile"):
        Profile.load(file, "abc")


def test_some_other_tensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "plain.safetensors")
    with pytest.raises(ProfileError, match="not a profile; make one with `understudy profile`"):
        Profile.load(tmp_path / "plain.safetensors", "abc")
    with pytest.raises(ProfileError, match="no such profile"):
        Profile.load(tmp_path / "nothing.safetensors", "abc")


@pytest.mark.parametrize("provenance", [None, "{", "[1]"])
def test_a_damaged_provenance(tmp_path: Path, provenance: str | None) -> None:
    told = {} if provenance is None else {"provenance": provenance}
    save_file(TENSORS, tmp_path / "a.safetensors", {"understudy_profile": "1", **told})
    with pytest.raises(ProfileError, match="provenance cannot be read"):
        Profile.load(tmp_path / "a.safetensors", "abc")


def test_a_missing_part_names_its_cure(file: Path) -> None:
    read = Profile.load(file, "abc")
    with pytest.raises(ProfileError, match=r"has no default_vectors; .*`understudy profile`"):
        read.tensor("default_vectors")
    for name in ("estimator.down.weight", "estimator_better"):
        with pytest.raises(ProfileError, match="`understudy profile --estimator`"):
            read.tensor(name)


def test_nothing_is_half_written(file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(ProfileError, match="cannot be written"):
        Profile(TENSORS, PROVENANCE).save(tmp_path / "no such folder" / "p.safetensors")
    unwritable = tmp_path / "a folder"
    unwritable.mkdir()
    with pytest.raises(ProfileError, match="cannot be written"):
        Profile(TENSORS, PROVENANCE).save(unwritable)
    assert file.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a folder", file.name]


def test_provenance_is_one_line_of_json_for_other_programs(file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["understudy_profile"] == "1"
    assert json.loads(metadata["provenance"]) == PROVENANCE
