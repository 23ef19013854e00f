"""Which stories become the validation split if the source has none."""

from __future__ import annotations

import math
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence

from .formats import Piece

MIN_VALIDATION_CHARACTERS = 8_000  # about 2,000 tokens, so that windows fit into the validation split


def hold_out(read: Callable[[], Iterator[Piece]], split: str, fraction: float, source: str) -> Iterator[Piece]:
    """The stories of one split, in pieces. Calls `read`, which returns the pieces of all stories, twice.

    Holds out `fraction` of the stories, evenly spaced. If these have fewer than MIN_VALIDATION_CHARACTERS characters
    and less than a fifth of the text, more stories are held out; with too few stories, the end of the text. The
    validation split then warns about `source`.
    """
    lengths = _story_lengths(read(), fraction)
    if lengths is None or _is_enough(lengths, fraction):
        return _select(read(), split, lambda index: _usually_held_out(index, fraction))
    number, total = len(lengths), sum(lengths)
    count = _smallest_count(lengths, fraction)
    if count:
        held_out = sum(_evenly_spaced(lengths, count))
        what = f"{count:,} of {number:,} stories"
    else:
        held_out = max(_needed(total), int(total * fraction))
        what = "its end"
    if split == "validation" and held_out > total * fraction:
        warnings.warn(
            f"{source} is small: {held_out / total:.1%} of the text ({what}) is held out for validation instead of "
            f"{fraction:.1%}",
            stacklevel=2,
        )
    if count:
        return _select(read(), split, lambda index: (index + 1) * count // number > index * count // number)
    return _split_text(read(), split, total - held_out)


def _usually_held_out(index: int, fraction: float) -> bool:
    return int((index + 1) * fraction) > int(index * fraction)


def _needed(total: int) -> int:
    """The minimum length of the validation split of a text of `total` characters."""
    return min(MIN_VALIDATION_CHARACTERS, math.ceil(total / 5))


def _story_lengths(pieces: Iterator[Piece], fraction: float) -> Sequence[int] | None:
    """The length of each story in characters, or None as soon as the source is known to be large enough."""
    lengths = array("q")  # 8 bytes each
    length = held_out = 0
    for text, ends_story in pieces:
        length += len(text)
        if ends_story:
            held_out += length * _usually_held_out(len(lengths), fraction)
            if held_out >= MIN_VALIDATION_CHARACTERS:
                return None
            lengths.append(length)
            length = 0
    return lengths


def _is_enough(lengths: Sequence[int], fraction: float) -> bool:
    """True if `fraction` of the stories is at least one story and enough text."""
    held_out = [length for index, length in enumerate(lengths) if _usually_held_out(index, fraction)]
    return bool(held_out) and sum(held_out) >= _needed(sum(lengths))


def _smallest_count(lengths: Sequence[int], fraction: float) -> int:
    """The smallest number of evenly spaced stories with enough characters, and at most half of the text.

    Above 10, the count grows by a tenth at a time. Returns 0 if no count fits.
    """
    total = sum(lengths)
    count = max(1, int(len(lengths) * fraction))
    while count <= len(lengths) // 2:
        if _needed(total) <= sum(_evenly_spaced(lengths, count)) <= total / 2:
            return count
        count += 1 + count // 10
    return 0


def _evenly_spaced(lengths: Sequence[int], count: int) -> list[int]:
    """The lengths of `count` evenly spaced stories, the last story included."""
    return [lengths[(number * len(lengths) - 1) // count] for number in range(1, count + 1)]


def _select(pieces: Iterator[Piece], split: str, held_out: Callable[[int], bool]) -> Iterator[Piece]:
    """The stories of one split. `held_out` is called with the index of a story."""
    index = 0
    for text, ends_story in pieces:
        if held_out(index) == (split == "validation"):
            yield text, ends_story
        index += ends_story


def _split_text(pieces: Iterator[Piece], split: str, position: int) -> Iterator[Piece]:
    """The text before or after the last whitespace up to character `position`. The cut ends a story."""
    start, in_story = 0, False
    for text, ends_story in pieces:
        end = start + len(text)
        if start < position <= end:
            before = text[: position - start + 1]
            cut = max(before.rfind(" "), before.rfind("\n"), 0)
            if split == "validation":
                yield text[cut:], ends_story
            elif cut or in_story:
                yield text[:cut], True
        elif (start >= position) == (split == "validation"):
            yield text, ends_story
        start, in_story = end, not ends_story
