"""What was learned about a model offline, in one safetensors file: the format, and reading it.

Knows: the names, shapes and meaning of the tensors, and for which model they hold. Does not know:
how they are measured (`learn`), or who uses them.

L MoE layers, E experts (the most that any layer has), H the width of the residual stream:

    uses              [L, E]       tokens that chose the expert, in the data that was read
    coactivation      [L, E, E]    tokens that chose both; the diagonal is empty
    similarity        [L, E, E]    mean cosine of the two experts' outputs on the row's tokens
    entropy           [L, 101]     percentiles of the normalised entropy of the top-k weights
    default_vectors   [L, E, H]    mean unweighted output, rare experts drawn to the layer's mean
    residual_vectors  [L, H]       mean of (next layer's router input - this layer's); last: zero
    sensitivity       [L]          nats of KL per token when the layer's last rank is left out
    estimator.*                    weights of the small network (`experts.estimator`)
    estimator_better  [L]          1 where it beat the next layer's own router on held-out text

Metadata: ``understudy_profile`` (version of the format) and ``provenance``, JSON: model, its
fingerprint, data, tokens, seed, versions, and what each part measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from understudy.core import UnderstudyError

VERSION = "1"


class ProfileError(UnderstudyError):
    """The profile is missing, damaged, of another model, or lacks what a policy needs."""


@dataclass(frozen=True)
class Profile:
    """Tensors by name, and where they come from. Satisfies `policies.Learned`."""

    tensors: Mapping[str, torch.Tensor]
    provenance: Mapping[str, Any]
    name: str = "profile"

    @classmethod
    def load(cls, path: str | Path, fingerprint: str | None = None) -> Profile:
        """Raises `ProfileError` where the file is no profile, or one of another model.
        ``fingerprint`` ``None``: of whatever model, to look at."""
        path = Path(path)
        tensors, metadata = _read(path)
        if metadata.get("understudy_profile") != VERSION:
            raise ProfileError(f"{path}: not a profile; make one with `understudy profile`")
        try:
            provenance = dict(json.loads(metadata["provenance"]))
        except (KeyError, ValueError, TypeError) as e:
            raise ProfileError(f"{path}: its provenance cannot be read; make it again") from e
        if fingerprint is not None and provenance.get("fingerprint") != fingerprint:
            raise ProfileError(
                f"{path}: made for another model ({provenance.get('model')}); make one for this "
                "model with `understudy profile`"
            )
        return cls(tensors, provenance, path.name)

    def save(self, path: str | Path) -> None:
        """Write it whole or not at all."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(path)
        part = path.with_name(path.name + ".part")
        metadata = {"understudy_profile": VERSION, "provenance": json.dumps(dict(self.provenance))}
        try:
            part.touch()  # with the rights that any new file gets; safetensors gives them to nobody
            rights = part.stat().st_mode
            save_file({k: v.contiguous() for k, v in self.tensors.items()}, part, metadata)
            part.chmod(rights)
            os.replace(part, path)
        except (OSError, SafetensorError) as e:
            reason = getattr(e, "strerror", None) or e
            raise ProfileError(f"{path}: cannot be written: {reason}") from e
        finally:
            part.unlink(missing_ok=True)

    def tensor(self, name: str) -> torch.Tensor:
        """One part; `ProfileError` where this profile does not have it."""
        found = self.tensors.get(name)
        if found is None:
            how = " --estimator" if name.startswith("estimator") else ""
            raise ProfileError(
                f"{self.name}: has no {name}; make it with `understudy profile{how}`"
            )
        return found

    @cached_property
    def coactivation(self) -> Sequence[Sequence[Sequence[float]]]:
        return self.tensor("coactivation").tolist()  # type: ignore[no-any-return]

    @cached_property
    def similarity(self) -> Sequence[Sequence[Sequence[float]]]:
        return self.tensor("similarity").tolist()  # type: ignore[no-any-return]

    @cached_property
    def entropy(self) -> Sequence[Sequence[float]]:
        return self.tensor("entropy").tolist()  # type: ignore[no-any-return]


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except FileNotFoundError:
        raise ProfileError(f"{path}: no such profile; make it with `understudy profile`") from None
    except (SafetensorError, OSError, ValueError) as e:
        raise ProfileError(f"{path}: cannot be read as a profile ({e}); make it again") from e
