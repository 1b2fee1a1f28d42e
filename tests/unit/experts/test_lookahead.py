"""Later routers are asked; for one token their product alone, once it has proved itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from understudy.core import Forward, LayerEvent, Phase
from understudy.experts.lookahead import Lookahead, _Shortcut

HIDDEN, EXPERTS, TOP = 16, 8, 2
EVENT = LayerEvent(0, 0, Phase.DECODE, [[0, 1]], [[0.5, 0.5]])


class Router(torch.nn.Module):
    """Counts how often it is asked. ``bias`` is added after the product, before the choice."""

    def __init__(self, bias: torch.Tensor | float = 0.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.bias, self.asked = bias, 0

    def forward(self, x: torch.Tensor) -> Any:
        self.asked += 1
        logits = torch.nn.functional.linear(x.reshape(-1, HIDDEN), self.weight) + self.bias
        weights, ids = torch.topk(torch.softmax(logits, -1), TOP, -1)
        return logits, weights, ids


def products(x: torch.Tensor, matrices: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.nn.functional.linear(x, m) for m in matrices], dim=1)


def ask(lookahead: Lookahead, x: torch.Tensor, rows: torch.Tensor | None = None) -> dict[int, Any]:
    forward = Forward(0, Phase.DECODE, router_args={0: ((x,), {})})
    with torch.no_grad():
        return lookahead.ask(forward, EVENT, 2, rows)


def prove(lookahead: Lookahead) -> None:
    for _ in range(_Shortcut.TOKENS):
        ask(lookahead, torch.randn(1, 1, HIDDEN))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


def test_a_product_that_picks_what_its_router_picks_is_asked_instead() -> None:
    routers = [Router() for _ in range(3)]
    lookahead = Lookahead(routers, products)
    prove(lookahead)
    assert [r.asked for r in routers] == [0, _Shortcut.TOKENS, _Shortcut.TOKENS]
    x = torch.randn(1, HIDDEN)
    quick, slow = ask(lookahead, x), ask(Lookahead(routers), x)
    assert routers[1].asked == _Shortcut.TOKENS + 1  # by the other lookahead only
    assert {layer: ids for layer, (ids, _) in quick.items()} == {
        layer: ids for layer, (ids, _) in slow.items()
    }


def test_the_weights_are_the_routers_own_whatever_became_of_its_input() -> None:
    routers = [Router() for _ in range(3)]
    lookahead = Lookahead(routers, products)
    prove(lookahead)
    x = torch.randn(1, HIDDEN)
    slow = ask(Lookahead(routers), x)
    quick = ask(lookahead, x)
    x.zero_()
    for layer in (1, 2):
        weights = quick[layer][1]
        assert len(weights) == 1 and list(weights) == slow[layer][1]
        assert weights[0] == slow[layer][1][0]


def test_a_router_that_picks_otherwise_is_asked_itself_for_ever() -> None:
    bias = torch.zeros(EXPERTS)
    bias[3] = 100.0
    routers = [Router(), Router(bias), Router()]
    lookahead = Lookahead(routers, products)
    for _ in range(3):
        prove(lookahead)
    assert routers[1].asked == 3 * _Shortcut.TOKENS
    assert routers[2].asked == _Shortcut.TOKENS
    assert all(3 in ids[0] for ids in [ask(lookahead, torch.randn(1, HIDDEN))[1][0]])


def test_several_tokens_and_padding_are_asked_of_the_routers() -> None:
    routers = [Router() for _ in range(3)]
    lookahead = Lookahead(routers, products)
    prove(lookahead)
    before = routers[1].asked
    assert len(ask(lookahead, torch.randn(1, 5, HIDDEN))[1][0]) == 5
    rows = torch.tensor([True, False])
    assert len(ask(lookahead, torch.randn(2, HIDDEN), rows)[1][0]) == 1
    assert routers[1].asked == before + 2


@pytest.mark.parametrize("weight", [torch.zeros(EXPERTS, HIDDEN, dtype=torch.float64), None])
def test_a_router_without_such_a_matrix_is_asked_itself(weight: torch.Tensor | None) -> None:
    routers = [Router() for _ in range(2)]
    plain = routers[1].weight
    del routers[1].weight
    routers[1].weight = plain.data.t().contiguous().t()  # not the lines that a product needs
    if weight is not None:
        routers[1].forward = lambda x: (x, x[:, :TOP], torch.zeros(1, TOP, dtype=torch.int64))  # type: ignore[method-assign]
        routers[1].weight = weight  # type: ignore[assignment]
    lookahead = Lookahead(routers, products)
    for _ in range(2 * _Shortcut.TOKENS):
        assert 1 in ask(lookahead, torch.randn(1, HIDDEN))
