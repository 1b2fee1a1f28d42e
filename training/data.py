"""From raw text to token files: six domains, 2 % of each held out.

Knows where each domain's documents lie under the data folder, how they are split, and the form
of the token files (uint16, documents separated by id 0). Does not know models or training. The
token files live in a work folder outside the repository and are made once.
"""

import argparse
import itertools
import json
import lzma
import random
import re
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from training import tokenizer
from understudy import tasks

HELD_OUT = 0.02
PROBLEMS = 320_000
TOKENIZER_CHARACTERS = 5_000_000
DOMAINS = ("wikipedia", "novels", "peps", "python", "maths", "tasks")

MIX = {
    "wikipedia": 0.32,
    "novels": 0.20,
    "peps": 0.11,
    "python": 0.14,
    "maths": 0.08,
    "tasks": 0.15,
}
"""The share of training windows drawn from each domain."""

# Windows of these begin with a document: at test time too, a question stands at the beginning.
ALIGNED = ("maths", "tasks")

Tokens = npt.NDArray[np.uint16]


def _titled(path: Path) -> list[str]:
    """Documents of a file in which each begins with a `= Title =` line."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        text = file.read()
    starts = [match.start() for match in re.finditer(r"^= .+ =$", text, re.MULTILINE)]
    return [text[a:b].strip() for a, b in itertools.pairwise([*starts, len(text)])]


def _peps(path: Path) -> list[str]:
    documents = []
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda one: one.name):
            file = archive.extractfile(member) if member.name.startswith("pep-") else None
            if file is not None:
                documents.append(file.read().decode("utf-8", errors="replace"))
    return documents


def _standard_library() -> list[str]:
    """This Python's own modules, without its tests (long tables of data) and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    files = (path for path in sorted(root.rglob("*.py")) if not skipped & set(path.parts))
    return [path.read_text(encoding="utf-8", errors="replace") for path in files]


def _maths(path: Path) -> list[str]:
    """School problems as question and answer, without the `<<48/2=24>>` calculator notes."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    answers = [re.sub(r"<<.*?>>", "", line["answer"]) for line in lines]
    return [
        f"{tasks.ask(line['question'])} {answer}"
        for line, answer in zip(lines, answers, strict=True)
    ]


def read_documents(data: Path) -> dict[str, list[str]]:
    """Every domain's documents, save the problems, which are generated."""
    return {
        "wikipedia": _titled(data / "text/wikipedia-en.txt.xz"),
        "novels": _titled(data / "text/eltec-eng.txt.xz"),
        "peps": _peps(data / "text/peps.tar.xz"),
        "python": _standard_library(),
        "maths": _maths(data / "eval/gsm8k/train.jsonl"),
    }


def split(documents: list[str], seed: int = 0) -> tuple[list[str], list[str]]:
    """(training, held out): whole documents, shuffled, until 2 % of the characters are held out."""
    shuffled = random.Random(seed).sample(documents, len(documents))
    wanted = HELD_OUT * sum(map(len, documents))
    sizes = itertools.accumulate(map(len, shuffled))
    cut = next(index for index, size in enumerate(sizes, 1) if size >= wanted)
    return shuffled[cut:], shuffled[:cut]


def _encode(coder: Tokenizer, documents: list[str]) -> Tokens:
    """Token ids, each document followed by the end id 0, in batches that keep memory small."""
    parts: list[int] = []
    arrays = []
    for start in range(0, len(documents), 512):
        for encoding in coder.encode_batch_fast(documents[start : start + 512]):
            parts += encoding.ids
            parts.append(0)
        arrays.append(np.array(parts, dtype=np.uint16))
        parts.clear()
    return np.concatenate(arrays)


def _tokenizer_sample(documents: dict[str, list[str]]) -> Iterator[str]:
    """About the same amount of every domain, held-out documents already taken away."""
    for texts in documents.values():
        room = TOKENIZER_CHARACTERS
        for text in texts:
            yield text[:room]
            room -= len(text)
            if room <= 0:
                break


def _written(problem: tasks.Problem) -> str:
    return f"{tasks.ask(problem.prompt)} {problem.answer}"


def _answer_mask(coder: Tokenizer, tokens: Tokens) -> npt.NDArray[np.uint8]:
    """1 where a token belongs to an answer (its end included): after `Answer:`, up to id 0."""
    marker = coder.encode("\nAnswer:").ids
    hits = np.ones(len(tokens), dtype=bool)
    for offset, piece in enumerate(reversed(marker), 1):
        hits[offset:] &= tokens[:-offset] == piece
        hits[:offset] = False
    begins = hits.astype(np.int64).cumsum()
    ends = np.concatenate([[0], (tokens == 0)[:-1].astype(np.int64).cumsum()])
    return (begins > ends).astype(np.uint8)


def _problems(held: bool) -> list[str]:
    count = round(PROBLEMS * HELD_OUT) if held else PROBLEMS
    return [_written(one) for one in itertools.islice(tasks.problems(seed=1, held=held), count)]


def prepare(data: Path, work: Path) -> None:
    """Make every token file and the tokenizer under `work`; the last file written marks the end."""
    if (work / "ready").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    sides = {name: split(texts) for name, texts in read_documents(data).items()}
    sides["tasks"] = (_problems(held=False), _problems(held=True))
    coder = tokenizer.train(_tokenizer_sample({name: one[0] for name, one in sides.items()}))
    coder.save(str(work / "tokenizer.json"))
    for domain, (training, held) in sides.items():
        for side, texts in (("train", training), ("held", held)):
            tokens = _encode(coder, texts)
            tokens.tofile(work / f"{domain}.{side}.u16")
            if domain == "tasks":
                _answer_mask(coder, tokens).tofile(work / f"{domain}.{side}.answers.u8")
    (work / "ready").touch()


def main() -> None:
    """Command line: make the token files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    prepare(arguments.data, arguments.work)
    for file in sorted(arguments.work.glob("*.u16")):
        print(f"{file.name:24} {file.stat().st_size // 2:>12,} tokens")


if __name__ == "__main__":
    main()
