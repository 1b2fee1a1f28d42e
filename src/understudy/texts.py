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
        data = path.read_bytes()
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    except OSError as e:
        raise UnderstudyError(f"cannot read {path}: {e.strerror}; name another file") from e
    except lzma.LZMAError as e:
        raise UnderstudyError(f"{path} is no xz file ({e}); name another") from e
    except UnicodeDecodeError as e:
        raise UnderstudyError(f"{path} is not a text file in UTF-8; name another") from e
    if ".jsonl" in path.suffixes:
        text = "\n\n".join(_lines(path, text))
    if not text.strip():
        raise UnderstudyError(f"{path} holds no text; leave it out")
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
                f"{path}: line {number} is no JSON object with one of the fields "
                f"{', '.join(FIELDS)}"
            ) from None
