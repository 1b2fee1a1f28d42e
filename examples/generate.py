"""Text from a model with half of it in memory.

python examples/generate.py models/fine "The history of"
"""

import sys

from understudy import Engine


def main(model: str, prompt: str = "The history of", tokens: str = "64") -> None:
    with Engine(model, memory="50%", max_context=512) as engine:
        print(engine.plan.line())
        answer = engine.generate(
            prompt,
            max_new_tokens=int(tokens),
            on_text=lambda text: print(text, end="", flush=True),
        )
    seen = answer.counters
    print(f"\n{1000 * answer.tpot:.1f} ms per token; {seen.hits} hits, {seen.misses} misses")


if __name__ == "__main__":
    main(*sys.argv[1:])
