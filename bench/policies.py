"""What do lossy policies cost, and what do they earn? Quality on a small model, speed on its twin.

    python bench/policies.py fine --profile fine.profile.safetensors --data FILE ... [--work DIR]

The twin computes the same function with experts of realistic size (`understudy.widen`), so quality
is scored on the small model and time is taken on the twin, with the same share of experts held.
Tables: ``buddy`` at 75, 50 and 37.5 % of the experts, with its controls; ``speculation`` at 50 %.
What is done is kept in the work folder, and a run that was interrupted goes on. The last line is
JSON; docs/results/ gets it too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from bench import card as cards
from bench import cells as places
from bench import show
from understudy import compare, quality
from understudy.anatomy import fingerprint
from understudy.bench import ON_DEMAND, Policy
from understudy.cli.evaluate import everyone
from understudy.engine import Engine
from understudy.profile import Profile

Row = dict[str, Any]

SHARES = ("75%", "50%", "37.5%")
BUDDIES = ("buddy", "buddy:weight=own", "buddy-similar")
SPECULATION = (
    "understudy", "hint-quasi", "hint-estimator", "paper-on-demand", "paper-hint", "paper",
    "paper-estimator", "speculated", "verified", "estimator+verified",
)  # fmt: skip
# Scored though exact: that its answers are the exact run's is what is shown. What `speculated` says
# is what `paper` says: a cache changes nothing about who runs.
SCORED = ("understudy", "paper", "paper-estimator", "verified", "estimator+verified")


def scored(model: Path, share: str, policies: Sequence[Policy], options: Any) -> list[Row]:
    """Quality of each policy and control, each kept as it is done."""
    exam = quality.Exam(
        model=str(model),
        memory="auto",
        data=tuple(options.data),
        sets=options.sets,
        prompt=64,
        scored=options.tokens,
        problems=options.problems,
        settings=(("slots", share), ("profile", options.profile), ("max_context", 256)),
    )
    wanted = list(chosen(policies, share))
    missing = [one for one in wanted if not _kept(options, "quality", share, one[0].name).exists()]
    if missing:
        with quality.session(exam, show.progress("the exact run")) as opened:
            _keep(options, "quality", share, ON_DEMAND.name, opened.baseline_verdict())
            for policy, held_to, format in missing:
                other = None
                if format is not None:
                    other = str(quality.packed(str(model), format, show.progress))
                rate = None
                if held_to:
                    held = _load(options, "quality", share, held_to) or {}
                    rate = held["substituted"] + held["skipped"]
                verdict = opened.judge(policy, show.progress(policy.name), other, rate)
                _keep(options, "quality", share, policy.name, verdict)
    names = [ON_DEMAND.name, *(p.name for p, _, _ in wanted)]
    return [found for name in names if (found := _load(options, "quality", share, name))]


def chosen(policies: Sequence[Policy], share: str) -> Iterator[tuple[Policy, str, str | None]]:
    """What is scored: those with controls that are readings of the same paper get them once, and
    fewer bits are scored at one share."""
    for policy, held_to, format in everyone(policies, True):
        of = held_to or policy.name
        if format is not None and share != "50%":
            continue
        if (
            of in SCORED
            or (format is None and of in BUDDIES and held_to in ("", "buddy"))
            or (format is not None and "buddy" in [p.name for p in policies])
        ):
            yield policy, held_to, format


def timed(twin: Path, share: str, policies: Sequence[Policy], options: Any) -> list[Row]:
    """Speed of each policy beside `on-demand` on the twin."""
    profile = options.work / "twin.profile.safetensors"
    if not profile.exists():
        twin_profile(options.profile, twin).save(profile)
    contest = compare.Contest(
        str(twin), "auto", options.rounds, 128, 33,
        (("slots", share), ("profile", profile), ("max_context", 256)),
    )  # fmt: skip
    rows = []
    for policy in policies:
        if policy.name in BUDDIES[1:]:
            continue  # they read what `buddy` reads
        kept = _kept(options, "speed", share, policy.name)
        if not kept.exists():
            report = show.progress(f"{share}: {policy.name}")
            speed = compare.time_beside_baseline(contest, policy, report)
            told = {"policy": policy.name, **asdict(speed), "ratio": speed.ratio,
                    "spread": speed.spread}  # fmt: skip
            kept.write_text(json.dumps(told))
        rows.append(json.loads(kept.read_text()))
    return rows


def twin_profile(path: Path, twin: Path) -> Profile:
    """The small model's profile for its twin: what has the width of the residual stream gets the
    zeros that the twin's residual stream has."""
    from safetensors import safe_open
    from torch.nn.functional import pad

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        provenance = json.loads(file.metadata()["provenance"])
    with Engine(twin, slots=2, predictor="none", frame="eager", max_context=64) as engine:
        handle = engine.model.understudy
        hidden = engine.model.config.hidden_size
        provenance["fingerprint"] = fingerprint(handle.anatomy, engine.model)
    provenance["model"] = f"{twin.name}, widened from that of {provenance['model']}"
    for name in ("default_vectors", "residual_vectors", "estimator.down.weight"):
        if name in tensors:
            tensors[name] = pad(tensors[name], (0, hidden - tensors[name].shape[-1]))
    return Profile(tensors, provenance)


def _kept(options: Any, what: str, share: str, name: str) -> Path:
    file = "".join(c if c.isalnum() or c in "-+." else "_" for c in f"{what}-{share}-{name}")
    return options.work / f"{file}.json"  # type: ignore[no-any-return]


def _keep(options: Any, what: str, share: str, name: str, verdict: quality.Verdict) -> None:
    _kept(options, what, share, name).write_text(json.dumps(asdict(verdict)))


def _load(options: Any, what: str, share: str, name: str) -> Row | None:
    path = _kept(options, what, share, name)
    if not path.exists():
        return None
    found: Row = json.loads(path.read_text())
    return found


FIELDS = (
    "policy", "exact", "format", "identical", "tokens", "nll", "delta_nll", "kl", "same_top1",
    "substituted", "skipped", "substituted_mass", "skipped_mass", "bytes", "hit_rate",
)  # fmt: skip


def rows_of(share: str, verdicts: Sequence[Row], speeds: Sequence[Row]) -> Iterator[Row]:
    """One row per policy: quality, its controls, speed."""
    by_name = {v["policy"]: v for v in verdicts}
    fast = {s["policy"]: s for s in speeds}
    for name, v in by_name.items():
        own = {field: v[field] for field in FIELDS}
        own["solved"] = v["solved"].get("all")
        own["beyond"] = {
            control: _beyond(v, other)
            for control, other in by_name.items()
            if control.startswith(f"{name} (")
        }
        yield {"share": share, **own, "speed": fast.get(name)}
    for name in fast:
        if name not in by_name:
            yield {"share": share, "policy": name, "speed": fast[name]}


def _beyond(one: Row, other: Row) -> Row:
    """NLL lost beyond a control, on the same tokens."""
    figure = quality.paired(_verdict(one), _verdict(other))
    return asdict(figure)


def _verdict(row: Row) -> Any:
    """As much of a verdict as the pairing needs."""
    from types import SimpleNamespace

    return SimpleNamespace(pieces=[SimpleNamespace(**piece) for piece in row["pieces"]])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=("fine", "coarse"))
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--tables", default="buddy,speculation")
    parser.add_argument("--parts", default="quality,speed")
    parser.add_argument("--sets", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--problems", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--work", type=Path, default=None)
    options = parser.parse_args()
    options.work = options.work or Path(f"policies-{options.model}")
    options.work.mkdir(parents=True, exist_ok=True)
    small, twin = ROOT / "models" / options.model, places.twin(options.model, show.progress)
    told: dict[str, Any] = {"model": options.model, "card": cards.card({}, "")}
    for table in options.tables.split(","):
        told[table] = []
        for share in SHARES if table == "buddy" else ("50%",):
            names = BUDDIES if table == "buddy" else SPECULATION
            policies = [Policy.parse(name) for name in names]
            verdicts = scored(small, share, policies, options) if "quality" in options.parts else []
            speeds = timed(twin, share, policies, options) if "speed" in options.parts else []
            told[table] += rows_of(share, verdicts, speeds)
    last = json.dumps(told)
    path = ROOT / f"docs/results/{date.today()}-policies-{options.model}.json"
    path.write_text(last + "\n", encoding="utf-8")
    print(last)
    return 0


if __name__ == "__main__":
    sys.exit(main())
