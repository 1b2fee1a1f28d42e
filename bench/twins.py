"""The workload: wide twins of the reference models at about 3 GB, and real text in tokens.

Knows: how wide, and where twins are kept (the user's cache, with `understudy demo`'s). Does not
know: who runs on them.
"""

from __future__ import annotations

from pathlib import Path

from bench.card import progress
from understudy import demo
from understudy.bench import real_text
from understudy.widen import twin_bytes, widen

HIDDEN = 4
EXPERTS = {"fine": 16, "coarse": 15}  # experts of 9.4 MB (as in Qwen3-30B-A3B), and of 47 MB
SMOKE = {"fine": 2, "coarse": 2}


def twin(name: str, *, smoke: bool = False) -> Path:
    """The twin of ``models/<name>``, made now if it is not in the cache."""
    source = demo.models_folder() / name
    multiple = (SMOKE if smoke else EXPERTS)[name]
    mark = demo.fingerprint(source)
    folder = demo.cache_folder() / "bench" / f"{name}-{mark}-h{HIDDEN}-e{multiple}"
    if not folder.is_dir():
        demo.check_disk(folder.parent, twin_bytes(source, HIDDEN, multiple))
        folder.parent.mkdir(parents=True, exist_ok=True)
        progress(f"making the twin {folder.name}, once")
        widen(source, folder, HIDDEN, multiple)
    return folder


def prompts(model: Path, count: int, length: int) -> list[list[int]]:
    """``count`` different pieces of real text of ``length`` tokens each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    ids = list(tokenizer(real_text()[: 40 * count * length], verbose=False).input_ids)
    while len(ids) < count * length:
        ids = ids + ids
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def nbytes(model: Path) -> int:
    """Bytes of the weights on disk."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))
