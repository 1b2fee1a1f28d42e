"""Does any lossless setting change a bit? And how far is plain transformers?

    python bench/exactness.py [MODEL ...] [--steps 64] [--json]

For each reference model and dtype: logits of a prefill and greedy decode steps under every setting
below must be equal to the last bit. Against plain transformers (eager experts, fully resident):
largest difference in fp32; mean KL divergence and top-1 agreement in bf16, where transformers' own
implementations differ from each other too. Exit code 1 if a bit differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import understudy

# What may not change a bit. Slots are shares of all experts; 0 is the minimum of two.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"share": 1.0, "predictor": "none"},
    {"share": 0.0, "predictor": "none"},
    {"share": 0.0, "predictor": "next-gate", "depth": 2, "io_threads": 1},
    {"share": 0.3, "predictor": "none", "evictor": "lru-global"},
    {"share": 0.3, "predictor": "next-gate", "io_threads": 8},
    {"share": 0.3, "predictor": "next-gate", "depth": 2, "evictor": "lfru", "direct_io": False},
    {"share": 0.3, "predictor": "last-token", "evictor": "lfu", "io_threads": 1},
    {"share": 0.3, "predictor": "popularity", "evictor": "lru-layer"},
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """``differs``: largest |delta logit| / largest |logit| against plain transformers, ``kl`` and
    ``agreement``: mean over the steps up to the first different token."""

    model: str
    dtype: str
    steps: int
    settings: int
    bit_identical: bool
    same_tokens: bool
    differs: float
    kl: float
    agreement: float


def prompt(vocabulary: int, tokens: int = 96, seed: int = 0) -> torch.Tensor:
    """Random token ids [1, tokens]: every expert gets work."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocabulary, (1, tokens), generator=generator)


def decode(model: Any, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Logits [steps, V] of a prefill and ``steps - 1`` greedy decode steps."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.cat(out.logits)


def guests(
    path: Path, dtype: str, ids: torch.Tensor, steps: int, settings: Sequence[dict[str, Any]]
) -> Iterator[torch.Tensor]:
    """The logits under each setting."""
    experts = understudy.inspect(path).experts
    for setting in settings:
        options = {**setting, "slots": max(2, int(setting["share"] * experts)), "dtype": dtype}
        del options["share"]
        with understudy.load(path, self_switch=False, **options) as model:
            yield decode(model, ids, steps)
            model.understudy.runtime.director.book.check_integrity(idle=True)


def plain(path: Path, dtype: str, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """The logits of transformers itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, experts_implementation="eager"
    )
    return decode(model, ids, steps)


def judge(
    path: Path, dtype: str, steps: int = 64, settings: Sequence[dict[str, Any]] = SETTINGS
) -> Verdict:
    """Run everything on one model in one dtype."""
    ids = prompt(transformers.AutoConfig.from_pretrained(path).vocab_size)
    expected = plain(path, dtype, ids, steps)
    with closing(guests(path, dtype, ids, steps, settings)) as runs:
        first = next(runs)
        equal = [torch.equal(first, other) for other in runs]
    same = first.argmax(-1) == expected.argmax(-1)
    # After the first different token the two continue different texts.
    n = steps if bool(same.all()) else int(same.int().argmin()) + 1
    ours, theirs = first[:n].float(), expected[:n].float()
    kl = torch.nn.functional.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    return Verdict(
        model=path.name,
        dtype=dtype,
        steps=steps,
        settings=len(settings),
        bit_identical=all(equal),
        same_tokens=bool(same.all()),
        differs=float((ours - theirs).abs().max() / theirs.abs().max()),
        kl=float(kl),
        agreement=float(same[:n].float().mean()),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, default=[])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    home = Path(__file__).parents[1] / "models"
    models = arguments.models or [p for p in sorted(home.iterdir()) if (p / "config.json").exists()]
    transformers.logging.disable_progress_bar()
    print(
        "model     dtype      steps  settings  bit-identical  vs transformers: max delta, KL, top-1"
    )
    dtypes = ("float32", "bfloat16")
    verdicts = [judge(m, dtype, arguments.steps) for m in models for dtype in dtypes]
    for v in verdicts:
        print(
            f"{v.model:9} {v.dtype:10} {v.steps:5} {v.settings:9} {v.bit_identical!s:>14}  "
            f"{v.differs:26.1e}  {v.kl:.1e}  {v.agreement:.1%}"
        )
    if arguments.json:
        print(json.dumps([asdict(v) for v in verdicts]))
    return 0 if all(v.bit_identical for v in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
