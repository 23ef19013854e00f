"""Stories -> token ids in `train.bin` and `validation.bin`: streamed, tokenized in threads, replaced atomically."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from ..config import DataConfig, StoryLLMError, printable
from ..files import atomic_write, lock_folder, read_json, write_json
from .formats import END_OF_TEXT, Piece
from .local_files import is_saved_dataset, source_files
from .stories import SPLITS, read_pieces, source_fingerprint
from .token_file import TOKEN_DTYPE, VOCABULARY, PreparedData, TokenFileInfo, load_tokenizer, read_info
from .tokenizer import gpt2_tokenizer, tokenizer_from_dict, tokenizer_hash, tokenizer_to_dict, train_bpe

BATCH_CHARACTERS = 1 << 20  # characters of text that one thread tokenizes in one call


class ProgressBar(tqdm):
    """A progress bar. If its output cannot be written, the error is raised once, without a traceback at the end."""

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):  # before tqdm 4.69.1, a bar whose constructor fails has no attributes
            super().__del__()


def prepare(
    data: DataConfig, out_dir: str | Path, overwrite: bool = False, tokenizer: tiktoken.Encoding | None = None
) -> PreparedData:
    """Tokenizes both splits into `out_dir`: a `.bin` and a `.json` for each, and the vocabulary.

    `tokenizer` is that of a model to fine-tune, and replaces the one that `data` describes. Memory use does not grow
    with the corpus. Files that an earlier call completed for the same source and settings are reused; incomplete ones
    are replaced. Raises StoryLLMError if the folder holds other data and `overwrite` is False, or if the source or the
    tokenizer is unavailable.
    """
    out_dir = Path(out_dir)
    data, request = make_request(data, tokenizer)
    with lock_folder(out_dir):
        return _prepare(data, out_dir, overwrite, request, tokenizer)


def make_request(data: DataConfig, tokenizer: tiktoken.Encoding | None) -> tuple[DataConfig, dict[str, Any]]:
    """`data` with the name of `tokenizer`, if given, and the settings and the fingerprint that identify its result."""
    if not isinstance(data, DataConfig):
        raise StoryLLMError(f"data is {type(data).__name__}, must be a DataConfig; pass recipe.data")
    fingerprint = source_fingerprint(data)
    if tokenizer is not None:
        data = dataclasses.replace(data, tokenizer=tokenizer.name)
        fingerprint += f" tokenizer:{tokenizer_hash(tokenizer)}"
    # Settings that are None are left out, as data that was prepared before a setting existed has none. The fingerprint
    # replaces the source's name: a local file that was moved is not prepared again.
    settings = {name: value for name, value in dataclasses.asdict(data).items() if value is not None}
    del settings["source"]
    return data, {**settings, "fingerprint": fingerprint}


def _prepare(
    data: DataConfig, out_dir: Path, overwrite: bool, request: dict[str, Any], tokenizer: tiktoken.Encoding | None
) -> PreparedData:
    paths = {split: out_dir / f"{split}.bin" for split in SPLITS}
    completed = {split: completed_info(path, request) for split, path in paths.items()}
    if not overwrite:
        check_no_other_data(out_dir, paths, completed)
    if not all(completed.values()):
        print_files(data.source)
    tokenizer = prepare_tokenizer(data, out_dir / VOCABULARY, request, tokenizer)
    vocabulary_hash = tokenizer_hash(tokenizer)
    infos = {}
    for split, path in reversed(paths.items()):  # validation first: it is short, and fails early if it has no stories
        info = completed[split]
        if info is None or info.tokenizer_hash != vocabulary_hash:  # the vocabulary was lost and trained again
            info = _write_split(data, split, tokenizer, path, request)
        infos[split] = info
    return PreparedData(**infos)


def completed_info(path: Path, request: dict[str, Any]) -> TokenFileInfo | None:
    """The description of a complete `.bin` with the same request, or None."""
    try:
        info = read_info(path)
    except StoryLLMError:
        return None
    complete = path.exists() and path.stat().st_size == info.tokens * TOKEN_DTYPE.itemsize
    return info if complete and info.request == request else None


def check_no_other_data(out_dir: Path, paths: dict[str, Path], completed: dict[str, TokenFileInfo | None]) -> None:
    """Raises StoryLLMError if the folder has a file that this request did not write."""
    others = [path for split, path in paths.items() if path.exists() and not completed[split]]
    descriptions = [path.with_suffix(".json") for path in paths.values()]
    others += [path for path in descriptions if _is_unreadable(path, read_info)]
    # A corrupted vocabulary next to data of this request belongs to that data, and is replaced.
    if not any(completed.values()) and _is_unreadable(out_dir / VOCABULARY, lambda path: load_tokenizer(path.parent)):
        others.append(out_dir / VOCABULARY)
    if others:
        raise StoryLLMError(
            f"{others[0]} was prepared with another source, tokenizer or setting; use another data folder, or "
            "pass overwrite=True (--overwrite) to replace it"
        )


def print_files(folder: str) -> None:
    """Prints which files of a source are read, if it is a folder, so that missing and unrelated ones are noticed."""
    if not os.path.isdir(folder) or is_saved_dataset(Path(folder)):
        return
    files = source_files(folder)
    if files["train"] == files["validation"]:
        files = {"stories": files["train"], "skipped": files["skipped"]}
    for name, paths in files.items():
        if paths:
            first = ", ".join(str(path.relative_to(folder)) for path in paths[:5])
            rest = f" and {len(paths) - 5:,} more" if len(paths) > 5 else ""
            tqdm.write(printable(f"{name}: {first}{rest}"), sys.stdout)


def _is_unreadable(path: Path, read: Callable[[Path], object]) -> bool:
    """True if the file exists and `read` raises StoryLLMError for it."""
    try:
        if path.exists():
            read(path)
    except StoryLLMError:
        return True
    return False


def prepare_tokenizer(
    data: DataConfig, path: Path, request: dict[str, Any], tokenizer: tiktoken.Encoding | None
) -> tiktoken.Encoding:
    """The tokenizer for this request: from the file `path`, or else the one given, or created, and saved there."""
    with suppress(StoryLLMError):  # missing or corrupted
        values = read_json(path)
        if values.get("request") == request:
            return tokenizer_from_dict(values)
    if tokenizer is None and data.tokenizer == "gpt2":
        tokenizer = gpt2_tokenizer()
    elif tokenizer is None:
        with ProgressBar(desc="vocabulary", unit=" stories", file=sys.stdout) as bar:
            tokenizer = train_bpe(_texts(read_pieces(data, "train"), bar), int(data.tokenizer.removeprefix("bpe:")))
    write_json(path, {**tokenizer_to_dict(tokenizer), "request": request})
    return tokenizer


def _texts(pieces: Iterable[Piece], bar: tqdm) -> Iterator[str]:
    """The text of the pieces. Advances the bar after each story."""
    for text, ends_story in pieces:
        yield text
        bar.update(ends_story)


def _write_split(
    data: DataConfig, split: str, tokenizer: tiktoken.Encoding, path: Path, request: dict[str, Any]
) -> TokenFileInfo:
    """Writes the `.bin` and the `.json` of a split."""
    pieces = read_pieces(data, split)  # raises before the file is created
    with atomic_write(path) as file:
        written = write_batches(file, encoded_batches(pieces, tokenizer), split)
        check_has_stories(data.source, split, written.stories)
        info = TokenFileInfo(
            split=split,
            source=data.source,
            tokenizer=tokenizer.name,
            tokenizer_hash=tokenizer_hash(tokenizer),
            vocab_size=tokenizer.n_vocab,
            stories=written.stories,
            tokens=sum(written.batch_tokens),
            bytes=written.bytes,
            sha256=written.sha256,
            request=request,
        )
        write_description(path, info)
    return info


def check_has_stories(source: str, split: str, stories: int) -> None:
    """Raises StoryLLMError if a split has no stories."""
    if not stories:
        raise StoryLLMError(f"{source} has no {split} stories; add some text")


def write_description(path: Path, info: Any) -> None:
    """Writes the dataclass `info` to the `.json` of a `.bin`, just before the new `.bin` replaces the old one.

    Deletes the old `.bin` first: a crash in between never leaves a `.json` next to data that it does not describe.
    """
    path.unlink(missing_ok=True)
    write_json(path.with_suffix(".json"), dataclasses.asdict(info))


class EncodedBatch(NamedTuple):
    """Some pieces of stories as token ids."""

    ids: np.ndarray  # (tokens,) uint16; each story ends with the end-of-text token
    num_stories: int  # stories that end in this batch
    num_bytes: int  # of UTF-8 text, without the end-of-text tokens


class Written(NamedTuple):
    """What `write_batches` has written."""

    stories: int
    bytes: int  # of UTF-8 text, without the end-of-text tokens
    sha256: str
    batch_tokens: list[int]  # tokens of each batch


def write_batches(file: IO[bytes], batches: Iterable[EncodedBatch], name: str) -> Written:
    """Writes the token ids of the batches, with a progress bar of that name."""
    stories = num_bytes = 0
    digest, batch_tokens = hashlib.sha256(), []
    with ProgressBar(desc=name, unit=" stories", file=sys.stdout) as bar:
        for batch in batches:
            encoded = batch.ids.tobytes()
            file.write(encoded)
            digest.update(encoded)
            batch_tokens.append(len(batch.ids))
            stories += batch.num_stories
            num_bytes += batch.num_bytes
            bar.update(batch.num_stories)
    return Written(stories, num_bytes, digest.hexdigest(), batch_tokens)


def encoded_batches(
    pieces: Iterable[Piece], tokenizer: tiktoken.Encoding, first: int = 0, step: int = 1
) -> Iterator[EncodedBatch]:
    """Yields the stories as token ids, in order, in batches of at least BATCH_CHARACTERS characters.

    Only every `step`-th batch is tokenized, from number `first` on. One thread per core tokenizes, at most that many
    batches ahead of the caller.
    """
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[EncodedBatch]] = deque()
        for batch in islice(_batches(pieces), first, None, step):
            pending.append(pool.submit(_encode, batch, tokenizer))
            if len(pending) > workers:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, characters = [], 0
    for text, ends_story in pieces:
        batch.append((text, ends_story))
        characters += len(text) + len(END_OF_TEXT)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(pieces: list[Piece], tokenizer: tiktoken.Encoding) -> EncodedBatch:
    text = "".join(text + END_OF_TEXT * ends_story for text, ends_story in pieces)
    num_stories = sum(ends_story for _, ends_story in pieces)
    num_bytes = len(text.encode()) - len(END_OF_TEXT) * num_stories
    if text.count(END_OF_TEXT) == num_stories:
        ids = tokenizer.encode_to_numpy(text, allowed_special={END_OF_TEXT}).astype(TOKEN_DTYPE)
    else:  # a story contains "<|endoftext|>" as ordinary text: tokenize each piece separately
        separate = [tokenizer.encode_ordinary(text) + [tokenizer.eot_token] * ends_story for text, ends_story in pieces]
        ids = np.concatenate([np.array(piece_ids, TOKEN_DTYPE) for piece_ids in separate])
    return EncodedBatch(ids, num_stories, num_bytes)
