"""Dense weights that a checkpoint stores quantised: unpacked once, when the model is loaded.

Knows: which dense tensors are codes, and how to turn them into numbers. Does not know: what the
model does with them. They stay resident, so unlike experts they gain nothing from staying packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import safe_open

from understudy import formats
from understudy.checkpoint import Checkpoint, ExpertsModule, TensorInfo
from understudy.core import CheckpointError


def is_quantised(checkpoint: Checkpoint, bones: Any, modules: Sequence[ExpertsModule]) -> bool:
    """Whether transformers could not load the dense weights by itself."""
    return any(scales is not None for _, _, scales in checkpoint.dense_parts(bones, modules))


def weights(
    checkpoint: Checkpoint, bones: Any, modules: Sequence[ExpertsModule], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """All dense weights under the names of a plain checkpoint; what was packed is in ``dtype``."""
    found = {}
    with _reader(checkpoint) as read:
        for name, info, scales in checkpoint.dense_parts(bones, modules):
            tensor = read(info)
            if scales is not None and checkpoint.scheme is not None:
                expected = checkpoint.scheme.scales_shape_of(info.shape)
                if scales.shape != expected:
                    raise CheckpointError(
                        f"{scales.name} is {list(scales.shape)} and should be {list(expected)}:"
                        " damaged; download it again"
                    )
                tensor = formats.get(checkpoint.format).unpack(tensor, read(scales), dtype)
            found[name] = tensor
    return found


@contextmanager
def _reader(checkpoint: Checkpoint) -> Iterator[Any]:
    """A function that reads one tensor."""
    opened: dict[int, Any] = {}

    def read(info: TensorInfo) -> torch.Tensor:
        if info.file not in opened:
            file = safe_open(checkpoint.files[info.file], framework="pt")
            opened[info.file] = stack.enter_context(file)
        tensor: torch.Tensor = opened[info.file].get_tensor(info.name)
        return tensor.view(torch.uint8) if info.dtype == "F8_E8M0" else tensor

    with ExitStack() as stack:
        yield read
