"""A small cache changes when experts are read, never what they say: every logit is equal.

python examples/same_bits.py models/fine
"""

import sys

import torch

from understudy import Engine


def logits(model: str, tokens: int, **how: object) -> list[torch.Tensor]:
    with Engine(model, max_context=256, **how) as engine:
        kept = engine.generate("Once upon a time", max_new_tokens=tokens, keep_logits=True).logits
    assert kept is not None
    return kept


def main(model: str, tokens: str = "16") -> None:
    resident = logits(model, int(tokens), memory="300%", predictor="none")
    for how in ({"slots": 2, "predictor": "none"}, {"slots": 16, "evictor": "lfu"}):
        few = logits(model, int(tokens), memory="300%", **how)
        equal = all(torch.equal(a, b) for a, b in zip(resident, few, strict=True))
        print(f"{how}: {'equal, bit by bit' if equal else 'DIFFERENT'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
