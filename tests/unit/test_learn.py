"""What is learned about a model, against slow and obvious versions on plain transformers."""

from __future__ import annotations

import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from understudy import model as guest
from understudy.core import BudgetTooSmall, UnderstudyError
from understudy.engine import Engine, load
from understudy.experts.estimator import Estimator
from understudy.experts.foresight import Quasi
from understudy.experts.lookahead import Lookahead
from understudy.learn import Settings, Source, Training, learn, probe, read
from understudy.learn.count import Counts, entropy, percentiles
from understudy.learn.probe import kl, sensitivity
from understudy.learn.recall import Tally
from understudy.learn.text import Windows, windows
from understudy.learn.train import Pairs, divergence, train
from understudy.policies import buddy
from understudy.profile import Profile
from understudy.texts import python_docs

TEXT = python_docs()[:30_000]
HOW = Settings(
    tokens=1200, window=24, smoothing=5.0, sample=40, probed=2, seed=3,
    estimator=Training(tokens=600, epochs=2, width=8, batch=64),
)  # fmt: skip
LAYERS, EXPERTS = 4, 32


def source() -> Source:
    return Source.of("manual", TEXT.encode(), TEXT)


@pytest.fixture(scope="module")
def made(speaking_model: Path) -> Profile:
    return learn(speaking_model, [source()], HOW, memory="75%")


@pytest.fixture(scope="module")
def cut(speaking_model: Path) -> Windows:
    with Engine(speaking_model, memory="1GiB") as engine:
        return windows(engine.encode, [source()], HOW.tokens, HOW.window, HOW.seed)


# ------------------------------------------------------------------------------ the slow version


@dataclass
class Layer:
    """What plain transformers does in one MoE layer, over all windows of a text."""

    norm: Any
    gate: Any
    experts: Any
    r: list[torch.Tensor] = field(default_factory=list)
    s: list[torch.Tensor] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)

    def output(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(x, self.experts.gate_up_proj[expert]).chunk(2, -1)
        out: torch.Tensor = F.linear(F.silu(gate) * up, self.experts.down_proj[expert])
        return out

    def choose(self, x: torch.Tensor) -> list[int]:
        found: list[int] = self.gate(x[None])[-1][0].tolist()
        return found


@pytest.fixture(scope="module")
def plain(speaking_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        speaking_model, experts_implementation="eager"
    ).eval()


def slowly(plain: Any, text: Sequence[Sequence[int]]) -> list[Layer]:
    layers = [
        Layer(d.post_attention_layernorm, d.mlp.gate, d.mlp.experts) for d in plain.model.layers
    ]
    hooks = []
    for layer in layers:

        def residual(m: Any, args: Any, layer: Layer = layer) -> None:
            layer.r.extend(args[0][0])

        def routed(m: Any, args: Any, out: Any, layer: Layer = layer) -> None:
            layer.s.extend(args[0].reshape(-1, args[0].shape[-1]))
            layer.weights += out[1].tolist()
            layer.ids += out[2].tolist()

        hooks += [layer.norm.register_forward_pre_hook(residual)]
        hooks += [layer.gate.register_forward_hook(routed)]
    with torch.no_grad():
        for window in text:
            plain(input_ids=torch.tensor([window]))
    for hook in hooks:
        hook.remove()
    return layers


@pytest.fixture(scope="module")
def learned(plain: Any, cut: Windows) -> list[Layer]:
    return slowly(plain, cut.learned)


@pytest.fixture(scope="module")
def reported(plain: Any, cut: Windows) -> list[Layer]:
    return slowly(plain, cut.reported)


# --------------------------------------------------------------------------------- what is counted


def test_uses_and_coactivation(made: Profile, learned: list[Layer]) -> None:
    for layer, slow in enumerate(learned):
        uses, both = [0] * EXPERTS, [[0] * EXPERTS for _ in range(EXPERTS)]
        for row in slow.ids:
            for a in row:
                uses[a] += 1
                for b in row:
                    both[a][b] += a != b
        assert made.tensor("uses")[layer].tolist() == uses
        assert made.coactivation[layer] == both
        rare, never = sum(n < HOW.smoothing for n in uses), uses.count(0)
        assert made.provenance["rarely_chosen"][layer] == rare
        assert made.provenance["never_chosen"][layer] == never
    assert sum(made.provenance["rarely_chosen"]) > 0  # or smoothing has nothing to do


def test_default_vectors_are_smoothed_means_of_unweighted_outputs(
    made: Profile, learned: list[Layer]
) -> None:
    for layer, slow in enumerate(learned):
        outputs: dict[int, list[torch.Tensor]] = {e: [] for e in range(EXPERTS)}
        with torch.no_grad():
            for x, row in zip(slow.s, slow.ids, strict=True):
                for expert in row:
                    outputs[expert].append(slow.output(expert, x))
        everything = torch.stack([o for found in outputs.values() for o in found])
        mean = everything.mean(0)
        for expert, found in outputs.items():
            total = torch.stack(found).sum(0) if found else torch.zeros_like(mean)
            expected = (total + HOW.smoothing * mean) / (len(found) + HOW.smoothing)
            torch.testing.assert_close(
                made.tensor("default_vectors")[layer, expert], expected, rtol=1e-4, atol=1e-5
            )


def test_residual_vectors(made: Profile, learned: list[Layer]) -> None:
    found = made.tensor("residual_vectors")
    assert found[-1].count_nonzero() == 0
    for layer in range(LAYERS - 1):
        here, there = (torch.stack(learned[at].s) for at in (layer, layer + 1))
        torch.testing.assert_close(
            found[layer], (there - here).mean(0), rtol=1e-4, atol=1e-5
        )  # fmt: skip


def test_entropy_percentiles_are_of_what_buddy_measures(
    made: Profile, learned: list[Layer]
) -> None:
    for layer, slow in enumerate(learned):
        found = torch.tensor([buddy.entropy(w) for w in slow.weights])
        expected = torch.quantile(found, torch.linspace(0, 1, 101))
        torch.testing.assert_close(
            torch.tensor(made.entropy[layer]), expected, rtol=1e-3, atol=1e-4
        )


def test_entropy_by_row() -> None:
    weights = torch.tensor([[0.5, 0.5], [0.9, 0.1], [1.0, 0.0], [3.0, 1.0]])
    expected = [buddy.entropy(row) for row in weights.tolist()]
    assert entropy(weights).tolist() == pytest.approx(expected)
    assert entropy(torch.ones(2, 1)).tolist() == [buddy.entropy([1.0])] * 2 == [0, 0]
    assert percentiles(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 0.25, 1.0])).tolist() == [
        1.0, 1.5, 3.0,
    ]  # fmt: skip


def test_an_expert_that_nobody_chose_gets_its_layers_mean_even_unsmoothed() -> None:
    counts = Counts([3])
    counts.uses[0] = torch.tensor([1, 3, 0])
    counts._sums[0] = torch.tensor([[2.0], [6.0], [0.0]], dtype=torch.float64)
    assert counts.default_vectors(0).tolist() == [[[2.0], [2.0], [2.0]]]
    counts._sums[0] = torch.tensor([[4.0], [0.0], [0.0]], dtype=torch.float64)
    assert counts.default_vectors(0).tolist() == [[[4.0], [0.0], [1.0]]]
    assert counts.default_vectors(1).tolist() == [[[2.5], [0.25], [1.0]]]


# -------------------------------------------------------------------------- all experts, one token


def test_similarity(made: Profile, learned: list[Layer]) -> None:
    """The sample is drawn anew as `learn` draws it; the rest is done one cosine at a time."""
    import random

    places = sorted(random.Random(HOW.seed).sample(range(len(learned[0].s)), HOW.sample))
    few = made.provenance["similarity"]["rows_over_all_tokens"]
    assert min(few) > 0 and max(few) < EXPERTS
    for layer in (0, LAYERS - 1):
        slow, found = learned[layer], made.tensor("similarity")[layer]
        with torch.no_grad():
            outputs = {
                p: [slow.output(e, slow.s[p]) for e in range(EXPERTS)] for p in places
            }  # fmt: skip
        poor = 0
        for i in range(EXPERTS):
            own = [p for p in places if i in slow.ids[p]]
            poor += len(own) < probe.ENOUGH
            over = own if len(own) >= probe.ENOUGH else places
            for j in (0, 7, i):
                cosines = [F.cosine_similarity(outputs[p][i], outputs[p][j], 0) for p in over]
                expected = float(sum(cosines) / len(over))
                assert float(found[i, j]) == pytest.approx(expected, abs=1e-4)
        assert few[layer] == poor


# --------------------------------------------------------------------------- without the last rank


def quiet_layer(plain: Any, folder: Path) -> Path:
    """A checkpoint whose experts of layer 1 put out nothing."""
    with torch.no_grad():
        plain.model.layers[1].mlp.experts.down_proj.zero_()
    plain.save_pretrained(folder)
    return folder


def logits_of(model: Any) -> Callable[[Sequence[int]], torch.Tensor]:
    def logits(window: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=torch.tensor([window])).logits[0]
        return found

    return logits


def test_sensitivity(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny("mixtral")).eval()
    folder, text = quiet_layer(plain, tmp_path), [list(range(5, 17)), list(range(40, 52))]
    with load(folder, slots=5, dtype="float32", predictor="none", frame="eager") as model:
        runtime = model.understudy.runtime
        usual = runtime.director.route
        found = sensitivity(logits_of(model), runtime, 3, text, lambda done, total: None)
        assert runtime.director.route is usual
        assert runtime.counters.skipped == 3 * 24  # one pair per token, layer and window
    expected = [sum(_kl_without_last(plain, layer, w) for w in text) / 24 for layer in range(3)]
    assert found.tokens == 24
    assert found.nats[1] == 0  # by nothing less is nothing lost
    assert found.nats.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert min(expected[0], expected[2]) > 1e-4


def _kl_without_last(plain: Any, layer: int, window: Sequence[int]) -> float:
    def drop(m: Any, args: Any, out: Any) -> Any:
        scores = out[1].clone()
        scores[:, -1] = 0
        return out[0], scores, out[2]

    exact = logits_of(plain)(window)
    hook = plain.model.layers[layer].mlp.gate.register_forward_hook(drop)
    other = logits_of(plain)(window)
    hook.remove()
    p = exact.softmax(-1)
    return float((p * (exact.log_softmax(-1) - other.log_softmax(-1))).sum())


def test_kl_by_hand() -> None:
    exact, other = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    by_hand = 0.5 * torch.log(torch.tensor(0.5 / 0.25)) + 0.5 * torch.log(torch.tensor(0.5 / 0.75))
    assert kl(exact.expand(70, 2), other.expand(70, 2)) == pytest.approx(70 * float(by_hand))


# ------------------------------------------------------------------------------------ looking ahead


def test_recall_and_cosine_of_foresights(
    made: Profile, learned: list[Layer], reported: list[Layer]
) -> None:
    vectors = made.tensor("default_vectors")
    for layer in range(1, LAYERS):
        here, there = reported[layer - 1], reported[layer]
        asked: dict[str, list[torch.Tensor]] = {"router-input": here.s, "drift": [], "quasi": []}
        with torch.no_grad():
            for r, ids, weights in zip(here.r, here.ids, here.weights, strict=True):
                mean = sum(w * vectors[layer - 1, e] for e, w in zip(ids, weights, strict=True))
                asked["drift"].append(there.norm(r))
                asked["quasi"].append(there.norm(r + mean))
            change = made.tensor("residual_vectors")[layer - 1]
            asked["residual"] = [s + change for s in here.s]
            guesses = {name: [there.choose(x) for x in xs] for name, xs in asked.items()}
        for name, guess in guesses.items():
            _check(made, name, layer, guess, there)
        for name in ("router-input", "drift", "quasi"):
            cosines = [
                float(F.cosine_similarity(a, s, 0))
                for a, s in zip(asked[name], there.s, strict=True)
            ]
            expected = sum(cosines) / len(cosines)
            assert made.provenance["cosine"][name][layer] == pytest.approx(expected, abs=1e-4)
    assert made.provenance["recall"]["quasi"][0] is None
    assert "shared" not in made.provenance["recall"]  # this family has none


def test_recall_of_popularity_and_the_last_token(
    made: Profile, learned: list[Layer], reported: list[Layer]
) -> None:
    for layer in range(LAYERS):
        slow, uses = reported[layer], made.tensor("uses")[layer]
        popular = uses.topk(2).indices.tolist()
        _check(made, "popularity", layer, [popular] * len(slow.ids), slow)
        pairs = [i for i in range(len(slow.ids)) if i % HOW.window]
        share = sum(len({*slow.ids[i]} & {*slow.ids[i - 1]}) / 2 for i in pairs) / len(pairs)
        assert made.provenance["recall"]["last-token"][layer] == pytest.approx(share, abs=2e-5)


def _check(made: Profile, name: str, layer: int, guess: list[list[int]], truth: Layer) -> None:
    count, mass = 0.0, 0.0
    for guessed, ids, weights in zip(guess, truth.ids, truth.weights, strict=True):
        count += len({*guessed} & {*ids}) / len(ids)
        mass += sum(w for e, w in zip(ids, weights, strict=True) if e in guessed) / sum(weights)
    facts = made.provenance
    assert facts["recall"][name][layer] == pytest.approx(count / len(guess), abs=0.01)
    assert facts["weighted_recall"][name][layer] == pytest.approx(mass / len(guess), abs=0.01)


def test_a_tally_by_hand() -> None:
    tally = Tally()
    ids, weights = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.75, 0.25], [0.4, 0.1]])
    tally.add(torch.tensor([[1, 5, 6], [3, 2, 0]]), ids, weights)
    assert tally.recall.value == pytest.approx((0.5 + 1) / 2)
    assert tally.weighted.value == pytest.approx((0.25 + 1) / 2)
    assert Tally().recall.value is None


def test_hybrid_is_the_better_of_two_by_text_that_is_not_reported(made: Profile) -> None:
    recall, better = made.provenance["recall"], made.tensor("estimator_better").tolist()
    assert better == made.provenance["estimator_better"] and better[0] == 0
    for layer in range(1, LAYERS):
        one = "estimator" if better[layer] else "quasi"
        assert recall["hybrid"][layer] == recall[one][layer]


# -------------------------------------------------------------------------------- the estimator


def toy(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, layers 1 or 2, and the routers' distributions: one fixed matrix per layer."""
    dice = torch.Generator().manual_seed(11)
    matrices = torch.randn(3, 8, 12, generator=dice)
    dice.manual_seed(seed)
    x = torch.randn(count, 12, generator=dice)
    layer = torch.randint(1, 3, (count,), generator=dice)
    return x, layer, torch.einsum("neh,nh->ne", matrices[layer], x).softmax(-1)


class Toy(Pairs):
    def __init__(self) -> None:
        x, layer, target = toy(12_000, seed=0)
        self.x, self.layer, self.target = [x], [layer], [target.half()]


def test_the_estimator_learns_routers_that_are_functions_of_what_it_is_asked() -> None:
    how = Training(epochs=10, width=24, batch=128, rate=4e-3)
    network, log = train(Toy(), 3, how, 0, lambda done, total: None)
    x, layer, target = toy(500, seed=1)  # not what it learned from
    tally = Tally()
    truth = target.topk(2)
    tally.add(network(x, layer).topk(2).indices, truth.indices, truth.values)
    assert tally.recall.value is not None and tally.recall.value > 0.93
    assert tally.weighted.value is not None and tally.weighted.value > 0.96
    assert log[-1][1] < 0.05 < log[0][1]
    untrained = Estimator(12, 8, 3, 24, 4)
    before = Tally()
    before.add(untrained(x, layer).topk(2).indices, truth.indices, truth.values)
    assert before.recall.value is not None and before.recall.value < 0.5


def test_training_repeats_itself() -> None:
    how = Training(epochs=1, width=8, batch=512)
    state = torch.random.get_rng_state()
    one, again, other = (train(Toy(), 3, how, s, lambda d, t: None)[0] for s in (0, 0, 1))
    assert torch.equal(one.head.weight, again.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(p.requires_grad for p in one.parameters())


def test_divergence_is_nothing_where_nothing_differs() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    assert float(divergence(logits, logits.softmax(-1))) == pytest.approx(0, abs=1e-6)
    certain = torch.tensor([[0.0, 1.0, 0.0]])
    assert float(divergence(logits[1:], certain)) == pytest.approx(1.0986, abs=1e-3)


def test_pairs_are_quasi_hidden_states_and_the_routers_distributions(
    made: Profile, plain: Any, cut: Windows, speaking_model: Path
) -> None:
    window, vectors = cut.learned[0], made.tensor("default_vectors")
    quasi = Quasi(vectors)
    with load(speaking_model, "1GiB", predictor="none", frame="eager") as model, torch.no_grad():
        modules = model.understudy.anatomy.modules
        guest.watch_residuals(model, modules)
        counts, pairs = Counts([EXPERTS] * LAYERS), Pairs(
            quasi, Lookahead(guest.routers(model, modules)), EXPERTS + 1
        )  # fmt: skip
        for watch in (counts, pairs):
            model.understudy.runtime.watch = watch
            model(input_ids=torch.tensor([window]))
            quasi.norms.update(counts.norms)
    x, layer, target = pairs.whole()
    slow, count = slowly(plain, [window]), len(window)
    assert len(x) == len(pairs) == (LAYERS - 1) * count
    for later in range(1, LAYERS):
        mine, here, there = layer == later, slow[later - 1], slow[later]
        with torch.no_grad():
            logits = F.linear(torch.stack(there.s), there.gate.weight)
            mean = torch.stack([
                sum(w * vectors[later - 1, e] for e, w in zip(*row, strict=True))
                for row in zip(here.ids, here.weights, strict=True)
            ])  # fmt: skip
            asked = there.norm(torch.stack(here.r) + mean)
        torch.testing.assert_close(x[mine], asked, rtol=1e-4, atol=1e-4)
        stored = target[mine].float()
        torch.testing.assert_close(stored[:, :-1], logits.softmax(-1), rtol=1e-2, atol=1e-3)
        assert not stored[:, -1].any()  # an expert that this layer does not have


def test_what_is_said_of_the_training(made: Profile) -> None:
    facts, network = made.provenance["estimator"], Estimator.of(made)
    assert facts["tokens"] == 600 and facts["pairs"] == 600 * (LAYERS - 1)
    assert facts["parameters"] == sum(p.numel() for p in network.parameters())
    assert network.down.weight.shape == (facts["width"], 64) == (8, 64)


# ------------------------------------------------------------------------------------------- text


def letters(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_every_fifth_window_is_held_out_and_no_text_comes_twice() -> None:
    # Every token is another: a long line is cut wherever a window begins.
    text = "".join(chr(300 + i) for i in range(20_000))
    found = windows(letters, [Source.of("a", b"", text)], 1000, 10, 0)
    assert [len(p) for p in (found.learned, found.chosen, found.reported)] == [80, 10, 10]
    everything = [t for part in (found.learned, found.chosen, found.reported) for w in part
                  for t in w]  # fmt: skip
    assert len(set(everything)) == len(everything) == 1000
    assert max(everything) > 300 + 19_000 and min(everything) < 1300  # from all over the text
    assert found.tokens() == {"learned": 800, "chosen": 100, "reported": 100}
    assert found == windows(letters, [Source.of("a", b"", text)], 1000, 10, 0)
    assert found != windows(letters, [Source.of("a", b"", text)], 1000, 10, 1)


def test_sources_share_the_tokens_and_what_is_held_out() -> None:
    texts = [Source.of(c, b"", c * 50_000) for c in "abcde"]
    found = windows(letters, texts, 5000, 10, 0)
    held_out = [w for part in (found.chosen, found.reported) for w in part]
    assert len(found.learned) == 400 and len(held_out) == 100
    assert all(sum(w[0] == ord(c) for w in held_out) >= 10 for c in "abcde")


def test_a_small_text_gives_what_it_has_and_too_small_a_one_is_refused() -> None:
    found = windows(letters, [Source.of("a", b"", "x" * 155)], 10_000, 10, 0)
    assert sum(found.tokens().values()) == 150
    with pytest.raises(UnderstudyError, match="9 windows of 10 tokens are too few"):
        windows(letters, [Source.of("a", b"", "x" * 99)], 10_000, 10, 0)


def test_files_of_text(tmp_path: Path) -> None:
    plain, packed, lines = (tmp_path / n for n in ("a.txt", "b.txt.xz", "c.jsonl"))
    plain.write_text("héllo")
    packed.write_bytes(lzma.compress(b"packed"))
    lines.write_text('{"question": "why?", "answer": "so"}\n{"text": "here"}\n')
    assert [read(p).text for p in (plain, packed, lines)] == ["héllo", "packed", "why?\n\nhere"]
    told = read(plain).as_dict()
    assert told["name"] == "a.txt" and told["bytes"] == 6
    import hashlib

    assert hashlib.sha256(plain.read_bytes()).hexdigest().startswith(told["sha256"])


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("a.txt", None, "cannot read"),
        ("a.txt", b"\xff\xfe\x00", "not a text file in UTF-8"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt.xz", b"no xz", "is no xz file"),
        ("a.jsonl", b"{", "no JSON object with one of the fields text, question"),
        ("a.jsonl", b'{"answer": 1}', "no JSON object with one of the fields"),
        ("a.jsonl", b"[1]", "no JSON object with one of the fields"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, name: str, data: bytes | None, complaint: str
) -> None:  # fmt: skip
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UnderstudyError, match=complaint) as error:
        read(tmp_path / name)
    assert name in str(error.value)


# ----------------------------------------------------------------------------------------- refusals


def test_what_is_learned_is_part_of_the_budget(speaking_model: Path) -> None:
    with pytest.raises(
        BudgetTooSmall, match=r"learning about .* needs .* hold what is learned"
    ) as e:
        learn(speaking_model, [source()], HOW, memory="1MiB")
    smallest = e.value.smallest_bytes
    with pytest.raises(BudgetTooSmall):
        learn(speaking_model, [source()], HOW, memory=smallest - 4096)


def test_a_window_longer_than_the_model_was_made_for(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UnderstudyError, match=r"--window 500: .* was made for 256 tokens"):
        learn(tiny(), [source()], Settings(window=500))


def test_the_profile_is_of_this_model_and_runs_in_it(
    made: Profile, tmp_path: Path, speaking_model: Path
) -> None:
    made.save(tmp_path / "p.safetensors")
    facts = made.provenance
    assert facts["tokens"] == {"read": 1200, "learned": 960, "chosen": 120, "reported": 120}
    assert facts["data"][0]["name"] == "manual" and facts["data"][0]["bytes"] == len(TEXT.encode())
    for predictor in ("residual-gate", "quasi-gate", "estimator", "hybrid"):
        options: dict[str, Any] = {"predictor": predictor, "self_switch": False, "slots": 24}
        with Engine(speaking_model, profile=tmp_path / "p.safetensors", **options) as engine:
            engine.start_recording()
            engine.generate("A list", max_new_tokens=6, ignore_eos=True)
            events = engine.stop_recording()
        foreseen = [e for e in events[-LAYERS:] if e.layer + 1 in e.lookahead]
        assert len(foreseen) == LAYERS - 1, predictor


@pytest.fixture(autouse=True)
def _no_watch_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.no_grad` of a slow version must not hide that training asks for gradients."""
    assert torch.is_grad_enabled()
    yield
    assert torch.is_grad_enabled()
