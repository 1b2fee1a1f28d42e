"""The commands that look without running: ``inspect`` a checkpoint, list the ``families``.

Knows: how facts are laid out. Does not know: how they are found.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from understudy.cli import screen, session
from understudy.cli.options import Json, MaxContext, Model

if TYPE_CHECKING:
    from understudy.engine import Inspection


def inspect(model: Model, *, max_context: MaxContext = None, json: Json = False) -> None:
    """Say what a checkpoint is and what memory it needs."""
    with screen.waiting(f"reading {model}"):
        session.quiet_guests()
        from understudy.engine import inspect as inspect_checkpoint
        from understudy.plan import shown_size, typed_size

        found = inspect_checkpoint(model, max_context=max_context)
    experts = f"{found.experts_per_layer} in each of {found.moe_layers} layers, {found.experts}"
    rows = {
        "family": f"{found.family} ({found.architecture})",
        "layers": f"{found.layers}, {found.moe_layers} of them with experts",
        "experts": f"{experts} in all, top-{found.top_k}",
        "format": _format(found),
        "one expert": shown_size(found.expert_bytes),
        "all experts": shown_size(found.experts * found.expert_bytes),
        "dense": shown_size(found.dense_bytes),
        "checkpoint": shown_size(found.checkpoint_bytes),
        "smallest": f"--memory {typed_size(found.smallest_memory)}",
        "recommended": f"--memory {typed_size(found.recommended_memory)}",
        "": f"for {found.context} tokens of context",
    }
    screen.show(screen.facts(rows), json_too=json)
    if json:
        screen.write_json({"model": model, **asdict(found)})


def _format(found: Inspection) -> str:
    """The weight format, and what it costs."""
    if not found.lossy:
        return found.format
    delta = "unmeasured" if found.delta_nll is None else f"delta NLL {found.delta_nll:+.4f}"
    return f"{found.format} (lossy, {delta})"


def families(*, json: Json = False) -> None:
    """List the model families that work, or why not."""
    with screen.waiting("looking through transformers"):
        session.quiet_guests()
        from understudy.families import support

        known = support()
    if json:
        rows = {n: {"supported": s.supported, "reason": s.reason} for n, s in known.items()}
        screen.write_json({"families": rows})
        return
    table = screen.grid("family", "works")
    table.add_column("why", overflow="fold")
    for name, answer in sorted(known.items(), key=lambda item: (not item[1].supported, item[0])):
        table.add_row(name, "yes" if answer.supported else "no", answer.reason)
    screen.show(table)
    working = sum(answer.supported for answer in known.values())
    screen.say(f"{working} of {len(known)} families work")
