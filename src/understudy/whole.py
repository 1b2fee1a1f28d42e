"""Files that appear whole or not at all.

Knows: a temporary name beside the file, and how it takes the file's place. Does not know: what is
written.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from understudy.core import UnderstudyError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when it is whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnderstudyError(f"cannot write {path}: {reason}; name another file") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def keep(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path``."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def first(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path``, there at once (`OSError` where it cannot be). What is
    written to it becomes ``path``, unless there is one by then: the first answer holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    os.close(descriptor)
    try:
        yield Path(name)
        with suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.unlink(name)
