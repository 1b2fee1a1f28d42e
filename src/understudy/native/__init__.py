"""The C code of this package, built once per machine: experts times few tokens at memory speed,
and the steps of a compiled decoder layer.

Knows: the C compiler, the cache of builds, addresses of tensors. Does not know: when the native
kernel is the right one (`kernels` measures that), which expert this is, or where weights come from.

Where no compiler is, or the build fails, `library()` is ``None`` and `why_not()` says so; torch
computes instead. A build is keyed by source, compiler and processor, so it is never the wrong one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

HEADER = Path(__file__).with_name("common.h")
SOURCES = tuple(Path(__file__).with_name(name) for name in ("experts.c", "layer.c", "unpack.c"))
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-Wno-psabi")
KINDS = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "int4": 4, "mxfp4": 5}


class Shape(ctypes.Structure):
    """``struct shape`` of experts.c: what all experts of one layer have in common."""

    _fields_ = (
        ("hidden", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("stride", ctypes.c_int64 * 2),
        ("scale_stride", ctypes.c_int64 * 2),
        ("kind", ctypes.c_int32),
        ("group", ctypes.c_int32 * 2),
        ("dtype", ctypes.c_int32),
    )


class Matrix(ctypes.Structure):
    """``struct matrix`` of experts.c."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("k", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("scale_stride", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("group", ctypes.c_int32),
    )


def cache_folder() -> Path:
    """Where what can be made again is kept: builds, measured choices, twins."""
    if named := os.environ.get("UNDERSTUDY_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "understudy"


@cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, built now if this machine has none yet; ``None`` where torch must do."""
    return _load()[0]


def why_not() -> str | None:
    """Why there is no native kernel here; ``None`` where there is one."""
    return _load()[1]


@cache
def identity() -> str:
    """Source, compiler and processor in one short word: a stored choice holds for one of these."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or ""
    version = _output([compiler, "--version"]).split("\n")[0] if compiler else ""
    parts = (
        *(source.read_text() for source in (HEADER, *SOURCES)),
        " ".join(FLAGS),
        compiler,
        version,
        _processor(),
    )
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform()
    wanted = ("model name", "flags", "Features")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None, "no C compiler (install gcc or clang, or set CC)"
    if sys.platform == "win32":
        return None, "not tried on Windows"
    try:
        built = _build(compiler)
        _share_threads()
        return _declare(ctypes.CDLL(str(built))), None
    except subprocess.CalledProcessError as e:
        lines = [line for line in e.stderr.splitlines() if "error" in line] or ["no reason given"]
        return None, f"{compiler} cannot build it: {lines[0][:160]}"
    except OSError as e:
        return None, f"it cannot be loaded: {e}"


def _build(compiler: str) -> Path:
    """The shared object for this machine; two processes may build it at once, one rename wins."""
    folder = cache_folder() / "kernels"
    built = folder / f"native-{identity()}.so"
    if built.exists():
        return built
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as room:
        parts = [Path(room, f"{source.stem}.o") for source in SOURCES]
        whole = Path(room, "native.so")
        for source, part in zip(SOURCES, parts, strict=True):
            _run([compiler, *FLAGS, "-c", str(source), "-o", str(part)])
        # Not linked with OpenMP: its symbols are those that torch has brought along.
        link = [] if _openmp() else ["-fopenmp"]
        _run([compiler, "-shared", *link, *map(str, parts), "-o", str(whole), "-lm"])
        whole.rename(built)
    return built


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)


@cache
def _openmp() -> str | None:
    """The OpenMP library that torch has loaded (GNU's, LLVM's and Intel's all speak GNU's)."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    files = {line.split()[-1] for line in maps.splitlines() if "omp" in line.rpartition("/")[2]}
    return min((f for f in files if ".so" in f), default=None)


def _share_threads() -> None:
    """Open torch's OpenMP for those who ask for its symbols: one crew of threads, not two."""
    found = _openmp()
    if found is not None:
        ctypes.CDLL(found, mode=ctypes.RTLD_GLOBAL)


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    lib.understudy_swiglu.argtypes = (
        ctypes.c_char_p, number, pointer, pointer, number, pointer, pointer, pointer, ctypes.c_int,
    )  # fmt: skip
    lib.understudy_linears.argtypes = (
        pointer, pointer, number, ctypes.c_int32, pointer, pointer, number, ctypes.c_int,
    )  # fmt: skip
    lib.understudy_sum.argtypes = (
        pointer, pointer, number, number, number, ctypes.c_int, ctypes.c_int, pointer, ctypes.c_int,
    )  # fmt: skip
    lib.understudy_sum.restype = None
    lib.understudy_steps.argtypes = (pointer, number, pointer, ctypes.c_int)
    lib.understudy_attend.argtypes = (*[pointer] * 8, ctypes.c_int)
    lib.understudy_unpack.argtypes = (pointer, number, pointer, ctypes.c_int, ctypes.c_int)
    lib.understudy_unpack.restype = None
    return lib


Coded = tuple[torch.Tensor, torch.Tensor | None]  # codes [lines, K] and their scales, if any


def linears(
    x: torch.Tensor, matrices: Sequence[Coded], kind: str, group: int = 0
) -> list[torch.Tensor]:
    """x [n, K] times each matrix: [n, lines] in the dtype of ``x``. The matrices are of one kind,
    and each line lies in one piece."""
    lib = library()
    assert lib is not None
    x, n = x.contiguous(), len(x)
    outs = [torch.empty(n, len(codes), dtype=x.dtype) for codes, _ in matrices]
    records, lines = _records(x.shape[1], matrices, kind, group)
    addresses = (ctypes.c_void_p * len(outs))(*[out.data_ptr() for out in outs])
    failed = lib.understudy_linears(
        ctypes.addressof(records), ctypes.addressof(lines), len(outs), KINDS[name_of(x.dtype)],
        x.data_ptr(), ctypes.addressof(addresses), n, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the inputs of a matrix")
    return outs


def unpack(
    codes: torch.Tensor, scales: torch.Tensor, k: int, kind: str, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """Codes [lines, ...] and their scales as numbers [lines, k] in ``dtype`` (fp32, fp16 or bf16),
    each rounded once. Each line of codes and of scales lies in one piece."""
    lib = library()
    assert lib is not None
    records, _ = _records(k, [(codes, scales)], kind, group)
    out = torch.empty(len(codes), k, dtype=dtype)
    lib.understudy_unpack(
        ctypes.addressof(records), len(codes), out.data_ptr(), KINDS[name_of(dtype)],
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _records(k: int, matrices: Sequence[Coded], kind: str, group: int) -> tuple[Any, Any]:
    records = (Matrix * len(matrices))()
    for record, (codes, scales) in zip(records, matrices, strict=True):
        record.codes, record.k, record.stride = codes.data_ptr(), k, row_bytes(codes)
        if scales is not None:
            record.scales, record.scale_stride = scales.data_ptr(), row_bytes(scales)
        record.kind, record.group = KINDS[kind], group
    return records, (ctypes.c_int64 * len(matrices))(*[len(codes) for codes, _ in matrices])


def weighted_sum(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """y [T, k, H], weights [T, k] -> [T, H]: the sum over ranks in rank order, rounded once."""
    lib = library()
    kind, weight_kind = KINDS.get(name_of(y.dtype)), KINDS.get(name_of(weights.dtype))
    if lib is None or kind is None or weight_kind is None:
        return (y * weights.unsqueeze(-1)).sum(dim=1).to(y.dtype)
    (tokens, ranks, width), weights = y.shape, weights.contiguous()
    out = torch.empty(tokens, width, dtype=y.dtype)
    lib.understudy_sum(
        y.data_ptr(), weights.data_ptr(), tokens, ranks, width, kind, weight_kind, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


# `linears` as an operator, for compiled code: whole dense matrices of the dtype of their one input
# row, their products one after the other. Such matrices stay where they are, so what C needs to
# know of them is kept.
_operators: Any = torch.library.Library("understudy", "FRAGMENT")  # type: ignore[no-untyped-call]
_operators.define("products(Tensor x, Tensor[] weights) -> Tensor")
_known: dict[tuple[int, ...], tuple[Any, Any, list[int], int]] = {}


def _products(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    lib = library()
    assert lib is not None
    # An address alone is not enough: a model that was closed leaves its own to the next one.
    key = (*x.shape, x.itemsize, *[n for w in weights for n in (w.data_ptr(), w.shape[0])])
    if key not in _known:
        sizes = [w.shape[0] for w in weights]
        starts = [sum(sizes[:i]) * x.itemsize for i in range(len(sizes))]
        pairs = [(w, None) for w in weights]
        records, lines = _records(x.shape[1], pairs, name_of(x.dtype), 0)
        _known[key] = records, lines, starts, sum(sizes)
    records, lines, starts, total = _known[key]
    out = torch.empty(1, total, dtype=x.dtype)
    begin = out.data_ptr()
    failed = lib.understudy_linears(
        records, lines, len(weights), KINDS[name_of(x.dtype)], x.data_ptr(),
        (ctypes.c_void_p * len(weights))(*[begin + start for start in starts]), 1,
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the inputs of a matrix")
    return out


def _products_shape(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    return x.new_empty(1, sum(w.shape[0] for w in weights))


class Place(ctypes.Structure):
    """``struct place`` of layer.c: so many bytes into one of the bases of a call."""

    _fields_ = (("base", ctypes.c_int64), ("offset", ctypes.c_int64))


class Step(ctypes.Structure):
    """``struct step`` of layer.c."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("places", ctypes.POINTER(Place)),
        ("numbers", ctypes.POINTER(ctypes.c_int64)),
        ("kind", ctypes.c_int64),
        ("count", ctypes.c_int64),
    )


LOOP, PRODUCTS, TOPK = range(3)  # kinds of steps
MOST_PLACES, MOST_MATRICES = 32, 15


class Attention(ctypes.Structure):
    """``struct attention`` of layer.c."""

    _fields_ = (
        ("heads", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("room", ctypes.c_int64),
        ("bf16", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


_operators.impl("products", _products, "CPU")
_operators.impl("products", _products_shape, "Meta")


def row_bytes(matrix: torch.Tensor) -> int:
    return matrix.stride(0) * matrix.itemsize if matrix.ndim > 1 else 0


@cache
def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
