"""One contestant in its own process: loads a model, then answers rounds.

Knows: how each engine loads, runs a prompt and counts. Does not know: cells, limits, who else runs.

    python -m bench.worker KIND '{"model": ..., "memory": ...}'
    <- {"ids": [...], "new": 48, "seconds": 20}       one round; greedy, no end-of-text
    -> {"ttft": s, "times": [s, ...], "tokens": [...], "read": bytes, ...}

``times``: of every token since the request. ``seconds`` ends a round of a peer early, after
`FEWEST` tokens.
``read``: bytes read from disk after the first token (ours: as counted; others: /proc/self/io).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

FEWEST = 3
Round = Callable[[list[int], int, float], dict[str, Any]]


def read_bytes() -> int:
    """What this process has had read from disk."""
    fields = Path("/proc/self/io").read_text().split()
    return int(fields[fields.index("read_bytes:") + 1])


def understudy(settings: dict[str, Any]) -> tuple[dict[str, Any], Round]:
    import torch

    from bench.packs import packed
    from understudy import Engine
    from understudy.bench import clairvoyant_bytes
    from understudy.core import Phase

    model, memory = settings.pop("model"), settings.pop("memory")
    if pack := settings.pop("pack", None):
        model = str(packed(Path(model), pack))
    engine = Engine(model, memory=memory or "1000%", **settings)
    plan = engine.plan

    def run(ids: list[int], new: int, seconds: float) -> dict[str, Any]:
        engine.start_recording()
        answer = engine.generate(ids, max_new_tokens=new, ignore_eos=True)
        events, c = engine.stop_recording(), answer.decode_counters
        return {
            "ttft": answer.ttft, "times": answer.token_times, "tokens": answer.tokens,
            "read": c.bytes_read, "hits": c.hits, "late": c.late, "misses": c.misses,
            "wasted": c.wasted_bytes, "stall": c.stall_seconds,
            "prefill_read": (answer.counters - c).bytes_read,
            "issued": c.prefetch_issued, "used": c.prefetch_used,
            "belady": clairvoyant_bytes(events, plan, Phase.DECODE),
            "touched": len({(e.layer, x) for e in events if e.phase is Phase.PREFILL
                            for row in e.ids for x in row}) * plan.expert_bytes,
            "memory": plan.dense * (len(answer.tokens) - 1) + c.lookups * plan.expert_bytes,
            "expert_seconds": c.expert_seconds,
        }  # fmt: skip

    card = {"plan": plan.as_dict(), "policies": engine.model.understudy.policies,
            "version": torch.__version__}  # fmt: skip
    return card, run


def llama(settings: dict[str, Any]) -> tuple[dict[str, Any], Round]:
    import os

    import llama_cpp

    from bench.peers.gguf_file import gguf_of

    file = gguf_of(Path(settings["model"]), settings["gguf"])
    threads = len(os.sched_getaffinity(0))
    engine = llama_cpp.Llama(
        str(file), n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads,
        use_mmap=True, use_mlock=False, verbose=False,
    )  # fmt: skip

    def run(ids: list[int], new: int, seconds: float) -> dict[str, Any]:
        engine.reset()
        started = time.perf_counter()
        tokens: list[int] = []
        times: list[float] = []
        read = 0
        for token in engine.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0, reset=True):
            tokens.append(token)
            times.append(time.perf_counter() - started)
            if len(tokens) == 1:
                read = read_bytes()
            if len(tokens) == new or (len(tokens) >= FEWEST and times[-1] > seconds + times[0]):
                break
        return {"ttft": times[0], "times": times, "tokens": tokens, "read": read_bytes() - read}

    return {"version": llama_cpp.__version__, "file": file.name}, run


def _plain(settings: dict[str, Any], **where: Any) -> tuple[dict[str, Any], Round]:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, StoppingCriteria

    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16, **where)

    class Clock(StoppingCriteria):
        """Notes the time of every token, and stops when the time is over."""

        def __init__(self, seconds: float) -> None:
            self.started, self.seconds = time.perf_counter(), seconds
            self.times: list[float] = []
            self.read = 0

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            self.times.append(time.perf_counter() - self.started)
            if len(self.times) == 1:
                self.read = read_bytes()
            late = len(self.times) >= FEWEST and self.times[-1] > self.seconds + self.times[0]
            return torch.full((len(input_ids),), late)

    def run(ids: list[int], new: int, seconds: float) -> dict[str, Any]:
        clock, batch = Clock(seconds), torch.tensor([ids])
        with torch.inference_mode():
            out = model.generate(
                batch, attention_mask=torch.ones_like(batch), max_new_tokens=new, do_sample=False,
                eos_token_id=None, pad_token_id=0, stopping_criteria=[clock],
            )  # fmt: skip
        tokens = out[0, len(ids) :].tolist()
        return {"ttft": clock.times[0], "times": clock.times, "tokens": tokens,
                "read": read_bytes() - clock.read}  # fmt: skip

    return {"version": transformers.__version__}, run


def transformers(settings: dict[str, Any]) -> tuple[dict[str, Any], Round]:
    return _plain(settings)


def accelerate(settings: dict[str, Any]) -> tuple[dict[str, Any], Round]:
    import tempfile

    import accelerate

    # What its own planner keeps in the memory that the cell allows; the rest goes to disk.
    folder = tempfile.mkdtemp(prefix="offload-", dir=Path(settings["model"]).parent)
    card, run = _plain(settings, device_map="auto", offload_folder=folder,
                       max_memory={"cpu": settings["memory"]})  # fmt: skip
    return card | {"accelerate": accelerate.__version__, "folder": folder}, run


LOADERS = {"understudy": understudy, "llama": llama, "transformers": transformers,
           "accelerate": accelerate}  # fmt: skip


def say(answer: dict[str, Any]) -> None:
    print(json.dumps({"understudy-bench": answer}), flush=True)


def main() -> None:
    kind, settings = sys.argv[1], json.loads(sys.argv[2])
    try:
        card, run = LOADERS[kind](settings)
        say(card)
        for line in sys.stdin:
            request = json.loads(line)
            say(run(request["ids"], request["new"], request["seconds"]))
    except ImportError as e:
        say({"error": f"not installed: {e.name} (make bench-peers)"})
    except Exception as e:
        say({"error": f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"})
    finally:
        with suppress(NameError):
            if folder := card.get("folder"):
                import shutil

                shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
