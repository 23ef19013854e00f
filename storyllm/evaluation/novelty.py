"""What of a text is in the training stories: k-grams, the longest copied span, and the nearest story.

The training stories are read once, and only the k-grams of the texts are in memory, so that the complete TinyStories
can be searched on a laptop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F

MAX_K = 10  # the longest k-grams that are counted; the longest copied span may be longer
CHUNK = 1 << 20  # training tokens at a time, which bounds memory
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # of the rolling hash; odd, with bits spread over the whole word
FILTER_BITS = 20


@dataclass(frozen=True)
class Copies:
    """What of a text is in the training stories. Spans never reach from one story into the next."""

    found: tuple[int, ...]  # the number of its k-grams that occur there, for k = 1 to MAX_K
    total: tuple[int, ...]  # the number of its k-grams
    longest: int  # tokens of its longest span that occurs there
    nearest: tuple[int, int]  # the position of the nearest training story: its first token, and the one after its last
    rouge_2: float  # the share of the text's different bigrams that this story has


class _Grams:
    """The different k-grams of the texts, by their hashes."""

    def __init__(self, hashes: np.ndarray, texts: np.ndarray) -> None:
        self.texts = texts  # the text of each k-gram
        self.hashes, self.index = np.unique(hashes, return_inverse=True)  # index: which of them each k-gram is
        self.found = np.zeros(len(self.hashes), bool)
        self.filter = np.zeros(1 << FILTER_BITS, bool)  # small enough for a CPU's cache; sorts out most of a chunk
        self.filter[self.hashes >> np.uint64(64 - FILTER_BITS)] = True

    def lookup(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The positions in `hashes` of k-grams that the texts have, and which ones they are."""
        candidates = np.flatnonzero(self.filter[hashes >> np.uint64(64 - FILTER_BITS)])
        which = np.searchsorted(self.hashes, hashes[candidates]).clip(max=len(self.hashes) - 1)
        matches = self.hashes[which] == hashes[candidates]
        return candidates[matches], which[matches]


class CopySearch:
    """Searches the training stories for copies of some texts, given as token ids.

    A k-gram is identified by a 64-bit rolling hash (Karp and Rabin 1987). A k-gram can only occur where its first k - 1
    tokens do, so each k looks only where the one before was found. The nearest story is the one with the highest
    ROUGE-2 precision over sets of bigrams (Eldan and Li 2023): the share of the text's different bigrams that it has.
    """

    def __init__(self, texts: Sequence[Sequence[int]], end_of_text: int) -> None:
        self.end_of_text, self.lengths = end_of_text, [len(text) for text in texts]
        self._ids = np.array([i for text in texts for i in text], np.uint64)
        self._text = np.repeat(np.arange(len(texts)), self.lengths)
        self._ends = np.cumsum(self.lengths)[self._text] if texts else self._text
        self._starts, self._hashes = np.arange(len(self._ids)), np.zeros(len(self._ids), np.uint64)
        self._grams: list[_Grams] = []  # for k = 1, 2, ... as far as any were found
        self._overlap = np.zeros(len(texts))  # bigrams shared with the nearest story so far
        self._nearest = np.zeros((len(texts), 2), int)
        self._bigrams: torch.Tensor | None = None  # (different bigrams, texts): 1 where the text has the bigram

    def read(self, ids: np.ndarray, offset: int = 0) -> None:
        """Searches a chunk of whole training stories. `offset` is the position of its first token."""
        ids = ids.astype(np.uint64)
        positions, hashes = np.arange(len(ids)), np.zeros(len(ids), np.uint64)
        for k in count(1):
            inside = positions + k <= len(ids)
            positions, hashes = positions[inside], hashes[inside]
            if not len(positions) or not (grams := self._grams_of(k)):
                return
            hashes = (hashes + ids[positions + (k - 1)] + np.uint64(1)) * MULTIPLIER
            matches, which = grams.lookup(hashes)
            grams.found[which] = True
            positions, hashes = positions[matches], hashes[matches]
            if k == 2 and len(positions):
                self._compare_stories(ids, positions, which, offset)

    def results(self) -> list[Copies]:
        """What was found for each text."""
        found = np.zeros((len(self.lengths), max(MAX_K, len(self._grams))), int)
        for k, grams in enumerate(self._grams):
            found[:, k] = np.bincount(grams.texts[grams.found[grams.index]], minlength=len(self.lengths))
        bigrams = np.ones(len(self.lengths)) if self._bigrams is None else self._bigrams.sum(0).clamp(min=1).numpy()
        return [
            Copies(
                found=tuple(found[i, :MAX_K].tolist()),
                total=tuple(max(0, length - k) for k in range(MAX_K)),
                longest=int((found[i] > 0).sum()),
                nearest=(int(self._nearest[i, 0]), int(self._nearest[i, 1])),
                rouge_2=float(self._overlap[i] / bigrams[i]),
            )
            for i, length in enumerate(self.lengths)
        ]

    def _grams_of(self, k: int) -> _Grams | None:
        """The k-grams of the texts, or None if all texts are shorter."""
        if k == len(self._grams) + 1:
            inside = self._starts + k <= self._ends
            self._starts, self._ends, self._text = self._starts[inside], self._ends[inside], self._text[inside]
            if not len(self._starts):
                return None
            added = self._ids[self._starts + (k - 1)] + np.uint64(1)
            self._hashes = (self._hashes[inside] + added) * MULTIPLIER
            self._grams.append(_Grams(self._hashes, self._text))
        return self._grams[k - 1] if k <= len(self._grams) else None

    def _compare_stories(self, ids: np.ndarray, positions: np.ndarray, bigrams: np.ndarray, offset: int) -> None:
        """Updates the nearest story of each text with those of a chunk, given where the texts' bigrams occur in it."""
        grams = self._grams[1]
        if self._bigrams is None:
            self._bigrams = torch.zeros(len(grams.hashes), len(self.lengths))
            self._bigrams[grams.index, grams.texts] = 1
        ends = np.flatnonzero(ids == self.end_of_text)
        if not len(ends) or ends[-1] != len(ids) - 1:
            ends = np.append(ends, len(ids))
        stories = np.searchsorted(ends, positions)
        pairs = np.sort(stories * len(grams.hashes) + bigrams)
        pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # a bigram counts once per story
        stories, bigrams = np.divmod(pairs, len(grams.hashes))
        first = np.searchsorted(stories, np.arange(len(ends)))
        overlaps = F.embedding_bag(  # (stories, texts): the sum of the rows of the bigrams of each story
            torch.from_numpy(bigrams), self._bigrams, torch.from_numpy(first), mode="sum"
        ).numpy()
        best, texts = overlaps.argmax(0), np.arange(len(self.lengths))
        better = overlaps[best, texts] > self._overlap
        starts = np.append(0, ends[:-1] + 1)
        self._overlap = np.where(better, overlaps[best, texts], self._overlap)
        self._nearest[better] = np.stack([starts[best], ends[best]], 1)[better] + offset


def story_chunks(ids: np.ndarray, end_of_text: int, size: int = CHUNK) -> Iterator[tuple[int, np.ndarray]]:
    """All of `ids` in order, as (position, ids): chunks of whole stories with about `size` tokens.

    A longer story is a chunk of its own.
    """
    start = 0
    while start < len(ids):
        stop = start + size
        while stop < len(ids) and not len(ends := np.flatnonzero(ids[start:stop] == end_of_text)):
            stop += size
        stop = start + int(ends[-1]) + 1 if stop < len(ids) else len(ids)
        yield start, np.asarray(ids[start:stop])
        start = stop
