"""Takes documentation apart: pages, fenced blocks, links, headings, command lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *([README] if README.is_file() else [])]

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)[^)]*\)|<(?:img|a)\b[^>]*?(?:src|href)=\"([^\"]+)\"")
_INLINE = re.compile(r"`([^`\n]+)`")
_ENDS = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>"}


class Block(NamedTuple):
    """A fenced block. ``line``: of its first line of content, counted from 1."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of ``page`` in these languages, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        if match[2] in languages:
            line = text.count("\n", 0, match.start(3)) + 1
            found.append(Block(page, line, match[2], match[3]))
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """Targets that are not on the web."""
    targets = [m[1] or m[2] for m in _LINK.finditer(prose(page))]
    return [t for t in targets if not re.match(r"[a-z]+:", t)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of ``page``."""
    found = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in found}


def headings(page: Path, level: int) -> list[str]:
    return re.findall(rf"^{'#' * level} +(.+?) *$", prose(page), re.MULTILINE)


def inline_code(page: Path) -> list[str]:
    return [m[1] for m in _INLINE.finditer(prose(page))]


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(place, words) of every simple command in the shell blocks of ``page``. In a ``console``
    block commands begin with ``$``; the rest is what they printed."""
    for block in blocks(page, "console", "sh", "bash", "shell"):
        for number, line in enumerate(block.text.replace("\\\n", " ").splitlines()):
            if block.language == "console":
                if not line.startswith("$ "):
                    continue
                line = line[2:]
            for words in _simple(line):
                yield f"{page.name}:{block.line + number}", words


def _simple(line: str) -> Iterator[list[str]]:
    """The words of each simple command of a line, without variables set in front of it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = "#"
    command: list[str] = []
    for word in [*lexer, ";"]:
        if word not in _ENDS:
            command.append(word)
            continue
        while command and re.fullmatch(r"\w+=.*", command[0]):
            del command[0]
        if command:
            yield [Path(command[0]).name, *command[1:]]
        command = []
