"""The loaded model is transformers' own: generate(), streamers and pipelines work on it.

python examples/with_transformers.py models/fine
"""

import sys

from transformers import AutoTokenizer, TextStreamer

import understudy


def main(model: str, tokens: str = "64") -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    with understudy.load(model, memory="50%", max_context=512) as guest:
        prompts = tokenizer("In the beginning", return_tensors="pt")
        guest.generate(
            **prompts,
            max_new_tokens=int(tokens),
            do_sample=False,
            streamer=TextStreamer(tokenizer),
        )
        print(guest.understudy.counters)


if __name__ == "__main__":
    main(*sys.argv[1:])
