"""Understudy as a model of `lm-eval` (EleutherAI's lm-evaluation-harness), inside its process.

Knows: lm-eval's contract for a model, and the engine. Does not know: tasks, metrics.

Every scored token comes of a decode step: the context but for its last token is read in one
forward, the rest is fed one by one. Scored in one forward, as lm-eval's own `hf` model does, a
policy would never act. One sequence at a time.

lm-eval finds models by a registry that is filled when a module is imported; it looks for no entry
points (0.4.13). So this module must be imported before the name is used:

    python -m understudy.lm_harness run --model understudy --model_args model=DIR,memory=50% ...

is lm-eval's own command line after that import.
"""

# lm-eval and tqdm carry no types, and lm-eval need not be installed.
# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,misc"

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from understudy.anatomy import Options
from understudy.bench import Policy
from understudy.core import UnderstudyError
from understudy.engine import Engine

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as e:
    raise UnderstudyError(
        f"lm-eval is not installed ({e}); install it with: pip install 'understudy[lm-eval]'"
    ) from e

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

log = logging.getLogger(__name__)

_PLACES = (None, "", "cpu", "auto")
_UNBATCHED = (None, 1, "1", "auto")
Coded = tuple[tuple[str, str] | None, list[int], list[int]]  # (texts), context, continuation


@register_model("understudy")
class UnderstudyLM(TemplateLM):
    """``model``: a checkpoint folder or hub id. ``policy``: as in ``understudy bench --policy``.
    ``options``: those of `Options` (memory, max_context, profile, seed, ...)."""

    def __init__(
        self,
        model: str | None = None,
        *,
        pretrained: str | None = None,
        policy: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        source = _source(model, pretrained)
        _refuse(batch_size, device, options)
        if options.get("predictor", "") is None:  # lm-eval takes the word "none" for None
            options["predictor"] = "none"
        chosen = Policy.parse(policy).options() if policy else {}
        self.engine = Engine(source, **{**options, **chosen})
        self.tokenizer = self.engine.tokenizer
        self._policy = policy

    def close(self) -> None:
        """Give the memory back."""
        self.engine.close()

    # ------------------------------------------------------------------------------ what it is

    @property
    def eot_token_id(self) -> int:
        found = self.tokenizer.eos_token_id
        if found is None:
            raise UnderstudyError("this tokenizer has no end-of-text token, which lm-eval needs")
        return int(found)

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows: its beginning, else the end of another."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation together."""
        return self.engine.plan.context

    @property
    def max_gen_toks(self) -> int:
        """Where a task does not say how long an answer may be."""
        return min(256, self.max_length // 2)

    @property
    def tokenizer_name(self) -> str:
        return str(self.engine.checkpoint.path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's result: what ran, and what it changed. lm-eval asks when all is done."""
        handle = self.engine.model.understudy
        counted = handle.counters
        lossy = ("substituted", "skipped", "substituted_mass", "skipped_mass")
        return {
            "understudy_policy": self._policy,
            "understudy_policies": handle.policies,
            "understudy_tokens": counted.tokens,
            "understudy_bytes_read": counted.bytes_read,
            **{f"understudy_{name}": getattr(counted, name) for name in lossy},
        }

    # --------------------------------------------------------------------------------- scoring

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        told = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, **told).input_ids)

    def _loglikelihood_tokens(
        self, requests: Sequence[Coded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for texts, context, continuation in _with_bar(requests, disable_tqdm):
            answer = self._score(context, continuation)
            found.append(answer)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """(log-probability of the continuation, whether it is the greedy one)."""
        if not continuation:
            return 0.0, True
        context = self._fitting(context, len(continuation))
        # A context of one token is read by a forward of one token: a decode step too.
        fed = context[-1:] if len(context) > 1 else []
        made = self.engine.generate(
            context[: len(context) - len(fed)],
            max_new_tokens=len(fed) + len(continuation),
            dictated=[*fed, *continuation],
            ignore_eos=True,
            keep_logits=True,
        )
        assert made.logits is not None
        total, greedy = 0.0, True
        for token, logits in zip(continuation, made.logits[len(fed) :], strict=True):
            total += float(logits.float().log_softmax(-1)[token])
            greedy = greedy and int(logits.argmax()) == token
        return total, greedy

    def _fitting(self, context: list[int], new: int) -> list[int]:
        """The end of ``context`` that leaves room for ``new`` tokens."""
        room = self.max_length - new
        if room < 1:
            raise UnderstudyError(
                f"a task wants {new} tokens after its context, and {self.max_length} fit in all: "
                "raise max_context"
            )
        if len(context) > room:
            log.warning("context cut from %d to its last %d tokens", len(context), room)
        return context[-room:]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Each text from its first token on; longer ones than the context in windows, as lm-eval's
        own model cuts them."""
        found = []
        for request in _with_bar(requests, disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            found.append(sum(self._score(list(a), list(b))[0] for a, b in pairs))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        found = []
        for request in _with_bar(requests, disable_tqdm):
            found.append(self._answer(*request.args))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _answer(self, context: str, asked: dict[str, Any]) -> str:
        told = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        new, until = told.pop("max_gen_toks"), told.pop("until", None) or []
        sampled = bool(told.pop("do_sample", False))
        temperature = float(told.pop("temperature", 1.0 if sampled else 0.0))
        top_p = float(told.pop("top_p", 1.0))
        if told:
            raise UnderstudyError(
                f"generation setting {', '.join(told)} is not supported; leave it out of the task "
                "or of --gen_kwargs"
            )
        ids = self._fitting(self.tok_encode(context), new)
        made = self.engine.generate(
            ids,
            max_new_tokens=new,
            temperature=temperature if sampled else 0.0,
            top_p=top_p,
            stop=[until] if isinstance(until, str) else [s for s in until if s],
        )
        return made.text


def _source(model: str | None, pretrained: str | None) -> str:
    """lm-eval's habit is to call it ``pretrained``."""
    named = [one for one in (model, pretrained) if one]
    if len(named) != 1:
        raise UnderstudyError("name one model: --model_args model=FOLDER")
    return str(named[0])


def _refuse(batch_size: int | str | None, device: str | None, options: dict[str, Any]) -> None:
    """What cannot be done is said, not left out."""
    if batch_size not in _UNBATCHED:
        raise UnderstudyError(f"one sequence at a time: --batch_size 1, not {batch_size}")
    if device not in _PLACES:
        raise UnderstudyError(f"lm-eval on a device was never tried: leave out --device {device}")
    known = [*Options.__dataclass_fields__, "threads"]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UnderstudyError(
            f"no option named {', '.join(unknown)}; known: model, policy, {', '.join(known)}"
        )


def _with_bar(requests: Sequence[Any], silent: bool) -> Iterator[Any]:
    from tqdm import tqdm

    return iter(tqdm(requests, desc="understudy", disable=silent))


def main() -> None:
    """lm-eval's command line, with this model known to it."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UnderstudyError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
