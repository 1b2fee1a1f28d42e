"""From byte ranges in files to tensors: every offset, every tail, both ways of reading."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from understudy.core import ByteRange, ExpertId, ExpertLayout, Piece, ReadFailed
from understudy.engine import Anatomy
from understudy.experts.store import PAGE, Arena, Disk, Store, slot_bytes, windows

E = ExpertId(0, 0)

BUFFERED_OR_DIRECT = pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])


def piece(read: int, nbytes: int, start: int = 0) -> Piece:
    return Piece(read, start, "uint8", (nbytes,), (1,))


def layout(*reads: tuple[int, int, int]) -> ExpertLayout:
    """An expert of these (file, offset, nbytes), each one parameter of plain bytes."""
    ranges = tuple(ByteRange(*r) for r in reads)
    params = {f"p{i}": (piece(i, r.nbytes),) for i, r in enumerate(ranges)}
    return ExpertLayout(ranges, params)


def write(path: Path, nbytes: int, seed: int = 0) -> bytes:
    content = random.Random(seed).randbytes(nbytes)
    path.write_bytes(content)
    return content


def bring(store: Store, expert: ExpertId, slot: int, block: int = 1 << 20) -> dict[str, bytes]:
    """Read an expert and show its parameters as bytes."""
    for chunk in store.chunks(expert, slot, block):
        store.disk.read(chunk)
    return {name: p[0].numpy().tobytes() for name, p in store.weights(expert, slot).items()}


# ---------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("offset", "nbytes", "first", "size"),
    [
        (0, 1, 0, PAGE),
        (0, PAGE, 0, PAGE),
        (1, PAGE, 0, 2 * PAGE),
        (PAGE - 1, 2, 0, 2 * PAGE),
        (PAGE, PAGE, PAGE, PAGE),
        (3 * PAGE + 5, 10, 3 * PAGE, PAGE),
    ],
)
def test_a_window_is_the_whole_pages_around_a_range(
    offset: int, nbytes: int, first: int, size: int
) -> None:
    (w,) = windows(layout((0, offset, nbytes)))
    assert (w.offset, w.nbytes, w.at) == (first, size, 0)
    assert w.offset + w.end == offset + nbytes


def test_windows_lie_one_after_the_other_in_a_slot() -> None:
    first, second = windows(layout((0, 10, PAGE), (1, 5 * PAGE, 7)))
    assert (first.at, first.nbytes) == (0, 2 * PAGE)
    assert (second.file, second.at, second.nbytes) == (1, 2 * PAGE, PAGE)


def test_a_slot_holds_the_largest_expert() -> None:
    assert slot_bytes({E: layout((0, 0, 1)), ExpertId(0, 1): layout((0, 1, PAGE))}) == 2 * PAGE


def test_slots_are_whole_pages() -> None:
    with pytest.raises(ValueError, match="whole number of pages"):
        Arena(2, PAGE + 1)


@pytest.mark.parametrize("block", [PAGE, 3 * PAGE, 1 << 20])
def test_chunks_cover_a_window_once_in_blocks_and_stop_at_the_last_byte(
    tmp_path: Path, block: int
) -> None:
    write(tmp_path / "f", 30 * PAGE)
    lies = layout((0, 100, 20 * PAGE), (0, 25 * PAGE, 10))
    store = Store([tmp_path / "f"], {E: lies}, 1, direct=False)
    chunks = store.chunks(E, 0, block)
    assert all(len(c.view) <= block and 0 < c.least <= len(c.view) for c in chunks)
    covered = [at for c in chunks for at in range(c.offset, c.offset + c.least)]
    assert len(covered) == len(set(covered))
    assert set(covered) == {*range(100 + 20 * PAGE), *range(25 * PAGE, 25 * PAGE + 10)}


# ------------------------------------------------------------------------------------- reading


@BUFFERED_OR_DIRECT
@pytest.mark.parametrize("tail", [0, 1, 511, 512, 513, PAGE - 1])
def test_the_end_of_a_file_is_read_to_its_last_byte(
    tmp_path: Path, tail: int, direct: bool
) -> None:
    content = write(tmp_path / "f", 3 * PAGE + tail)
    start = 2 * PAGE + 77
    lies = layout((0, start, len(content) - start))
    store = Store([tmp_path / "f"], {E: lies}, 1, direct=direct)
    assert bring(store, E, 0, block=PAGE)["p0"] == content[start:]


@BUFFERED_OR_DIRECT
@pytest.mark.parametrize("seed", range(10))
def test_any_ranges_of_any_files(tmp_path: Path, seed: int, direct: bool) -> None:
    dice = random.Random(seed)
    files = [tmp_path / "a", tmp_path / "b"]
    contents = [write(f, dice.randrange(1, 12 * PAGE), seed) for f in files]
    layouts = {}
    for number in range(6):
        reads = []
        for _ in range(dice.choice([1, 2, 3])):
            file = dice.randrange(2)
            offset = dice.randrange(len(contents[file]))
            reads.append((file, offset, dice.randint(1, len(contents[file]) - offset)))
        layouts[ExpertId(0, number)] = layout(*reads)
    store = Store(files, layouts, 2, direct=direct)
    for expert, lies in layouts.items():
        found = bring(store, expert, dice.randrange(2), block=dice.choice([PAGE, 4 * PAGE]))
        for name, r in zip(lies.params, lies.reads, strict=True):
            assert found[name] == contents[r.file][r.offset : r.offset + r.nbytes]


@BUFFERED_OR_DIRECT
def test_an_address_keeps_its_offset_in_the_page(tmp_path: Path, direct: bool) -> None:
    write(tmp_path / "f", 8 * PAGE)
    offsets = [0, 8, 16, 1000, PAGE - 8, PAGE + 24]
    layouts = {ExpertId(0, i): layout((0, at, PAGE)) for i, at in enumerate(offsets)}
    store = Store([tmp_path / "f"], layouts, 3, direct=direct)
    for expert, lies in layouts.items():
        for slot in range(3):
            view = store.weights(expert, slot)["p0"][0]
            assert view.data_ptr() % PAGE == lies.reads[0].offset % PAGE


@BUFFERED_OR_DIRECT
def test_slots_do_not_touch_each_other(tmp_path: Path, direct: bool) -> None:
    content = write(tmp_path / "f", 10 * PAGE)
    layouts = {ExpertId(0, i): layout((0, i * PAGE + 9, PAGE)) for i in range(3)}
    store = Store([tmp_path / "f"], layouts, 3, direct=direct)
    for i in (1, 0, 2):
        bring(store, ExpertId(0, i), i)
    for i in range(3):
        (view,) = store.weights(ExpertId(0, i), i)["p0"]
        assert view.numpy().tobytes() == content[i * PAGE + 9 : (i + 1) * PAGE + 9]


def test_a_slot_that_changed_hands_shows_its_new_owner(tmp_path: Path) -> None:
    content = write(tmp_path / "f", 2 * PAGE)
    layouts = {ExpertId(0, i): layout((0, i * PAGE, 64 + i)) for i in range(2)}
    store = Store([tmp_path / "f"], layouts, 1)
    assert bring(store, ExpertId(0, 0), 0)["p0"] == content[:64]
    assert bring(store, ExpertId(0, 1), 0)["p0"] == content[PAGE : PAGE + 65]
    assert bring(store, ExpertId(0, 0), 0)["p0"] == content[:64]


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write(tmp_path / "f", 4 * PAGE)
    store = Store([tmp_path / "f"], {E: layout((0, 5, 3 * PAGE))}, 1, direct=False)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: whole(fd, [views[0][:999]], at))
    assert bring(store, E, 0)["p0"] == content[5 : 5 + 3 * PAGE]


def test_where_direct_reads_are_refused_the_page_cache_helps_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write(tmp_path / "f", 2 * PAGE)
    refusing = os.open

    def refuse(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return refusing(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    store = Store([tmp_path / "f"], {E: layout((0, 0, PAGE))}, 1, direct=True)
    assert not store.disk.direct
    assert bring(store, E, 0)["p0"] == content[:PAGE]


# -------------------------------------------------------------------------------------- failing


@BUFFERED_OR_DIRECT
@pytest.mark.parametrize("left", [0, 100, PAGE, 2 * PAGE + 5])
def test_a_file_that_was_cut_is_an_error_that_names_it(
    tmp_path: Path, left: int, direct: bool
) -> None:
    write(tmp_path / "weights", 4 * PAGE)
    store = Store([tmp_path / "weights"], {E: layout((0, 10, 3 * PAGE))}, 1, direct=direct)
    os.truncate(tmp_path / "weights", left)
    with pytest.raises(ReadFailed, match="weights: ends at byte") as error:
        bring(store, E, 0)
    assert "\n" not in str(error.value)


def rewritten(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


def longer(path: Path) -> None:
    with path.open("ab") as f:
        f.write(b"more")


def removed(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [rewritten, replaced, longer, removed])
def test_a_file_that_is_not_the_one_that_was_opened_is_noticed(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    write(tmp_path / "weights", 4 * PAGE)
    disk = Disk([tmp_path / "weights"])
    disk.check(0)
    change(tmp_path / "weights")
    with pytest.raises(ReadFailed, match=r"weights: .* while running"):
        disk.check(0)


def test_files_are_closed(tmp_path: Path) -> None:
    def open_files() -> set[str]:
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return {os.readlink(f) for f in links if os.path.lexists(f)}

    write(tmp_path / "f", PAGE)
    store = Store([tmp_path / "f"], {E: layout((0, 0, 8))}, 1)
    assert str(tmp_path / "f") in open_files()
    store.close()
    assert str(tmp_path / "f") not in open_files()
    with pytest.raises(FileNotFoundError):
        Disk([tmp_path / "f", tmp_path / "missing"])
    assert str(tmp_path / "f") not in open_files()


def test_closing_below_somebody_who_still_looks_is_harmless(tmp_path: Path) -> None:
    write(tmp_path / "f", PAGE)
    store = Store([tmp_path / "f"], {E: layout((0, 0, 8))}, 1)
    bring(store, E, 0)
    (view,) = store.weights(E, 0)["p0"]
    store.close()
    assert view.shape == (8,)
    assert view.sum() >= 0  # still mapped memory, though its bytes are gone


# ---------------------------------------------------------------------- a real checkpoint's experts


@BUFFERED_OR_DIRECT
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_views_equal_the_tensors_of_safetensors(
    tiny: Callable[..., Path], family: str, dtype: str, direct: bool
) -> None:
    folder = tiny(family, dtype)
    anatomy = Anatomy.of(folder)
    store = Store(anatomy.checkpoint.files, anatomy.layouts, 2, direct=direct)
    with safe_open(folder / "model.safetensors", "pt") as f:
        stored = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    for expert in anatomy.layouts:
        slot = expert.expert % 2
        for chunk in store.chunks(expert, slot, 1 << 20):
            store.disk.read(chunk)
        for name, pieces in store.weights(expert, slot).items():
            found = torch.cat(list(pieces))
            assert found.dtype == getattr(torch, dtype)
            assert torch.equal(found, original(stored, expert, name))
    store.close()


def original(stored: dict[str, torch.Tensor], expert: ExpertId, name: str) -> torch.Tensor:
    """The module's parameter of one expert, out of the checkpoint's own tensors."""
    mine = {
        key.split(".")[-2]: tensor
        for key, tensor in stored.items()
        if f"layers.{expert.layer}." in key and f"experts.{expert.expert}." in key
    }
    if name == "down_proj":
        return mine["down_proj"] if "down_proj" in mine else mine["w2"]
    if "w1" in mine:
        return torch.cat([mine["w1"], mine["w3"]])
    return torch.cat([mine["gate_proj"], mine["up_proj"]])
