"""Makes a wide twin of a small MoE: the same function, with experts of realistic size.

Hidden and expert dimensions are padded with zeros. The twin routes token by token as the original
does and gives the same logits, but its experts have the bytes of a large model's, so that speed
can be measured on the twin and quality on the original.

Knows the tensor names of Mixtral- and Qwen3-MoE-shaped checkpoints and the safetensors format,
which it writes tensor by tensor: the twin is never whole in memory. Does not know how models are
run, and imports nothing else of this project.

What zeros change, and how it is put right:

- An RMSNorm over c times as many lanes, the new ones zero, sees a mean square c times smaller.
  With eps divided by c its result is sqrt(c) times too large; its weight is divided by sqrt(c).
- Qwen3's norms of queries and keys run over head_dim, which stays, but share the config's eps.
  Dividing the query and key projections by sqrt(c) scales the mean square there by c, too.

For c a power of four all of this is exact in binary floating point; no other c is accepted.
"""

import argparse
import json
import math
import os
import re
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

SHARD_BYTES = 512 * 2**20
WRITERS = 8  # shards written at a time; each holds one tensor in memory
INDEX = "model.safetensors.index.json"
COPIED = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja",
          "generation_config.json")  # fmt: skip

Progress = Callable[[int, int], None]

KEEP, HIDDEN, WIDTH = "keep", "hidden", "width"

# Which dimension of which tensor grows. The first match of the whole name counts.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"model\.embed_tokens\.weight|lm_head\.weight", (KEEP, HIDDEN)),
    (r".*\.self_attn\.[qkv]_proj\.weight", (KEEP, HIDDEN)),
    (r".*\.self_attn\.[qkv]_proj\.bias|.*\.self_attn\.[qk]_norm\.weight", (KEEP,)),
    (r".*\.self_attn\.o_proj\.weight", (HIDDEN, KEEP)),
    (r".*\.self_attn\.o_proj\.bias", (HIDDEN,)),
    (r"model\.norm\.weight|.*\.(input|post_attention)_layernorm\.weight", (HIDDEN,)),
    (r".*\.(mlp|block_sparse_moe)\.gate\.weight", (KEEP, HIDDEN)),
    (r".*\.experts\.\d+\.(gate_proj|up_proj|w1|w3)\.weight", (WIDTH, HIDDEN)),
    (r".*\.experts\.\d+\.(down_proj|w2)\.weight", (HIDDEN, WIDTH)),
    (r".*\.mlp\.(gate|up)_proj\.weight", (KEEP, HIDDEN)),
    (r".*\.mlp\.down_proj\.weight", (HIDDEN, KEEP)),
)

WIDTH_KEY = {"mixtral": "intermediate_size", "qwen3_moe": "moe_intermediate_size"}


@dataclass(frozen=True)
class Planned:
    """One tensor: where it is read, what it becomes."""

    name: str
    source: Path
    dtype: str
    shape: tuple[int, ...]
    divisor: int
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """A twin before anything of it is written: tensors by shard, and the small files."""

    shards: list[tuple[bytes, list[Planned]]]
    texts: dict[str, bytes]
    copies: list[Path]

    @property
    def tensor_bytes(self) -> int:
        return sum(one.nbytes for _, tensors in self.shards for one in tensors)

    @property
    def all_bytes(self) -> int:
        headers = sum(len(header) for header, _ in self.shards)
        texts = sum(map(len, self.texts.values()))
        return self.tensor_bytes + headers + texts + sum(one.stat().st_size for one in self.copies)


def widen(
    src: Path,
    dst: Path,
    hidden_multiple: int,
    expert_multiple: int,
    progress: Progress | None = None,
) -> None:
    """Write the twin of `src` to `dst`, which must not exist; it appears whole or not at all.

    The expert width becomes `expert_multiple` times what it was, the hidden size
    `hidden_multiple` times (a power of four). `progress` gets bytes done and bytes in all.
    """
    src, dst = Path(src), Path(dst)
    if dst.exists():
        raise FileExistsError(f"{dst} exists already; remove it or choose another place")
    plan = _plan(src, hidden_multiple, expert_multiple)
    partial = dst.with_name(f".{dst.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run may have left
    partial.mkdir(parents=True)
    try:
        _write(plan, partial, progress or (lambda done, total: None))
        partial.rename(dst)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def twin_bytes(src: Path, hidden_multiple: int, expert_multiple: int) -> int:
    """How many bytes on disk the twin of `src` will need."""
    return _plan(Path(src), hidden_multiple, expert_multiple).all_bytes


# --- planning --------------------------------------------------------------------------------


def _plan(src: Path, hidden_multiple: int, expert_multiple: int) -> Plan:
    root = math.isqrt(max(hidden_multiple, 0))
    if root == 0 or root * root != hidden_multiple or root & (root - 1):
        raise ValueError(
            f"the hidden multiple must be a power of four (1, 4, 16, ...), not {hidden_multiple}: "
            "only then is the twin exact"
        )
    if expert_multiple < 1:
        raise ValueError(f"the expert multiple must be at least 1, not {expert_multiple}")
    config = json.loads((src / "config.json").read_text(encoding="utf-8"))
    family = config.get("model_type")
    if family not in WIDTH_KEY:
        raise ValueError(f"can widen {' and '.join(WIDTH_KEY)}, not {family!r}")
    growth = {KEEP: 1, HIDDEN: hidden_multiple, WIDTH: expert_multiple}
    tensors = [_planned(*one, family, growth, root) for one in _stored(src)]
    shards = _shards(tensors)
    texts = {
        "config.json": _json(_wide_config(config, family, hidden_multiple, expert_multiple)),
        INDEX: _json(_index(shards)),
    }
    copies = sorted({path for pattern in COPIED for path in src.glob(pattern) if path.is_file()})
    return Plan([(_header(shard), shard) for shard in shards], texts, copies)


def _stored(src: Path) -> Iterator[tuple[Path, str, str, tuple[int, ...]]]:
    """(file, name, dtype, shape) of every tensor in the order in which they lie on disk."""
    files = sorted(src.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{src} has no .safetensors file")
    for path in files:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name in sorted(header, key=lambda one: header[one]["data_offsets"][0]):
            yield path, name, header[name]["dtype"], tuple(header[name]["shape"])


def _planned(
    source: Path,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    family: str,
    growth: dict[str, int],
    root: int,
) -> Planned:
    for pattern, kinds in RULES:
        if re.fullmatch(pattern, name) and len(kinds) == len(shape):
            break
    else:
        raise ValueError(f"{source.name}: no rule how to widen {name} with shape {list(shape)}")
    wide = tuple(size * growth[kind] for size, kind in zip(shape, kinds, strict=True))
    hidden_norm = kinds == (HIDDEN,) and "norm" in name
    normed_later = family == "qwen3_moe" and re.fullmatch(r".*\.[qk]_proj\.(weight|bias)", name)
    divisor = root if hidden_norm or normed_later else 1
    return Planned(name, source, dtype, wide, divisor, math.prod(wide) * _itemsize(dtype))


def _itemsize(dtype: str) -> int:
    sizes = {"F32": 4, "BF16": 2}  # not F16: its small numbers would lose bits when divided
    if dtype not in sizes:
        raise ValueError(f"can widen {', '.join(sizes)} tensors, not {dtype}")
    return sizes[dtype]


def _shards(tensors: list[Planned]) -> list[list[Planned]]:
    """Fill one shard after the other; only a tensor larger than a shard makes one larger."""
    shards: list[list[Planned]] = [[]]
    room = SHARD_BYTES
    for one in tensors:
        if one.nbytes > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(one)
        room -= one.nbytes
    return shards


def _header(shard: list[Planned]) -> bytes:
    """Length and JSON as the safetensors format wants them, data beginning at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for one in shard:
        end = begin + one.nbytes
        entries[one.name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _index(shards: list[list[Planned]]) -> dict[str, Any]:
    where = {
        one.name: _shard_name(number, len(shards))
        for number, shard in enumerate(shards)
        for one in shard
    }
    total = sum(one.nbytes for shard in shards for one in shard)
    return {"metadata": {"total_size": total}, "weight_map": where}


def _wide_config(
    config: dict[str, Any], family: str, hidden_multiple: int, expert_multiple: int
) -> dict[str, Any]:
    wide = dict(config)
    # Unless it is said, transformers derives the head size from the hidden size, which grows.
    wide["head_dim"] = (
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    )
    wide["hidden_size"] = config["hidden_size"] * hidden_multiple
    wide[WIDTH_KEY[family]] = config[WIDTH_KEY[family]] * expert_multiple
    wide["rms_norm_eps"] = config["rms_norm_eps"] / hidden_multiple
    wide["widened"] = {"hidden_multiple": hidden_multiple, "expert_multiple": expert_multiple}
    return wide


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


# --- writing ---------------------------------------------------------------------------------


def _write(plan: Plan, folder: Path, progress: Progress) -> None:
    """Shards side by side: a twin of 30 GB is waited for. ``progress`` is called by one thread at a
    time."""
    done, total, turn = 0, plan.tensor_bytes, threading.Lock()

    def wrote(nbytes: int) -> None:
        nonlocal done
        with turn:
            done += nbytes
            progress(done, total)

    def write(number: int) -> None:
        _write_shard(folder / _shard_name(number, len(plan.shards)), *plan.shards[number], wrote)

    with ThreadPoolExecutor(min(WRITERS, os.cpu_count() or 1)) as writers:
        for _ in writers.map(write, range(len(plan.shards))):
            pass
    for name, text in plan.texts.items():
        (folder / name).write_bytes(text)
    for path in plan.copies:
        shutil.copyfile(path, folder / path.name)


def _write_shard(
    path: Path, header: bytes, tensors: list[Planned], wrote: Callable[[int], None]
) -> None:
    with path.open("wb") as file:
        file.write(header)
        for one in tensors:
            _write_tensor(one, file)
            wrote(one.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(one: Planned, file: BinaryIO) -> None:
    """Zeros are written, not skipped: a sparse file would be read without touching the disk."""
    with safe_open(one.source, framework="pt") as source:
        narrow: Tensor = source.get_tensor(one.name)
    wide = torch.zeros(one.shape, dtype=narrow.dtype)
    wide[tuple(slice(size) for size in narrow.shape)] = narrow / one.divisor
    file.write(wide.view(torch.uint8).numpy().data)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("src", type=Path)
    parser.add_argument("dst", type=Path)
    parser.add_argument("--hidden", type=int, default=4, help="hidden size times this (4)")
    parser.add_argument("--experts", type=int, default=8, help="expert width times this (8)")
    arguments = parser.parse_args()
    needed = twin_bytes(arguments.src, arguments.hidden, arguments.experts)
    arguments.dst.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(arguments.dst.parent).free
    if needed > free:
        sys.exit(f"the twin needs {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f}")

    def show(done: int, total: int) -> None:
        print(f"\r{done / 2**20:,.0f} of {total / 2**20:,.0f} MiB", end="", flush=True)

    widen(arguments.src, arguments.dst, arguments.hidden, arguments.experts, show)
    print()


if __name__ == "__main__":
    main()
