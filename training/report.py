"""Measures a trained reference MoE in plain transformers and writes its card.

Knows what the card says and how each number is measured; a number that was not measured is not
in the card. Does not know how the weights came about, save for the facts that training left in
`training.json` beside them.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from training import data
from understudy import tasks

ROWS = 16  # windows scored at a time
RESAMPLES = 10_000
Floats = NDArray[np.float64]


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion."""
    z = 1.96
    share, square = right / count, z * z / count
    middle = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return middle - half, middle + half


def bootstrap(differences: Floats, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of paired differences, windows drawn again and again."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.quantile(differences[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


class Judge:
    """A model under measurement."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.work = work
        gates = [module for name, module in self.model.named_modules() if name.endswith(".gate")]
        self.gates: list[Any] = gates
        self.top_k: int = self.model.config.num_experts_per_tok

    @contextmanager
    def top(self, k: int) -> Iterator[None]:
        """Inside, every layer runs `k` experts per token."""
        try:
            for gate in self.gates:
                gate.top_k = k
            yield
        finally:
            for gate in self.gates:
                gate.top_k = self.top_k

    # --- likelihood ------------------------------------------------------------------------

    def windows(self, domain: str, count: int, length: int) -> tuple[Tensor, Tensor]:
        """(held-out windows, weight of each predicted token), spread evenly over the domain."""
        tokens = np.fromfile(self.work / f"{domain}.held.u16", dtype=np.uint16)
        answers = self.work / f"{domain}.held.answers.u8"
        weight = np.ones(len(tokens), dtype=np.uint8)
        if answers.exists():
            weight = np.fromfile(answers, dtype=np.uint8)
        count = min(count, len(tokens) // (length + 1))
        begins = np.linspace(0, len(tokens) - length - 1, count).astype(int)
        rows = np.stack([tokens[begin : begin + length + 1] for begin in begins])
        weights = np.stack([weight[begin + 1 : begin + length + 1] for begin in begins])
        return torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(weights).float()

    @torch.inference_mode()
    def score(self, rows: Tensor, weights: Tensor) -> tuple[Floats, list[Tensor]]:
        """(mean loss of every window, router logits of every layer for all its tokens)."""
        losses, routers = [], []
        parts = zip(torch.split(rows, ROWS), torch.split(weights, ROWS), strict=True)
        for part, weight in parts:
            out = self.model(part[:, :-1], output_router_logits=True)
            chances = out.logits.float().log_softmax(-1)
            loss = -chances.gather(-1, part[:, 1:, None])[..., 0]
            losses.append((loss * weight).sum(1) / weight.sum(1))
            routers.append(out.router_logits)
        return torch.cat(losses).double().numpy(), [
            torch.cat(layer).float() for layer in zip(*routers, strict=True)
        ]

    # --- tasks -----------------------------------------------------------------------------

    @torch.inference_mode()
    def exact(self, problems: list[tasks.Problem]) -> int:
        """How many problems are answered exactly, greedily, from the bare question."""

        def size(one: tuple[list[int], tasks.Problem]) -> int:
            return len(one[0])

        right = 0
        coded = [(self.tokenizer(tasks.ask(one.prompt)).input_ids, one) for one in problems]
        # Prompts of one length together: no padding that could disturb anything.
        for length, group in groupby(sorted(coded, key=size), size):
            members = list(group)
            longest = max(len(self.tokenizer(one.answer).input_ids) for _, one in members)
            prompts = torch.tensor([ids for ids, _ in members])
            out = self.model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=longest + 3,
                do_sample=False,
            )
            texts = self.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
            right += sum(
                text.strip() == one.answer for text, (_, one) in zip(texts, members, strict=True)
            )
        return right


# --- measurements ----------------------------------------------------------------------------


def likelihood(judge: Judge, count: int, length: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Held-out loss per domain, with all experts and with one; and all router logits."""
    found: dict[str, Any] = {}
    routers: list[list[Tensor]] = []
    every: list[Floats] = []
    for domain in data.DOMAINS:
        rows, weights = judge.windows(domain, count, length)
        full, logits = judge.score(rows, weights)
        with judge.top(1):
            single, _ = judge.score(rows, weights)
        routers.append(logits)
        every.append(single - full)
        found[domain] = {
            "tokens": int(weights.sum()),
            "nll": float(full.mean()),
            "nll_top1": float(single.mean()),
            "top1_costs": bootstrap(single - full),
        }
    pooled = np.concatenate(every)
    found["all"] = {"top1_costs_mean": float(pooled.mean()), "top1_costs": bootstrap(pooled)}
    return found, [torch.cat(layer) for layer in zip(*routers, strict=True)]


def routing(logits: list[Tensor], top_k: int) -> list[dict[str, float]]:
    """Per layer: how evenly experts are used, and how sure the router is of one token."""
    layers = []
    for layer in logits:
        chances = layer.softmax(-1)
        experts = layer.shape[-1]
        used = torch.bincount(chances.topk(top_k).indices.flatten(), minlength=experts)
        share = used / used.sum()
        entropy = -(chances * chances.clamp_min(1e-30).log2()).sum(-1)
        layers.append(
            {
                "experts_above_1_percent": float((share > 0.01).float().mean()),
                "least_share": float(share.min()),
                "largest_share": float(share.max()),
                "token_entropy_bits": float(entropy.mean()),
                "chosen_mass": float(chances.topk(top_k).values.sum(-1).mean()),
            }
        )
    return layers


def exact_match(judge: Judge, count: int) -> list[dict[str, Any]]:
    """Every task and level on held-out problems; no row where none is held out."""
    rows = []
    for task, levels in tasks.LEVELS.items():
        for level in levels + tasks.LONGER.get(task, ()):
            problems = tasks.held_problems(task, level, count)
            if problems:
                row = {"task": task, "level": level, "trained": level in levels}
                row |= {"problems": len(problems), "right": judge.exact(problems)}
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def logged_speed(log: Path | None) -> float | None:
    """The tokens per second that a tenth of the training log's lines reach or exceed."""
    if log is None:
        return None
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if '"speed"' in line]
    return float(np.quantile([json.loads(line)["speed"] for line in lines], 0.9))


def measure(folder: Path, work: Path, windows: int, problems: int) -> dict[str, Any]:
    """Everything the card needs about the model, as plain values."""
    judge = Judge(folder, work)
    config = judge.model.config
    losses, logits = likelihood(judge, windows, length=256)
    print(json.dumps(losses), flush=True)
    return {
        "family": config.model_type,
        "layers": config.num_hidden_layers,
        "experts": config.num_local_experts,
        "top_k": judge.top_k,
        "parameters": sum(one.numel() for one in judge.model.parameters()),
        "file_bytes": sum(one.stat().st_size for one in folder.glob("*.safetensors")),
        "likelihood": losses,
        "routing": routing(logits, judge.top_k),
        "routed_tokens": len(logits[0]),
        "exact_match": exact_match(judge, problems),
    }


# --- the card --------------------------------------------------------------------------------

SOURCES = {
    "wikipedia": "short Wikipedia articles (CC-BY-SA-3.0)",
    "novels": "English novels 1840-1920, ELTeC (public domain)",
    "peps": "Python Enhancement Proposals (public domain or CC0)",
    "python": "the Python standard library's source, without tests (PSF licence)",
    "maths": "GSM8K train, question and worked answer (MIT)",
    "tasks": "problems generated by `src/understudy/tasks.py`",
}

UNITS = {
    "add": "digits",
    "largest": "numbers",
    "reverse": "letters",
    "sort": "letters",
    "count": "letters",
    "recall": "pairs",
    "close": "brackets",
}


def _speed(found: dict[str, Any], facts: dict[str, Any]) -> str:
    speed = f"{facts['tokens'] / facts['seconds']:,.0f} tokens/s"
    if found["fast_speed"] is None:
        return speed
    return f"{speed} beside other work; {found['fast_speed']:,.0f} in the fastest tenth of the log"


def _domains(found: dict[str, Any], facts: dict[str, Any]) -> Iterator[str]:
    top = found["top_k"]
    yield f"| domain | share of windows | held-out NLL, top-{top} | top-1 | top-1 costs (95 % CI) |"
    yield "|---|---|---|---|---|"
    for domain, source in SOURCES.items():
        row = found["likelihood"][domain]
        low, high = row["top1_costs"]
        share = facts["mix"][domain]
        yield (
            f"| {source} | {share:.0%} | {row['nll']:.3f} | {row['nll_top1']:.3f} "
            f"| {row['nll_top1'] - row['nll']:+.3f} ({low:.3f} to {high:.3f}) |"
        )


def _tasks(found: dict[str, Any]) -> Iterator[str]:
    yield "| task | level | exact match (95 % CI) | held-out problems |"
    yield "|---|---|---|---|"
    for row in found["exact_match"]:
        low, high = wilson(row["right"], row["problems"])
        share = row["right"] / row["problems"]
        beyond = "" if row["trained"] else ", longer than in training"
        yield (
            f"| {row['task']} | {row['level']} {UNITS[row['task']]}{beyond} "
            f"| {share:.0%} ({low:.0%} to {high:.0%}) | {row['problems']} |"
        )


def _layers(found: dict[str, Any]) -> Iterator[str]:
    yield (
        "| layer | experts above 1 % | least used | most used | router entropy, bits "
        f"| probability of the chosen {found['top_k']} |"
    )
    yield "|---|---|---|---|---|---|"
    for number, row in enumerate(found["routing"]):
        yield (
            f"| {number} | {row['experts_above_1_percent']:.0%} | {row['least_share']:.2%} "
            f"| {row['largest_share']:.2%} | {row['token_entropy_bits']:.2f} "
            f"| {row['chosen_mass']:.2f} |"
        )


def middle_tasks(found: dict[str, Any]) -> list[str]:
    """Tasks with a level between 30 and 95 %: those on which damage can be seen."""
    names = [
        row["task"]
        for row in found["exact_match"]
        if row["problems"] >= 50 and 0.30 <= row["right"] / row["problems"] <= 0.95
    ]
    return list(dict.fromkeys(names))


def card(name: str, found: dict[str, Any], facts: dict[str, Any]) -> str:
    """The README of a model folder."""
    recipe = facts["recipe"]
    low, high = found["likelihood"]["all"]["top1_costs"]
    middle = middle_tasks(found)
    lines = [
        f"# {name}: a small trained {found['family']} MoE",
        "",
        f"{found['layers']} layers, {found['experts']} experts per layer, top-{found['top_k']}, "
        f"{found['parameters'] / 1e6:.1f} M parameters, {found['file_bytes'] / 2**20:.1f} MiB of "
        "bf16 safetensors; loads in plain transformers. Own byte-level BPE of 4,096 pieces, every "
        "digit one piece; `<|end|>` (id 0) begins, ends and pads. The chat template writes plain "
        "`Question: ...` and `Answer:` lines.",
        "",
        "A test subject for routing and for quality under lossy policies, not a language model to "
        "talk to: it writes grammatical text without sense, and answers the generated problems.",
        "",
        f"Trained from scratch on {facts['tokens'] / 1e6:.1f} M tokens ({facts['steps']:,} steps "
        f"of {recipe['rows']} x 256) in {facts['seconds'] / 60:.0f} minutes on "
        f"{found['cores']} CPU cores ({_speed(found, facts)}; threads at the end: "
        f"{facts['threads']}). "
        f"AdamW, peak rate {recipe['rate']:g}, cosine over time; bf16 weights with fp32 masters; "
        f"balance loss {recipe['balance']:g} x aux/k, counted in each layer by itself. Of a "
        "generated problem only the answer counts, with weight "
        f"{recipe['answer_weight']:g}. How to train it again: `training/README.md`.",
        "",
        "## Held-out loss",
        "",
        "Nats per token; 2 % of every domain's documents held out, evenly spread windows of 256 "
        "tokens; for problems the answer's tokens only. Top-1: the same weights with one expert "
        "per token.",
        "",
        *_domains(found, facts),
        "",
        f"Over all windows top-1 costs {found['likelihood']['all']['top1_costs_mean']:.3f} nats "
        f"per token (95 % CI {low:.3f} to {high:.3f}, paired bootstrap over windows).",
        "",
        "## Exact match",
        "",
        "Greedy, bf16, the bare question as prompt; no problem here was in training. Tasks with a "
        f"level of at least 50 problems between 30 and 95 %: {', '.join(middle) or 'none'}. The "
        "levels longer than in training were chosen on a checkpoint of `fine` shortly before "
        "its end, to have problems on which damage shows.",
        "",
        *_tasks(found),
        "",
        "## Routing",
        "",
        f"Over {found['routed_tokens']:,} held-out tokens, the domains in equal parts. "
        f"{found['experts']} evenly used experts would have {1 / found['experts']:.2%} each and "
        f"an undecided router {math.log2(found['experts']):.0f} bits.",
        "",
        *_layers(found),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line: measure and write the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the model, where the card is written")
    parser.add_argument("--work", type=Path, required=True, help="the work folder of training")
    parser.add_argument("--windows", type=int, default=64, help="per domain")
    parser.add_argument("--problems", type=int, default=200, help="per task and level")
    parser.add_argument("--log", type=Path, help="what training printed, for its speed")
    parser.add_argument("--again", action="store_true", help="write the card, measure nothing")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder: Path = arguments.folder
    stored = folder / "evaluation.json"
    if not arguments.again:
        found = measure(folder, arguments.work / "tokens", arguments.windows, arguments.problems)
        found |= {"cores": os.cpu_count(), "fast_speed": logged_speed(arguments.log)}
        stored.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    found = json.loads(stored.read_text(encoding="utf-8"))
    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(card(facts["name"], found, facts), encoding="utf-8")


if __name__ == "__main__":
    main()
