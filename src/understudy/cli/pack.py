"""The command ``pack``: a checkpoint written once more, with its experts in fewer bits.

Knows: what a person is told while it runs and when it ends. Does not know: how it is done.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from understudy.cli import screen, session
from understudy.cli.options import Json, Model, option
from understudy.core import UnderstudyError

if TYPE_CHECKING:
    from understudy.packing import Outcome

Format = Annotated[
    str | None, option("--format", help="int8 or int4; both are lossy.", metavar="NAME")
]
Out = Annotated[
    Path | None,
    option("--out", "-o", help="The new folder; default: MODEL-FORMAT.", metavar="FOLDER"),
]
Measured = Annotated[bool, option("--eval/--no-eval", help="Measure afterwards what it cost.")]
Text = Annotated[
    Path | None,
    option("--text", help="Measure on this text; default: Python's own manual.", metavar="FILE"),
]
Memory = Annotated[
    str, option("--memory", help="For each of the two models that are compared.", metavar="SIZE")
]
Verify = Annotated[bool, option("--verify", help="MODEL is a packed folder: check its checksums.")]


def pack(
    model: Model,
    *,
    format: Format = None,
    out: Out = None,
    evaluate: Measured = True,
    text: Text = None,
    memory: Memory = "auto",
    verify: Verify = False,
    json: Json = False,
) -> None:
    """Write a checkpoint once more, its experts in fewer bits (lossy), and say what it cost."""
    if verify:
        _verify(model, json)
        return
    if format is None:
        raise UnderstudyError("say how many bits: --format int8 or --format int4")
    with screen.waiting("loading"):
        session.quiet_guests()
        from understudy.packing import pack as write
    sample = (_read(text) if text else _real_text()) if evaluate else None
    try:
        with screen.progress() as bar:
            outcome = write(model, format, out, text=sample, memory=memory, bar=bar)
    except KeyboardInterrupt:
        screen.say("interrupted; the same command goes on where it stopped")
        raise
    for line in _report(outcome, format):
        (screen.say if json else screen.tell)(line)
    if json:
        screen.write_json(_as_result(model, format, outcome))


def _real_text() -> str:
    from understudy.texts import python_docs

    return python_docs()


def _read(file: Path) -> str:
    from understudy.cli.talk import read_file

    return read_file(file)


def _report(outcome: Outcome, format: str) -> list[str]:
    from understudy.plan import shown_size

    before, now = outcome.expert_bytes_before, outcome.expert_bytes
    lines = [f"{outcome.path}: experts {shown_size(before)} -> {shown_size(now)}"]
    q = outcome.quality
    if q is None:
        return [*lines, f"{format} is LOSSY: what it costs was not measured"]
    return [
        *lines,
        f"{format} is LOSSY: on {q.tokens} tokens NLL {q.nll_exact:.4f} -> {q.nll:.4f}, "
        f"delta {q.delta_nll:+.4f} (95 %: {q.delta_low:+.4f} to {q.delta_high:+.4f}), "
        f"KL {q.kl:.4f}, same first choice {100 * q.same_top1:.1f} %",
    ]


def _as_result(model: str, format: str, outcome: Outcome) -> dict[str, Any]:
    return {
        "model": model,
        "packed": str(outcome.path),
        "format": format,
        "lossy": True,
        "expert_bytes": outcome.expert_bytes,
        "expert_bytes_before": outcome.expert_bytes_before,
        "quality": asdict(outcome.quality) if outcome.quality else None,
    }


def _verify(folder: str, json: bool) -> None:
    from understudy.packing import verify

    with screen.waiting(f"reading {folder}"):
        session.quiet_guests()
    with screen.progress() as bar:
        checked = verify(folder, bar("checking"))
    line = f"{folder}: {checked} experts and the dense weights are what was packed"
    (screen.say if json else screen.tell)(line)
    if json:
        screen.write_json({"model": folder, "verified": True, "experts": checked})
