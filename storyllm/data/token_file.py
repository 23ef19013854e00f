"""The format of prepared data: a `.bin` of token ids with a `.json` that describes it, and the vocabulary.

A `.bin` is an array of little-endian uint16 without a header. A data folder holds `train.bin`, `validation.bin`, the
`.json` of each, and `vocabulary.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from ..config import DataConfig, StoryLLMError
from ..files import os_error, read_json, sha256
from .stories import SPLITS
from .tokenizer import tokenizer_from_dict, tokenizer_hash

VOCABULARY = "vocabulary.json"
TOKEN_DTYPE = np.dtype("<u2")
CHUNK_TOKENS = 1 << 24  # tokens per chunk when a complete file is read, which bounds memory


@dataclass(frozen=True)
class TokenFileInfo:
    """The description of a `.bin`, stored in the `.json` next to it."""

    split: str
    source: str
    tokenizer: str
    tokenizer_hash: str  # SHA-256 of the vocabulary
    vocab_size: int
    stories: int
    tokens: int  # including one end-of-text token per story
    bytes: int  # of UTF-8 text, without the end-of-text tokens
    sha256: str  # of the .bin
    request: dict[str, Any]  # the settings that `prepare` was called with, and the source's fingerprint


@dataclass(frozen=True)
class TokenFile:
    """An open `.bin`: its memory-mapped token ids and its description."""

    path: Path
    info: TokenFileInfo
    ids: np.ndarray  # (info.tokens,) uint16

    def check_ids(self, ids: np.ndarray | None = None) -> None:
        """Raises StoryLLMError if some of these ids, by default all of the file, are not in the vocabulary."""
        chunks = _chunks(self.ids) if ids is None else [ids]
        largest = max(int(chunk.max()) for chunk in chunks)
        if largest >= self.info.vocab_size:
            raise StoryLLMError(
                f"{self.path} has token id {largest}, must be less than its vocab_size ({self.info.vocab_size}); "
                "prepare the data again"
            )


@dataclass(frozen=True)
class PreparedData:
    """The descriptions of both splits of a data folder."""

    train: TokenFileInfo
    validation: TokenFileInfo


@dataclass(frozen=True)
class Dataset:
    """Both splits of a data folder and their tokenizer. `dataset["train"]` is `dataset.train`.

    `original` is the validation split of other data: what a model was trained on before its fine-tuning.
    """

    train: TokenFile
    validation: TokenFile
    tokenizer: tiktoken.Encoding
    original: TokenFile | None = None

    def __getitem__(self, split: str) -> TokenFile:
        return {"train": self.train, "validation": self.validation}[split]

    @property
    def sha256(self) -> dict[str, str]:
        """The checksum of each split's `.bin`."""
        return {split: self[split].info.sha256 for split in SPLITS}

    @property
    def config(self) -> DataConfig:
        """The DataConfig that the data was prepared with. Raises StoryLLMError if the `.json` holds an invalid one."""
        info = self.train.info
        settings = {name: value for name, value in info.request.items() if name != "fingerprint"}
        try:
            return DataConfig(source=info.source, **settings)
        except (TypeError, StoryLLMError) as error:
            raise _corrupted(self.train.path.with_suffix(".json")) from error


def open_dataset(data_dir: str | Path, original_data_dir: str | Path | None = None) -> Dataset:
    """Opens the data that `prepare` wrote to a folder, and the validation split in `original_data_dir`, if given.

    Raises StoryLLMError if a file is missing or corrupted, or if the files were not prepared together, or the original
    data with another tokenizer.
    """
    data_dir = Path(data_dir)
    train, validation = (open_token_file(data_dir / f"{split}.bin") for split in SPLITS)
    original = None if original_data_dir is None else open_token_file(Path(original_data_dir) / "validation.bin")
    dataset = Dataset(train, validation, load_tokenizer(data_dir), original)
    _check_prepared_together(dataset)
    if original is not None and original.info.tokenizer_hash != train.info.tokenizer_hash:
        raise StoryLLMError(
            f"{original.path} uses the tokenizer {original.info.tokenizer}, {train.path} another, "
            f"{train.info.tokenizer}; prepare both with the same one (--tokenizer-from)"
        )
    return dataset


def open_token_file(path: str | Path) -> TokenFile:
    """Opens a `.bin` and checks its size against its `.json`.

    Takes the same time and memory for any size: the ids are memory-mapped, and whoever reads them checks them
    (`check_ids`). Raises StoryLLMError if the file is missing or does not match its description.
    """
    path = Path(path)
    if path.suffix != ".bin":
        raise StoryLLMError(f"{path} is not a .bin; pass one that `storyllm prepare` wrote")
    _check_exists(path)
    size = path.stat().st_size
    if size % TOKEN_DTYPE.itemsize:
        raise StoryLLMError(f"{path} has {size} bytes, must be an even number (16-bit ids); prepare the data again")
    info = read_info(path)
    tokens = size // TOKEN_DTYPE.itemsize
    if tokens != info.tokens or not tokens:
        raise StoryLLMError(
            f"{path} has {tokens:,} tokens, must have {info.tokens:,} according to its .json; prepare the data again"
        )
    try:
        ids = np.memmap(path, dtype=TOKEN_DTYPE, mode="r")
    except OSError as error:
        raise os_error("read", path, error) from error
    return TokenFile(path, info, ids)


def read_info(path: str | Path) -> TokenFileInfo:
    """The description of a `.bin`, from the `.json` next to it. Raises StoryLLMError if it is missing or corrupted."""
    path = Path(path).with_suffix(".json")
    _check_exists(path)
    values = read_json(path)
    try:
        info = TokenFileInfo(**values)
        _check_info(info)
    except (TypeError, ValueError) as error:
        raise _corrupted(path) from error
    return info


def load_tokenizer(data_dir: str | Path) -> tiktoken.Encoding:
    """The tokenizer of the data in a folder. Raises StoryLLMError if its vocabulary file is missing or corrupted."""
    path = Path(data_dir) / VOCABULARY
    _check_exists(path)
    values = read_json(path)
    try:
        return tokenizer_from_dict(values)
    except StoryLLMError as error:
        raise _corrupted(path) from error


def verify(data_dir: str | Path) -> PreparedData:
    """Reads all the data in a folder and checks every count and checksum.

    Raises StoryLLMError, naming the first file that is missing or corrupted.
    """
    dataset = open_dataset(data_dir)
    for split in SPLITS:
        _check_contents(dataset[split], dataset.tokenizer)
    return PreparedData(dataset.train.info, dataset.validation.info)


def _check_contents(tokens: TokenFile, tokenizer: tiktoken.Encoding) -> None:
    tokens.check_ids()
    lengths = [len(tokenizer.decode_single_token_bytes(token)) for token in range(tokenizer.eot_token)]
    bytes_per_token = np.array([*lengths, 0])  # the end-of-text token is not part of the text
    found = {
        "sha256": sha256(tokens.path),
        "stories": sum(int((chunk == tokenizer.eot_token).sum()) for chunk in _chunks(tokens.ids)),
        "bytes": sum(int(bytes_per_token[chunk].sum()) for chunk in _chunks(tokens.ids)),
    }
    for name, value in found.items():
        expected = getattr(tokens.info, name)
        if value != expected:
            raise StoryLLMError(
                f"{tokens.path} is corrupted: its {name} is {value}, must be {expected} according to its .json; "
                "delete it and prepare the data again"
            )


def _check_prepared_together(dataset: Dataset) -> None:
    """Raises StoryLLMError unless both splits were prepared with this vocabulary and by the same request."""
    expected_hash = tokenizer_hash(dataset.tokenizer)
    for split in SPLITS:
        path, info = dataset[split].path, dataset[split].info
        if info.split != split or info.tokenizer_hash != expected_hash:
            raise StoryLLMError(f"{path} was not prepared with the {VOCABULARY} next to it; prepare the data again")
        if info.request != dataset.train.info.request:
            raise StoryLLMError(
                f"{path} was not prepared together with train.bin; prepare the data again (--overwrite)"
            )


def _check_info(info: TokenFileInfo) -> None:
    """Raises ValueError or TypeError if no data can have this description."""
    counts = (info.vocab_size, info.stories, info.tokens, info.bytes)
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        raise TypeError("a count is not an integer from 0 to 2**63 - 1")
    if not 257 <= info.vocab_size <= 65536 or not 1 <= info.stories <= info.tokens or info.split not in SPLITS:
        raise ValueError("a value is out of range")
    if not all(re.fullmatch("[0-9a-f]{64}", digits) for digits in (info.tokenizer_hash, info.sha256)):
        raise ValueError("a checksum is not 64 hexadecimal digits")
    if not isinstance(info.request, dict) or not isinstance(info.source, str) or not isinstance(info.tokenizer, str):
        raise TypeError("a value has the wrong type")


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise StoryLLMError(f"{path} not found; prepare the data (`storyllm prepare`), or pass the folder that has it")


def _corrupted(path: Path) -> StoryLLMError:
    return StoryLLMError(f"{path} is corrupted or was not written by StoryLLM; prepare the data again")


def _chunks(ids: np.ndarray) -> Iterator[np.ndarray]:
    """All the ids in bounded chunks."""
    return (ids[start : start + CHUNK_TOKENS] for start in range(0, len(ids), CHUNK_TOKENS))
