"""Figures of a text whose tokens are colored: by token, by surprisal, and by what was copied."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tiktoken

from ..config import StoryLLMError, printable
from ..evaluation.reference import ngrams
from ..storyteller import Storyteller
from .style import MUTED, finish, house_style, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 88  # characters in a line
TOKEN_COLORS = ("#CFE5F5", "#FBE0C8", "#CFEADF", "#F1D9E6", "#F6ECC6")
COPIED = "#F9D0B0"
NGRAM = 6  # words; shorter phrases are common to many stories


def plot_tokens(text: str, tokenizer: tiktoken.Encoding, out: str | Path | None = None) -> Figure:
    """The tokens of `text` in alternating colors, each with its id below. A token that begins with a space owns it.

    The figure is saved to `out` if given, in the format of its suffix.
    """
    ids = tokenizer.encode_ordinary(text)
    pieces = [tokenizer.decode_single_token_bytes(token).decode("utf-8", "replace") for token in ids]
    colors = [TOKEN_COLORS[i % len(TOKEN_COLORS)] for i in range(len(ids))]
    title = f"{len(text.encode()):,} bytes, {len(ids):,} tokens"
    return _plot_pieces([(title, pieces, colors, [str(token) for token in ids])], out)


def plot_surprisal(storyteller: Storyteller, text: str, out: str | Path | None = None) -> Figure:
    """`text` with each token shaded by its surprisal, -log2 of the probability that the model gave it, in bits.

    The probabilities are those of `Storyteller.score`. The figure is saved to `out` if given, in the format of its
    suffix.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    score = storyteller.score(text)
    bits = [-log_prob / math.log(2) for log_prob in score.log_probs]
    # 12 bits are a probability of 1 in 4,096. Light colors only, so that the text stays readable.
    colors = [to_hex(colormaps["Oranges"](0.65 * min(value, 12) / 12)) for value in bits]
    mean = sum(bits) / max(len(bits), 1)
    title = f"surprisal: {mean:.2f} bits per token; the darker, the less expected, up to 12 bits or more"
    return _plot_pieces([(title, score.tokens, colors, None)], out)


def plot_nearest_story(story: str, stories: Iterable[str], out: str | Path | None = None) -> Figure:
    """`story` beside the one of `stories` that shares the most phrases with it, with these phrases highlighted.

    A phrase is a sequence of 6 words, in any capitalization and with any punctuation. The figure is saved to `out` if
    given, in the format of its suffix. Raises StoryLLMError if `stories` is empty.
    """
    phrases = _phrases(story)
    nearest = max(stories, key=lambda other: len(phrases & _phrases(other)), default=None)
    if nearest is None:
        raise StoryLLMError("no stories were given, expected those of the training data")
    shared = phrases & _phrases(nearest)
    texts = []
    for name, text in (("the given story", story), ("the nearest of the other stories", nearest)):
        pieces = re.findall(r"\s*\S+|\s+", text)
        copied = _in_phrases(pieces, shared)
        title = f"{name}: {sum(copied)} of {len(pieces)} words are in shared phrases of {NGRAM} words"
        texts.append((title, pieces, [COPIED if is_copied else None for is_copied in copied], None))
    return _plot_pieces(texts, out)


def _words(text: str) -> list[str]:
    """Lowercase words without punctuation."""
    return re.sub(r"[^\w\s]|_", "", text).lower().split()


def _phrases(text: str) -> set[tuple[str, ...]]:
    return set(ngrams(_words(text), NGRAM))


def _in_phrases(pieces: Sequence[str], phrases: set[tuple[str, ...]]) -> list[bool]:
    """For each piece (a word and what surrounds it), whether it is part of one of the phrases."""
    words = [(index, word) for index, piece in enumerate(pieces) for word in _words(piece)]
    found = [False] * len(pieces)
    for i in range(len(words) - NGRAM + 1):
        if tuple(word for _, word in words[i : i + NGRAM]) in phrases:
            found[words[i][0] : words[i + NGRAM - 1][0] + 1] = [True] * (words[i + NGRAM - 1][0] + 1 - words[i][0])
    return found


def _plot_pieces(
    texts: Sequence[tuple[str, Sequence[str], Sequence[str | None], Sequence[str] | None]], out: str | Path | None
) -> Figure:
    """A panel for each (title, pieces of a text, their background colors, labels below them)."""
    layouts = [_layout(pieces, labels) for _, pieces, _, labels in texts]
    spacing = [2.2 if labels is not None else 1.5 for _, _, _, labels in texts]  # of lines, in units of the font size
    rows = [(placed[-1][2] + 1) if placed else 1 for placed in layouts]
    with house_style():
        width, size = 10.0, 10.0 * 72 * 0.94 / COLUMNS / 0.602  # inches; points: a character is 0.602 of them wide
        heights = [count * space * size / 72 + 0.45 for count, space in zip(rows, spacing, strict=True)]
        figure = new_figure(width, sum(heights))
        panels = figure.subplots(len(texts), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, placed, count, (title, _, colors, _labels) in zip(panels, layouts, rows, texts, strict=True):
            axes.set_title(title, loc="left", fontsize=9.5, color=MUTED, parse_math=False)
            axes.set_xlim(0, COLUMNS)
            axes.set_ylim(count, 0)
            axes.axis("off")
            for text, column, row, piece, label in placed:
                _draw_piece(axes, text, column, row, colors[piece], label, size)
        return finish(figure, out)


def _layout(pieces: Sequence[str], labels: Sequence[str] | None) -> list[tuple[str, int, int, int, str]]:
    """(text, column, row, index of the piece, label) for each piece, in lines of at most COLUMNS characters.

    A newline within a piece starts a new line.
    """
    placed, column, row = [], 0, 0
    for index, piece in enumerate(pieces):
        for number, part in enumerate(printable(piece).replace("\t", " ").split("\n")):
            label = labels[index] if labels and not number else ""
            if number > 0:
                column, row = 0, row + 1
            elif column and column + max(len(part), len(label) + 1) > COLUMNS:
                column, row = 0, row + 1
                part = part if label else part.removeprefix(" ")
            while len(part) > COLUMNS:  # such as a word of 100 letters
                placed.append((part[:COLUMNS], column, row, index, ""))
                part, column, row = part[COLUMNS:], 0, row + 1
            placed.append((part, column, row, index, label))
            column += max(len(part), len(label) + 1 if label else 0)
    return placed


def _draw_piece(axes: Axes, text: str, column: int, row: int, color: str | None, label: str, size: float) -> None:
    from matplotlib.patches import Rectangle

    style: dict[str, Any] = {"family": "DejaVu Sans Mono", "parse_math": False, "va": "center"}
    if color is not None:
        axes.add_patch(Rectangle((column, row + 0.05), len(text), 0.6 if label else 0.9, color=color, linewidth=0))
    axes.text(column, row + (0.34 if label else 0.5), text, fontsize=size, **style)
    if label:
        axes.text(column, row + 0.82, label, fontsize=0.6 * size, color=MUTED, **style)
