"""The server against its own `/openapi.json`: no 5xx, nothing that the document does not say.

A few cases here; ``UNDERSTUDY_FUZZ_CASES=2000 pytest tests/serve/test_schemathesis.py`` for many,
with ``UNDERSTUDY_FUZZ_SEED`` for others, with ``UNDERSTUDY_FUZZ_URL`` at a server that runs (start
it with ``--no-page``: the page's live stream has no end, and a small ``--max-context``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from serve.conftest import COARSE, Client
from serve.fake_batch import FakeBatch

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis import GenerationMode, checks  # noqa: E402

CASES = int(os.environ.get("UNDERSTUDY_FUZZ_CASES", "60"))
SEED = int(os.environ.get("UNDERSTUDY_FUZZ_SEED", "7"))
# Where a body decides, most cases.
SHARES = {"/v1/chat/completions": 8, "/v1/completions": 6, "/tokenize": 3, "/detokenize": 2}
CHECKS = [
    checks.not_a_server_error,
    checks.load_all_checks() or checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]


def operations(app: Any) -> list[Any]:
    url = os.environ.get("UNDERSTUDY_FUZZ_URL")
    if url:
        document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    else:
        document = schemathesis.openapi.from_asgi("/openapi.json", app)
    return [found.ok() for found in document.get_all_operations()]


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    from understudy.engine import tokenizer_in

    batch = FakeBatch(tokenizer_in(COARSE))
    yield Client(batch).app
    batch.close()


def test_nothing_happens_that_is_not_documented(app: Any) -> None:
    asked = operations(app)
    whole = sum(SHARES.get(operation.path, 1) for operation in asked)
    for operation in asked:
        share = SHARES.get(operation.path, 1)
        fuzz(operation, max(2, CASES * share // whole))


def fuzz(operation: Any, cases: int) -> None:
    """Half of the bodies are as the document wants them, half are not."""
    good, bad = map(operation.as_strategy, (GenerationMode.POSITIVE, GenerationMode.NEGATIVE))
    health = list(HealthCheck)

    @seed(SEED)
    @settings(
        max_examples=cases, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=health,
    )  # fmt: skip
    @given(case=st.one_of(good, bad) if operation.body else good)
    def run(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    run()
