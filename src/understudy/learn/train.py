"""Trains the estimator: the next router's distribution, from the quasi-hidden state.

Knows: pairs (state, layer, distribution), the network, an optimiser. Does not know: text, profiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from understudy.experts.estimator import Estimator
from understudy.experts.foresight import Quasi
from understudy.experts.lookahead import Lookahead
from understudy.experts.runtime import Seen
from understudy.learn.recall import asked_about

WARM_UP = 0.05  # of all steps, in which the rate grows from nothing
LOGGED = 20  # means of the loss that are kept

Report = Callable[[int, int], None]  # (done, in all)


@dataclass(frozen=True, slots=True)
class Training:
    """How to train. ``width`` ``None``: half of the model's."""

    tokens: int = 100_000
    epochs: int = 4
    width: int | None = None
    expansion: int = 4
    rate: float = 2e-3
    batch: int = 512
    decay: float = 0.01


class Pairs:
    """Watches forwards without padding, and keeps what the estimator is asked and should answer."""

    def __init__(self, quasi: Quasi, routers: Lookahead, experts: int) -> None:
        self.quasi, self.routers, self.experts = quasi, routers, experts
        self.x: list[torch.Tensor] = []
        self.target: list[torch.Tensor] = []
        self.layer: list[torch.Tensor] = []
        self._asked: torch.Tensor | None = None

    def __call__(self, seen: Seen) -> None:
        layer = seen.event.layer
        if layer and self._asked is not None:
            chances = self.routers.chances(seen.forward, layer)
            if chances is not None:
                missing = self.experts - chances.shape[1]
                self.x.append(self._asked.clone())
                self.target.append(torch.nn.functional.pad(chances, (0, missing)).half())
                self.layer.append(torch.full((len(chances),), layer))
        last = layer + 1 == len(self.routers.routers)
        self._asked = None if last else asked_about(self.quasi, seen)

    def __len__(self) -> int:
        return sum(map(len, self.x))

    def whole(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.cat(self.x), torch.cat(self.layer), torch.cat(self.target)


def train(
    pairs: Pairs, layers: int, how: Training, seed: int, report: Report
) -> tuple[Estimator, list[tuple[int, float]]]:
    """The network, and (step, mean KL in nats since the last) as it went."""
    x, layer, target = pairs.whole()
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        width = how.width or max(1, x.shape[1] // 2)
        network = Estimator(x.shape[1], target.shape[1], layers, width, how.expansion)
        log = _train(network, (x, layer, target), how, report)
    return network.eval().requires_grad_(False), log


def _train(
    network: Estimator, pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], how: Training,
    report: Report,
) -> list[tuple[int, float]]:  # fmt: skip
    optimiser = torch.optim.AdamW(network.parameters(), how.rate, weight_decay=how.decay)
    count = len(pairs[0])
    per_epoch = math.ceil(count / how.batch)
    steps = how.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: _share(s, steps))
    log, lately = [], []
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(count)
        place = step % per_epoch * how.batch
        x, layer, target = (part[order[place : place + how.batch]] for part in pairs)
        loss = divergence(network(x.float(), layer), target.float())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        lately.append(loss.item())
        if (step + 1) % max(1, steps // LOGGED) == 0 or step + 1 == steps:
            log.append((step + 1, round(sum(lately) / len(lately), 5)))
            lately = []
        report(step + 1, steps)
    return log


def divergence(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """KL(target || softmax of logits), mean over rows. Targets were stored with few digits."""
    target = target / target.sum(-1, keepdim=True)
    return torch.nn.functional.kl_div(logits.log_softmax(-1), target, reduction="batchmean")


def _share(step: int, steps: int) -> float:
    """Of the rate: up in a straight line, down along a cosine."""
    rise = max(1, int(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
