"""Which tokens form the next step: the `BatchScheduler` of the house.

Knows: rows, how many tokens a step may have, whether there is room for their keys and values. Does
not know: what is sampled, who asked, bytes.

    answering rows first, one token each  -> prompts that were begun -> waiting rows, in order

A row that finds no room pushes out the youngest one, which starts over later with what it has
answered so far as part of its prompt. The oldest is never pushed out, and every row fits alone, so
something always moves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from understudy.batch import Chunk, Row, Seats

HEADROOM = 16  # tokens that each answering row should find free when another one comes in


@dataclass(eq=False, slots=True)
class Entry:
    """A row and what the scheduler must know of it. ``answers``: a token will be sampled once all
    known tokens are done; ``every``: somebody wants logits of all of them."""

    row: Row
    answers: bool = True
    every: bool = False

    @property
    def left(self) -> int:
        return len(self.row.tokens) - self.row.done


@dataclass(slots=True)
class _Step:
    """What a step may still have: ``tokens``, and so many with logits at ``every`` position."""

    tokens: int
    every: int
    whole: bool = True  # one prompt that cannot be cut may exceed ``tokens``

    def share(self, entry: Entry, whole_prompts: bool) -> int:
        """Tokens of ``entry`` that may come in; 0: not in this step."""
        left = entry.left
        scored = self.every if entry.every else left
        if whole_prompts and left > 1:
            fits = left <= self.tokens or (self.whole and self.tokens > 0)
            return left if fits and left <= scored else 0
        return min(left, self.tokens, scored)

    def take(self, entry: Entry, count: int) -> Chunk:
        self.whole = self.whole and count == 1
        self.tokens = max(0, self.tokens - count)
        if entry.every:
            self.every = max(0, self.every - count)
            return Chunk(entry.row, count, "all")
        last = entry.answers and count == entry.left
        return Chunk(entry.row, count, "last" if last else "none")


class Scheduler:
    """First come, first served. Single-threaded, like its `Seats`."""

    def __init__(
        self,
        seats: Seats,
        *,
        max_rows: int,
        max_tokens: int,
        max_every: int,
    ) -> None:
        """``max_rows``, ``max_tokens``: of a step, ``max_every`` of these with logits at each."""
        self.seats = seats
        self._max_rows, self._max_tokens = max_rows, max_tokens
        self.max_every = max_every
        self.waiting: deque[Entry] = deque()
        self.running: list[Entry] = []  # in the order they came in
        self.preemptions = self.prefix_queries = self.prefix_hits = 0

    def add(self, entry: Entry) -> None:
        self.waiting.append(entry)

    def remove(self, entry: Entry) -> None:
        """It is over, or nobody wants it any more."""
        if entry in self.running:
            self.running.remove(entry)
        elif entry in self.waiting:
            self.waiting.remove(entry)
        self.seats.release(entry.row)

    def next(self) -> list[Chunk]:
        """The next step, room reserved for all of it; empty: nobody is there, or who waits finds
        no room although nobody runs."""
        chunks: list[Chunk] = []
        step = _Step(self._max_tokens, self.max_every)
        for entry in self._in_turn():
            count = step.share(entry, self.seats.whole_prompts)
            if count and self._make_room(entry, count, chunks):
                chunks.append(step.take(entry, count))
        while self.waiting and step.tokens and len(self.running) < self._max_rows:
            count = self._enter(self.waiting[0], step)
            if not count:
                break
            entry = self.waiting.popleft()
            self.running.append(entry)
            chunks.append(step.take(entry, count))
        return chunks

    def _in_turn(self) -> Iterator[Entry]:
        """Running rows, those that answer first; one that is pushed out meanwhile is left out."""
        order = sorted(self.running, key=lambda e: e.left != 1)  # stable: older ones first
        return (entry for entry in order if entry in self.running)

    def _make_room(self, entry: Entry, count: int, chunks: list[Chunk]) -> bool:
        while not self.seats.reserve(entry.row, count):
            youngest = self.running[-1]
            self._push_out(youngest, chunks)
            if youngest is entry:
                return False
        return True

    def _push_out(self, entry: Entry, chunks: list[Chunk]) -> None:
        self.preemptions += 1
        self.running.remove(entry)
        self.seats.release(entry.row)
        self.waiting.appendleft(entry)
        chunks[:] = [chunk for chunk in chunks if chunk.row is not entry.row]

    def _enter(self, entry: Entry, step: _Step) -> int:
        """Tokens of a waiting row for this step; it comes in if there is room for all that is known
        of it, and for others to go on. 0: it does not."""
        row, seats = entry.row, self.seats
        found = seats.admit(row)
        count = step.share(entry, seats.whole_prompts)
        spare = HEADROOM * len(self.running)
        fits = not self.running or seats.used + entry.left + spare <= seats.capacity
        if not (count and fits and seats.reserve(row, entry.left)):
            seats.release(row)
            return 0
        if seats.prefix_sharing and row.shares_prefix:
            self.prefix_queries += len(row.tokens)
            self.prefix_hits += found
        return count
