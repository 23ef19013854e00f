"""Stories -> token ids in `train.bin` and `validation.bin`, and windows of them for training and evaluation.

A `.bin` is raw little-endian uint16 and nothing else; the `.json` beside it says what it holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tqdm import tqdm

from .config import DataConfig, StoryLLMError
from .files import atomic_write, cannot, locked, read_json, sha256, write_json
from .stories import SPLITS, read_stories, source_fingerprint
from .tokenizer import END_OF_TEXT, gpt2_tokenizer, tokenizer_from_dict, tokenizer_hash, tokenizer_to_dict, train_bpe

VOCABULARY = "vocabulary.json"
TOKEN_DTYPE = np.dtype("<u2")
TEXT_AT_ONCE = 1 << 20  # characters of stories that are encoded together
IDS_AT_ONCE = 1 << 24  # ids looked at together when a whole file is read


@dataclass(frozen=True)
class TokenInfo:
    """What a `.bin` holds, as written in the `.json` beside it."""

    split: str
    source: str
    tokenizer: str
    tokenizer_hash: str  # SHA-256 over the vocabulary
    vocab_size: int
    stories: int
    tokens: int  # one end-of-text token a story included
    bytes: int  # of text as UTF-8, end-of-text tokens not counted
    sha256: str  # of the .bin
    request: dict[str, Any]  # the settings that led to it: the same again need no work


@dataclass(frozen=True)
class PreparedData:
    """What `prepare` made, or found made already."""

    train: TokenInfo
    validation: TokenInfo


def prepare(data: DataConfig, out_dir: str | Path, overwrite: bool = False) -> PreparedData:
    """Writes the tokens of both splits into `out_dir`, with a `.json` beside each and the vocabulary.

    Streams: memory does not grow with the corpus. What is there already from the same source and settings is kept;
    what was cut off half way is made again. Raises StoryLLMError where the folder holds other data, unless
    `overwrite`, and for a source or tokenizer that cannot be had.
    """
    if not isinstance(data, DataConfig):
        raise StoryLLMError(f"prepare was given a {type(data).__name__}, expected a DataConfig: pass recipe.data")
    out_dir = Path(out_dir)
    settings = {name: value for name, value in dataclasses.asdict(data).items() if name != "source"}
    request = {**settings, "fingerprint": source_fingerprint(data)}
    with locked(out_dir):
        return _prepare(data, out_dir, overwrite, request)


def _prepare(data: DataConfig, out_dir: Path, overwrite: bool, request: dict[str, Any]) -> PreparedData:
    paths = {split: out_dir / f"{split}.bin" for split in SPLITS}
    done = {split: _complete(path, request) for split, path in paths.items()}
    others = [path for split, path in paths.items() if path.exists() and not done[split]]
    others += [
        path.with_suffix(".json") for path in paths.values() if _is_foreign(path.with_suffix(".json"), read_info)
    ]
    vocabulary = out_dir / VOCABULARY
    if not any(done.values()) and _is_foreign(vocabulary, lambda path: read_tokenizer(path.parent)):
        others.append(vocabulary)  # beside data of this request, a damaged one is this data's, and is made again
    if others and not overwrite:
        raise StoryLLMError(
            f"{others[0]} holds other data (another source, tokenizer or setting): take another folder (--out), "
            "or pass overwrite=True (--overwrite) to replace it"
        )
    tokenizer = _prepare_tokenizer(data, vocabulary, request)
    infos = {}
    for split, path in reversed(paths.items()):  # validation first: it is where too few stories show
        info = done[split]
        if info is None or info.tokenizer_hash != tokenizer_hash(tokenizer):  # as where vocabulary.json was lost
            info = _write_split(data, split, tokenizer, path, request)
        infos[split] = info
    return PreparedData(**infos)


def _complete(path: Path, request: dict[str, Any]) -> TokenInfo | None:
    """What `path` holds, if it was made whole by the same request."""
    try:
        info = read_info(path)
    except StoryLLMError:
        return None
    whole = path.exists() and path.stat().st_size == info.tokens * TOKEN_DTYPE.itemsize
    return info if whole and info.request == request else None


def _is_foreign(path: Path, read: Callable[[Path], object]) -> bool:
    """Is there a file of that name which is not one of ours, by what reads ours?"""
    try:
        if path.exists():
            read(path)
    except StoryLLMError:
        return True
    return False


def _prepare_tokenizer(data: DataConfig, path: Path, request: dict[str, Any]) -> tiktoken.Encoding:
    """The tokenizer that `data` names, trained if need be, and kept in the file `path`."""
    with suppress(StoryLLMError):  # none there, or not one of ours: it is made afresh
        kept = read_json(path)
        if kept.get("request") == request:
            return tokenizer_from_dict(kept)
    if data.tokenizer == "gpt2":
        tokenizer = gpt2_tokenizer()
    else:
        stories = tqdm(read_stories(data, "train"), desc="vocabulary", unit=" stories", file=sys.stdout)
        tokenizer = train_bpe(stories, int(data.tokenizer.removeprefix("bpe:")))
    write_json(path, {**tokenizer_to_dict(tokenizer), "request": request})
    return tokenizer


def _write_split(
    data: DataConfig, split: str, tokenizer: tiktoken.Encoding, path: Path, request: dict[str, Any]
) -> TokenInfo:
    counts = {"stories": 0, "tokens": 0, "bytes": 0}
    digest = hashlib.sha256()
    stories = read_stories(data, split)
    with atomic_write(path) as file, tqdm(desc=split, unit=" stories", file=sys.stdout) as bar:
        for ids, number, text_bytes in encoded_batches(stories, tokenizer):
            file.write(ids.tobytes())
            digest.update(ids.tobytes())
            counts["stories"] += number
            counts["tokens"] += len(ids)
            counts["bytes"] += text_bytes
            bar.update(number)
        if not counts["stories"]:
            raise StoryLLMError(
                f"{data.source} leaves no {split} stories: add some (in a .txt, a line of {END_OF_TEXT} "
                f"stands between two), or hold out more than {data.validation_fraction:g} (validation_fraction)"
            )
        info = TokenInfo(
            split=split,
            source=data.source,
            tokenizer=tokenizer.name,
            tokenizer_hash=tokenizer_hash(tokenizer),
            vocab_size=tokenizer.n_vocab,
            sha256=digest.hexdigest(),
            request=request,
            **counts,
        )
        # The old data goes and the new description comes before the new data gets its name: at no moment does a
        # description stand beside data that it does not describe.
        path.unlink(missing_ok=True)
        write_json(path.with_suffix(".json"), dataclasses.asdict(info))
    return info


def encoded_batches(stories: Iterable[str], tokenizer: tiktoken.Encoding) -> Iterator[tuple[np.ndarray, int, int]]:
    """Stories some thousand at a time: their ids, each story's with its end-of-text token, their number and bytes.

    Encoded in threads, one for each core, a few batches ahead of whoever takes them: in their order all the same.
    """
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[tuple[np.ndarray, int, int]]] = deque()
        for batch in _batches(stories):
            pending.append(pool.submit(_encode, batch, tokenizer))
            if len(pending) > workers:
                yield pending.popleft().result()
        for encoded in pending:
            yield encoded.result()


def _batches(stories: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for story in stories:
        batch.append(story)
        characters += len(story) + len(END_OF_TEXT)
        if characters >= TEXT_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(stories: list[str], tokenizer: tiktoken.Encoding) -> tuple[np.ndarray, int, int]:
    """What `encoded_batches` gives of these stories: joined by the end-of-text mark, and encoded at once."""
    text = END_OF_TEXT.join([*stories, ""])
    text_bytes = len(text.encode()) - len(END_OF_TEXT) * len(stories)
    if text.count(END_OF_TEXT) == len(stories):
        ids = tokenizer.encode_to_numpy(text, allowed_special={END_OF_TEXT}).astype(TOKEN_DTYPE)
    else:  # a story holds the mark in its text, where it is not the end: each story by itself
        each = [[*tokenizer.encode_ordinary(story), tokenizer.eot_token] for story in stories]
        ids = np.concatenate([np.array(story, TOKEN_DTYPE) for story in each])
    return ids, len(stories), text_bytes


def read_info(path: str | Path) -> TokenInfo:
    """What the `.json` beside a `.bin` says of it. Raises StoryLLMError if there is none, or another program's."""
    path = Path(path).with_suffix(".json")
    if not path.is_file():
        raise StoryLLMError(f"there is no {path}: make the data with `storyllm prepare`, or name its folder")
    values = read_json(path)
    try:
        info = TokenInfo(**values)
        _check_info(info)
    except (TypeError, ValueError) as error:
        raise StoryLLMError(f"{path} is damaged or not StoryLLM's: prepare the data again") from error
    return info


def _check_info(info: TokenInfo) -> None:
    """Raises ValueError or TypeError for a description that no data can have."""
    counts = (info.vocab_size, info.stories, info.tokens, info.bytes)
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        raise TypeError("a count is not a whole number")
    if not 257 <= info.vocab_size <= 65536 or not 1 <= info.stories <= info.tokens or info.split not in SPLITS:
        raise ValueError("a count is out of range")
    if not all(re.fullmatch("[0-9a-f]{64}", digits) for digits in (info.tokenizer_hash, info.sha256)):
        raise ValueError("a checksum is none")
    if not isinstance(info.request, dict) or not isinstance(info.source, str) or not isinstance(info.tokenizer, str):
        raise TypeError("the request is none")


def read_tokenizer(data_dir: str | Path) -> tiktoken.Encoding:
    """The tokenizer kept beside the data in `data_dir`."""
    path = Path(data_dir) / VOCABULARY
    if not path.is_file():
        raise StoryLLMError(f"there is no {path}: make the data with `storyllm prepare`, or name its folder")
    values = read_json(path)
    try:
        return tokenizer_from_dict(values)
    except StoryLLMError as error:
        raise StoryLLMError(f"{path} is damaged or not StoryLLM's: prepare the data again") from error


@dataclass(frozen=True)
class Tokens:
    """The ids of one `.bin`, memory-mapped, and what is known of them."""

    path: Path
    info: TokenInfo
    ids: np.ndarray  # (info.tokens,) uint16


def open_tokens(path: str | Path) -> Tokens:
    """Opens a `.bin` that `prepare` made, and makes sure that it is what its `.json` says.

    Raises StoryLLMError for a file that is missing, of another size, or holds ids beyond its vocabulary.
    """
    path = Path(path)
    if not path.is_file():
        raise StoryLLMError(f"there is no {path}: make the data with `storyllm prepare`, or name its folder")
    size = path.stat().st_size
    if size % TOKEN_DTYPE.itemsize:
        raise StoryLLMError(f"{path} has {size} bytes, expected an even number (16-bit ids): prepare the data again")
    info = read_info(path)
    tokens = size // TOKEN_DTYPE.itemsize
    if tokens != info.tokens or not tokens:
        raise StoryLLMError(f"{path} holds {tokens:,} tokens, its .json says {info.tokens:,}: prepare the data again")
    try:
        ids = np.memmap(path, dtype=TOKEN_DTYPE, mode="r")
    except OSError as error:
        raise cannot("read", path, error) from error
    largest = max(int(part.max()) for part in _parts(ids))
    if largest >= info.vocab_size:
        raise StoryLLMError(
            f"{path} holds token {largest} but its vocabulary has {info.vocab_size} tokens: prepare the data again"
        )
    return Tokens(path, info, ids)


def _parts(ids: np.ndarray) -> Iterator[np.ndarray]:
    """All the ids, so many at once as memory need not grow for."""
    return (ids[start : start + IDS_AT_ONCE] for start in range(0, len(ids), IDS_AT_ONCE))


def check_together(infos: dict[str, TokenInfo], tokenizer: tiktoken.Encoding, data_dir: Path) -> None:
    """Raises StoryLLMError unless both splits were made of one source, by one request, with that vocabulary."""
    for split, info in infos.items():
        path = data_dir / f"{split}.bin"
        if info.split != split or info.tokenizer_hash != tokenizer_hash(tokenizer):
            raise StoryLLMError(f"{path} was not made with the vocabulary beside it: prepare the data again")
        if info.request != infos["train"].request:
            raise StoryLLMError(f"{path} was not made together with train.bin: prepare the data again (--overwrite)")


def verify(data_dir: str | Path) -> PreparedData:
    """Reads all the data in a folder and makes sure of every number that its descriptions give.

    Raises StoryLLMError, naming the first file that is missing or damaged, and what to do.
    """
    data_dir = Path(data_dir)
    tokenizer = read_tokenizer(data_dir)
    bytes_of = np.array([len(tokenizer.decode_single_token_bytes(token)) for token in range(tokenizer.eot_token)] + [0])
    infos = {}
    for split in SPLITS:
        path = data_dir / f"{split}.bin"
        tokens = open_tokens(path)
        info = tokens.info
        found = {
            "sha256": sha256(path),
            "stories": sum(int((part == tokenizer.eot_token).sum()) for part in _parts(tokens.ids)),
            "bytes": sum(int(bytes_of[part].sum()) for part in _parts(tokens.ids)),
        }
        for name, value in found.items():
            if value != getattr(info, name):
                raise StoryLLMError(
                    f"{path} is damaged: its {name} is {value}, expected {getattr(info, name)} as in its .json: "
                    "remove it and prepare the data again"
                )
        infos[split] = info
    check_together(infos, tokenizer, data_dir)
    return PreparedData(**infos)


def random_windows(
    ids: np.ndarray, block_size: int, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """`count` windows that start anywhere: (count, block_size) int64 inputs, and targets one token further on.

    Raises StoryLLMError if there are not enough tokens for one window.
    """
    _check_one_window(ids, block_size)
    return _windows_at(rng.integers(len(ids) - block_size, size=count), ids, block_size)


def shuffled_windows(
    ids: np.ndarray, block_size: int, count: int, seed: tuple[int, ...], batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Batch number `batch` (from 0) of windows that do not overlap, in an order drawn by `seed`: shapes as above.

    Each comes once before any comes again. From one such epoch to the next, order and cuts are others. Raises
    StoryLLMError if there are not enough tokens for one window.
    """
    _check_one_window(ids, block_size)
    in_epoch = max(1, len(ids) // block_size - 1)  # leaves room for the cuts to move
    places = np.arange(batch * count, (batch + 1) * count)
    starts = np.empty(count, np.int64)
    for epoch in np.unique(places // in_epoch):
        order, offset = _epoch(in_epoch, len(ids) - in_epoch * block_size, (*seed, int(epoch)))
        here = places // in_epoch == epoch
        starts[here] = offset + order[places[here] % in_epoch] * block_size
    return _windows_at(starts, ids, block_size)


@lru_cache(maxsize=2)
def _epoch(windows: int, offsets: int, seed: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """The order of an epoch's windows, and where the first begins. Kept, for the next batch asks for the same."""
    rng = np.random.default_rng(seed)
    return rng.permutation(windows), int(rng.integers(offsets))


def _check_one_window(ids: np.ndarray, block_size: int) -> None:
    if len(ids) <= block_size:
        raise StoryLLMError(
            f"the data has {len(ids)} tokens, a window of {block_size} needs {block_size + 1}: "
            "prepare more stories (or hold out more of them), or lower model.block_size"
        )


def _windows_at(starts: np.ndarray, ids: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    every_window = np.lib.stride_tricks.sliding_window_view(np.asarray(ids), block_size + 1)  # a view: costs nothing
    windows = every_window[starts].astype(np.int64)  # (count, block_size + 1)
    return windows[:, :-1], windows[:, 1:]


def sequential_windows(ids: np.ndarray, block_size: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All of `ids` in order, in windows that do not overlap, up to `count` at a time: (<= count, block_size) each.

    Every token but the first is a target exactly once: what is left over comes last, as one shorter window.
    """
    targets = max(len(ids) - 1, 0)
    whole = targets // block_size
    for first in range(0, whole, count):
        start, stop = first * block_size, min(first + count, whole) * block_size
        chunk = ids[start : stop + 1].astype(np.int64)
        yield chunk[:-1].reshape(-1, block_size), chunk[1:].reshape(-1, block_size)
    if targets % block_size:
        rest = ids[whole * block_size :].astype(np.int64)
        yield rest[None, :-1], rest[None, 1:]
