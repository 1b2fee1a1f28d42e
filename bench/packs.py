"""The packed twin of a model, made once beside it."""

from __future__ import annotations

from pathlib import Path


def packed(model: Path, format: str) -> Path:
    """``model`` with its experts in ``format``, packed now if it was not before."""
    from understudy.packing import pack

    target = model.with_name(f"{model.name}-{format}")
    if not target.is_dir():
        pack(model, format, target)
    return target
