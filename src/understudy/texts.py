"""Text to calibrate on, to trace and to score: from files, or from what every Python carries.

Knows: plain text (also .xz) and JSON lines. Does not know: tokens, models.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path

from understudy.core import UnderstudyError

FIELDS = ("text", "question", "prompt")  # of a JSON line, the first that is there


def domains(paths: Sequence[str | Path]) -> dict[str, str]:
    """Name of a domain (the file's, without endings) -> its text, files in the order given.
    Without files: the documentation that comes with Python."""
    if not paths:
        return {"python-docs": python_docs()}
    found: dict[str, str] = {}
    for path in map(Path, paths):
        name = path.name.split(".")[0]
        found[name] = f"{found[name]}\n\n{read(path)}" if name in found else read(path)
    return found


def python_docs() -> str:
    """English prose and code: random tokens would route like no text."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read(path: Path) -> str:
    """The text of one file: .txt and the like, .xz of it, or .jsonl with a text field."""
    try:
        if path.suffix == ".xz":
            with lzma.open(path, "rt", encoding="utf-8") as file:
                text = file.read()
        else:
            text = path.read_text(encoding="utf-8")
    except (OSError, lzma.LZMAError, EOFError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UnderstudyError(
            f"{path}: cannot be read as text ({reason}); name another file"
        ) from e
    if path.suffix == ".jsonl":
        text = "\n\n".join(_lines(path, text))
    if not text.strip():
        raise UnderstudyError(f"{path}: holds no text; name another file")
    return text


def _lines(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
            yield next(str(told[name]) for name in FIELDS if name in told)
        except (ValueError, TypeError, StopIteration):
            raise UnderstudyError(
                f"{path}: line {number} is no JSON object with {', '.join(FIELDS[:-1])} or "
                f"{FIELDS[-1]}"
            ) from None
