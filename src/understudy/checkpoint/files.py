"""A checkpoint on disk: which files, which tensors in them, at which bytes.

Knows: directories, hub ids, ``config.json``, the index file, the safetensors header.
Does not know: what a tensor is for. It reads headers only, never a weight.

Headers are not trusted: every length is checked against the file before it is used, and every
refusal is one line that names the cure.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from understudy.core import CheckpointError, UnsupportedFamily

HEADER_LIMIT = 100_000_000  # bytes; the safetensors library refuses longer headers too
MAX_AXES = 16
ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")  # all but the weights
MANIFEST = "understudy.json"  # of a folder that `understudy pack` wrote; its experts are in
EXPERTS = "experts.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")

BITS = MappingProxyType(  # every dtype name of the safetensors format -> bits per element
    {
        **dict.fromkeys(("F4",), 4),
        **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
        **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
        **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
        **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
        **dict.fromkeys(("I32", "U32", "F32"), 32),
        **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    }
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: ``nbytes`` bytes at ``offset`` (from the start of the file) of file number
    ``file``; ``dtype`` is the safetensors name ("BF16")."""

    name: str
    file: int
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


# --------------------------------------------------------------------------------- find the folder


def find(source: str | Path) -> Path:
    """The local folder of a path or a hub id; a hub id is downloaded, or found in the cache."""
    path = Path(source).expanduser()
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as e:
        raise CheckpointError(f"cannot look at {path}: {e.strerror}; give another path") from e
    if is_folder:
        return path.resolve()
    if is_file:
        raise CheckpointError(f"{path} is a file: give the folder it is in, {path.parent}")
    if not _looks_like_hub_id(str(source)):
        raise CheckpointError(
            f"no such folder: {path} (give a checkpoint folder, or a hub id such as org/model)"
        )
    return _download(str(source))


def _looks_like_hub_id(source: str) -> bool:
    return re.fullmatch(r"[\w.-]*\w(/[\w.-]*\w)?", source) is not None and source[0] not in "./~"


def _download(repo: str) -> Path:
    """Fetch configuration and tokenizer first, then only the shards that the index names: some
    repositories hold the same weights twice."""
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(repo, allow_patterns=list(SIDE_FILES)))
        shards = _shard_names(path) if (path / INDEX).is_file() else [ONE_FILE]
        if (path / MANIFEST).is_file():
            shards.append(EXPERTS)
        return Path(snapshot_download(repo, allow_patterns=shards))
    except CheckpointError:
        raise
    except Exception as e:  # the hub raises a dozen kinds; for a user they are one
        raise CheckpointError(
            f"cannot get {repo!r} (no such folder, so taken for a hub id): {_why_not(e)}"
        ) from e


def _why_not(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "it is gated; accept its terms on the hub and run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model; check the spelling, or `hf auth login` if it is private"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return (
            "it is not in the local cache and the hub cannot be reached; go online"
            " (unset HF_HUB_OFFLINE), or give a local folder"
        )
    return f"{type(error).__name__}: {_one_line(error)}; give a local folder, or try again"


# -------------------------------------------------------------------------------- read the folder


def read_config(path: Path) -> tuple[Any, dict[str, Any]]:
    """The transformers configuration of the folder, and config.json as it is written."""
    from transformers import AutoConfig

    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} has no config.json: give the folder of a transformers checkpoint"
        )
    raw = read_json(path / "config.json")
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise CheckpointError(f"{path / 'config.json'} names no model_type: download it again")
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as e:  # whatever a family's own validation raises
        known = _is_known(raw["model_type"])
        cure = "mend config.json" if known else "it may need a newer transformers"
        kind = CheckpointError if known else UnsupportedFamily
        raise kind(
            f"transformers cannot read {path / 'config.json'} (model_type "
            f"{raw['model_type']!r}): {_one_line(e)}; {cure}"
        ) from e
    return config, raw


def _is_known(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def read_tensors(path: Path) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    """Every safetensors file of the checkpoint, and every tensor in them by name."""
    index = None
    if (path / ONE_FILE).is_file():  # the order in which transformers looks
        names = [ONE_FILE]
    elif (path / INDEX).is_file():
        index = _read_index(path)
        names = sorted(set(index.values()))
    else:
        raise CheckpointError(_no_safetensors(path))
    files = tuple(path / name for name in names)
    tensors: dict[str, TensorInfo] = {}
    for number, file in enumerate(files):
        for info in read_header(file, number):
            if info.name not in tensors or (index and index.get(info.name) == file.name):
                tensors[info.name] = info
    for name, shard in (index or {}).items():
        if name not in tensors:
            raise CheckpointError(
                f"{INDEX} says that {shard} holds {name!r}, but it does not: download both again"
            )
    return files, tensors


def _no_safetensors(path: Path) -> str:
    pickled = sorted(f.name for pattern in PICKLED for f in path.glob(pattern))
    if pickled:
        return (
            f"{path} has only pickled weights ({pickled[0]}): a pickle can run any code and has no"
            " byte ranges to read; convert it with save_pretrained() of transformers"
        )
    return f"{path} has neither {ONE_FILE} nor {INDEX}: give a checkpoint in safetensors format"


def _read_index(path: Path) -> dict[str, str]:
    raw = read_json(path / INDEX)
    shards = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{path / INDEX} has no weight_map: download it again")
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{path / INDEX} names a shard outside its own folder ({shard!r}): do not use it"
            )
    return shards


def _shard_names(path: Path) -> list[str]:
    return sorted(set(_read_index(path).values()))


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as e:
        raise CheckpointError(
            f"{file} is not valid JSON ({_one_line(e)}): download it again"
        ) from e
    except OSError as e:
        raise CheckpointError(f"cannot read {file}: {e.strerror}") from e


# -------------------------------------------------------------------------------- read the header


def read_header(file: Path, number: int = 0) -> list[TensorInfo]:
    """The tensors of one safetensors file, in file order, every number in them checked."""
    if not file.is_file():
        raise CheckpointError(f"missing shard {file}: download the checkpoint again")
    try:
        with open(file, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(HEADER_LIMIT, size - 8):
                raise CheckpointError(_bad_length(file, size, length))
            text = f.read(length)
    except OSError as e:
        raise CheckpointError(f"cannot read {file}: {e.strerror}") from e
    header = _parse(file, text)
    start = 8 + length
    found = [
        _tensor(file, number, start, name, entry)
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    return _check_tiling(file, start, size, found)


def _bad_length(file: Path, size: int, length: int) -> str:
    if length > HEADER_LIMIT and size >= 8:
        return (
            f"{file}: a header of {length} bytes is more than safetensors allows"
            f" ({HEADER_LIMIT}): not a safetensors file, or damaged; download it again"
        )
    return (
        f"{file}: the header should have {length} bytes but the file ends after {size}:"
        " truncated shard; download it again"
    )


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(
            f"{file}: the header is not valid JSON ({_one_line(e)}): damaged; download it again"
        ) from e
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a table: damaged; download it again")
    return header


def _tensor(file: Path, number: int, start: int, name: str, entry: Any) -> TensorInfo:
    try:
        dtype, shape = entry["dtype"], _whole_numbers(entry["shape"])
        begin, end = _whole_numbers(entry["data_offsets"])
    except (TypeError, KeyError, ValueError) as e:
        raise CheckpointError(
            f"{file}: the header entry of {name!r} is malformed: damaged; download it again"
        ) from e
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(
            f"{file}: {name!r} has unknown dtype {str(dtype)[:40]!r}: it may need a newer"
            " understudy"
        )
    if prod(shape) * BITS[dtype] != 8 * (end - begin):
        raise CheckpointError(
            f"{file}: {name!r} is {dtype} {list(shape)} but has {end - begin} bytes: damaged;"
            " download it again"
        )
    return TensorInfo(name, number, start + begin, end - begin, dtype, shape)


def _whole_numbers(values: Any) -> tuple[int, ...]:
    """A short list of integers, each fit for a 64-bit file offset."""
    if not isinstance(values, list) or len(values) > MAX_AXES:
        raise ValueError("not a short list")
    if any(type(v) is not int or not 0 <= v < 2**63 for v in values):
        raise ValueError("not whole numbers")
    return tuple(values)


def _check_tiling(
    file: Path, start: int, size: int, found: Sequence[TensorInfo]
) -> list[TensorInfo]:
    """Tensors must follow one another without gap or overlap and end with the file, as the
    safetensors library demands: the dense weights are read through it."""
    ordered = sorted(found, key=lambda t: (t.offset, t.nbytes))
    at = start
    for info in ordered:
        if info.offset != at:
            what = "overlaps the tensor before it" if info.offset < at else "follows a gap"
            raise CheckpointError(f"{file}: {info.name!r} {what}: damaged; download it again")
        at += info.nbytes
        if at > size:
            raise CheckpointError(
                f"{file}: {info.name!r} ends at byte {at} but the file ends at {size}: truncated"
                " shard; download it again"
            )
    if at != size:
        raise CheckpointError(
            f"{file}: {size - at} bytes behind the last tensor: damaged; download it again"
        )
    return ordered


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
