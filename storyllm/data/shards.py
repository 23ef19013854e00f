"""Data prepared in N shards, by several processes or machines, and merged.

Every shard reads the complete source, and tokenizes every N-th batch of it. It needs nothing from the others, and all
have the same amount of work. Merged, they are byte for byte what `prepare` writes in one process.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import tiktoken

from ..config import DataConfig, StoryLLMError, shown
from ..files import atomic_write, lock_folder, read_json, write_json
from .formats import Piece
from .prepare import (
    ProgressBar,
    check_has_stories,
    check_no_other_data,
    completed_info,
    encoded_batches,
    make_request,
    prepare_tokenizer,
    print_files,
    write_batches,
    write_description,
)
from .stories import SPLITS, read_pieces
from .token_file import TOKEN_DTYPE, VOCABULARY, PreparedData, TokenFileInfo
from .tokenizer import tokenizer_hash


@dataclass(frozen=True)
class ShardInfo:
    """The description of a split of a shard, stored in the `.json` next to its token ids."""

    split: str
    shard: int  # from 1 to `shards`
    shards: int
    version: str  # of StoryLLM
    source: str
    tokenizer: str
    tokenizer_hash: str
    vocab_size: int
    stories: int  # that end in this shard
    bytes: int  # of UTF-8 text, without the end-of-text tokens
    sha256: str  # of the token ids
    batch_tokens: list[int]  # tokens of each batch
    source_stories: int  # of all shards
    source_characters: int
    request: dict[str, Any]  # as in TokenFileInfo

    @property
    def tokens(self) -> int:
        """Tokens in this shard."""
        return sum(self.batch_tokens)


def prepare_shard(
    data: DataConfig,
    out_dir: str | Path,
    shard: int,
    shards: int,
    overwrite: bool = False,
    tokenizer: tiktoken.Encoding | None = None,
) -> dict[str, ShardInfo]:
    """Tokenizes shard number `shard`, from 1 to `shards`, into the folder `shard-I-of-N` of `out_dir`.

    The other parameters are those of `prepare`. When all shards are in `out_dir`, `merge_shards` makes one data set of
    them. Files that an earlier call completed are reused. Raises StoryLLMError as `prepare` does.
    """
    if not 1 <= shard <= shards:
        raise StoryLLMError(f"shard is {shard}, must be from 1 to shards ({shards})")
    data, request = make_request(data, tokenizer)
    folder = Path(out_dir) / f"shard-{shard}-of-{shards}"
    identity = {"shard": shard, "shards": shards, "version": importlib.metadata.version("storyllm"), "request": request}
    with lock_folder(folder):
        completed = {split: _completed_shard(folder, split, identity) for split in SPLITS}
        for split in SPLITS:
            if _path(folder, split).exists() and not completed[split] and not overwrite:
                raise StoryLLMError(
                    f"{_path(folder, split)} was prepared with another source, setting or version of StoryLLM; use "
                    "another data folder, or pass overwrite=True (--overwrite) to replace it"
                )
        if not all(completed.values()):
            print_files(data.source)
        tokenizer = prepare_tokenizer(data, folder / VOCABULARY, request, tokenizer)
        infos = {}
        for split in reversed(SPLITS):
            info = completed[split]
            if info is None or info.tokenizer_hash != tokenizer_hash(tokenizer):
                info = _write_shard(data, split, tokenizer, folder, identity)
            infos[split] = info
        return infos


def merge_shards(out_dir: str | Path, overwrite: bool = False) -> PreparedData:
    """Merges the shards in `out_dir` into the files that `prepare` would have written there. Keeps the shards.

    Raises StoryLLMError if a shard is missing, incomplete or corrupted, if the shards do not belong together, or if the
    folder holds other data and `overwrite` is False.
    """
    out_dir = Path(out_dir)
    with lock_folder(out_dir):
        folders = _shard_folders(out_dir)
        shards = {split: [_read_shard(folder, split) for folder in folders] for split in SPLITS}
        first = shards["train"][0]
        for split in SPLITS:
            for folder, info in zip(folders, shards[split], strict=True):
                _check_same_data(info, shards[split][0], folder)
                _check_same_data(info, first, folder, except_for=("source_stories", "source_characters"))
        paths = {split: out_dir / f"{split}.bin" for split in SPLITS}
        if not overwrite:
            check_no_other_data(out_dir, paths, {s: completed_info(path, first.request) for s, path in paths.items()})
        write_json(out_dir / VOCABULARY, read_json(folders[0] / VOCABULARY))
        infos = {split: _merge_split(paths[split], folders, shards[split]) for split in reversed(SPLITS)}
        return PreparedData(**infos)


def _path(folder: Path, split: str) -> Path:
    """The token ids of a shard: not called `.bin` alone, since a shard is not a data set."""
    return folder / f"{split}.shard.bin"


# Writing


def _completed_shard(folder: Path, split: str, identity: dict[str, Any]) -> ShardInfo | None:
    """The description of a complete shard with the same identity, or None."""
    try:
        info = _read_shard(folder, split)
    except StoryLLMError:
        return None
    return info if all(getattr(info, name) == value for name, value in identity.items()) else None


def _write_shard(
    data: DataConfig, split: str, tokenizer: tiktoken.Encoding, folder: Path, identity: dict[str, Any]
) -> ShardInfo:
    """Writes the token ids of a split and their `.json`."""
    total: Counter[str] = Counter()
    pieces = _counted(read_pieces(data, split), total)
    with atomic_write(_path(folder, split)) as file:
        batches = encoded_batches(pieces, tokenizer, identity["shard"] - 1, identity["shards"])
        written = write_batches(file, batches, split)
        check_has_stories(data.source, split, total["stories"])
        info = ShardInfo(
            split=split,
            source=data.source,
            tokenizer=tokenizer.name,
            tokenizer_hash=tokenizer_hash(tokenizer),
            vocab_size=tokenizer.n_vocab,
            source_stories=total["stories"],
            source_characters=total["characters"],
            **written._asdict(),
            **identity,
        )
        write_description(_path(folder, split), info)
    return info


def _counted(pieces: Iterable[Piece], total: Counter[str]) -> Iterator[Piece]:
    """The same pieces. Counts their stories and characters in `total`."""
    for text, ends_story in pieces:
        total["stories"] += ends_story
        total["characters"] += len(text)
        yield text, ends_story


# Merging


def _shard_folders(out_dir: Path) -> list[Path]:
    """The folders of all shards, in order. Raises StoryLLMError if one is missing."""
    matches = [re.fullmatch(r"shard-([1-9]\d*)-of-([1-9]\d*)", path.name) for path in out_dir.iterdir()]
    counts = sorted({int(match[2]) for match in matches if match})
    if not counts:
        raise StoryLLMError(f"{out_dir} has no shards; prepare each one (--shards N --shard I), or copy them there")
    if len(counts) > 1:
        several = " and ".join(f"of {count}" for count in counts)
        raise StoryLLMError(f"{out_dir} has shards {several}, must have those of one number; delete the others")
    folders = [out_dir / f"shard-{shard}-of-{counts[0]}" for shard in range(1, counts[0] + 1)]
    for shard, folder in enumerate(folders, 1):
        if not folder.is_dir():
            raise StoryLLMError(
                f"{folder} is missing; prepare that shard (--shards {counts[0]} --shard {shard}), or copy it there"
            )
    return folders


def _read_shard(folder: Path, split: str) -> ShardInfo:
    """The description of a split of a shard. Raises StoryLLMError unless the shard is complete."""
    path = _path(folder, split)
    description = path.with_suffix(".json")
    if not path.is_file() or not description.is_file():
        raise StoryLLMError(f"{folder} is not complete; prepare that shard again")
    values = read_json(description)
    try:
        info = ShardInfo(**values)
        counts = [info.shard, info.shards, info.vocab_size, info.stories, info.bytes, *info.batch_tokens]
        counts += [info.source_stories, info.source_characters]
        if not all(type(count) is int and count >= 0 for count in counts) or not isinstance(info.request, dict):
            raise TypeError("a value has the wrong type")
        if path.stat().st_size != info.tokens * TOKEN_DTYPE.itemsize:
            raise ValueError("wrong size")
    except (TypeError, ValueError) as error:
        raise StoryLLMError(f"{path} does not match its .json; delete both and prepare that shard again") from error
    return info


def _check_same_data(info: ShardInfo, first: ShardInfo, folder: Path, except_for: tuple[str, ...] = ()) -> None:
    """Raises StoryLLMError unless a shard and the first one belong to the same data, and the folder has its name."""
    if folder.name != f"shard-{info.shard}-of-{info.shards}":
        raise StoryLLMError(f"{folder} holds shard {info.shard} of {info.shards}; rename it, and copy the right one")
    names = {
        "version": "version of StoryLLM",
        "request": "source or setting",
        "source_stories": "source",
        "source_characters": "source",
        "tokenizer_hash": "vocabulary",
    }
    for name, words in names.items():
        if name not in except_for and getattr(info, name) != getattr(first, name):
            raise StoryLLMError(
                f"{folder} was prepared with another {words} than shard 1{_difference(info, first, name)}; prepare all "
                "shards alike (--overwrite)"
            )


def _difference(info: ShardInfo, first: ShardInfo, name: str) -> str:
    """What differs, in parentheses."""
    value, other = getattr(info, name), getattr(first, name)
    if name == "request":
        name = next(key for key in {**value, **other} if value.get(key) != other.get(key))
        value, other = value.get(name), other.get(name)
    if name in ("tokenizer_hash", "fingerprint"):
        return ""
    return f" ({name} {shown(value)} instead of {shown(other)})"


def _merge_split(path: Path, folders: list[Path], shards: list[ShardInfo]) -> TokenFileInfo:
    """Writes the `.bin` and the `.json` of a split: the batches of the shards in turn."""
    digest, shard_digests = hashlib.sha256(), [hashlib.sha256() for _ in shards]
    tokens = sum(shard.tokens for shard in shards)
    with ExitStack() as stack, atomic_write(path) as merged:
        bar = stack.enter_context(ProgressBar(total=tokens, desc=path.stem, unit=" tokens", file=sys.stdout))
        files = [stack.enter_context(open(_path(folder, path.stem), "rb")) for folder in folders]
        for turn in zip_longest(*(shard.batch_tokens for shard in shards), fillvalue=0):
            for batch_tokens, file, shard_digest in zip(turn, files, shard_digests, strict=True):
                encoded = file.read(batch_tokens * TOKEN_DTYPE.itemsize)
                merged.write(encoded)
                digest.update(encoded)
                shard_digest.update(encoded)
                bar.update(batch_tokens)
        for folder, shard, shard_digest in zip(folders, shards, shard_digests, strict=True):
            if shard_digest.hexdigest() != shard.sha256:
                raise StoryLLMError(f"{_path(folder, path.stem)} is corrupted; delete it and prepare that shard again")
        first = shards[0]
        info = TokenFileInfo(
            split=path.stem,
            source=first.source,
            tokenizer=first.tokenizer,
            tokenizer_hash=first.tokenizer_hash,
            vocab_size=first.vocab_size,
            stories=sum(shard.stories for shard in shards),
            tokens=tokens,
            bytes=sum(shard.bytes for shard in shards),
            sha256=digest.hexdigest(),
            request=first.request,
        )
        write_description(path, info)
    return info
