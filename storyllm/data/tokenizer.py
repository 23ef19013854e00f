"""Text <-> token ids: GPT-2's vocabulary or a BPE vocabulary trained on the stories, as a `tiktoken.Encoding`.

Every id fits in 16 bits, and the last one is the end-of-text token.
"""

from __future__ import annotations

import base64
import hashlib
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import tiktoken

from ..config import StoryLLMError
from .formats import END_OF_TEXT

# GPT-2's pretokenization (Radford et al. 2019). The ByteLevel pretokenizer of `tokenizers` uses the same pattern.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TRAINING_CHUNK = 10_000  # characters; longer stories are split for BPE training


def gpt2_tokenizer() -> tiktoken.Encoding:
    """GPT-2's vocabulary of 50,257 tokens, from tiktoken's cache or downloaded on first use.

    Raises StoryLLMError if it is not cached and cannot be downloaded.
    """
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # the type depends on the library that tiktoken downloads with
        raise StoryLLMError(
            f"GPT-2's vocabulary is not cached and cannot be downloaded ({type(error).__name__}); connect to the "
            "network once, set TIKTOKEN_CACHE_DIR to a folder with tiktoken's cache, or train a vocabulary instead "
            "(tokenizer bpe:4096)"
        ) from error


def train_bpe(stories: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """Trains a byte-level BPE vocabulary (Sennrich et al. 2016) of `vocab_size` tokens on the stories.

    Ids are the 256 bytes, then the merges in the order they were learned, then the end-of-text token. Warns if the
    stories are too few for `vocab_size` tokens; the vocabulary is then smaller.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # without the end-of-text token
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # `tokenizers` ignores Ctrl-C while it trains. In another thread, the main thread gets KeyboardInterrupt and ends
    # the training by ending its input.
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:  # around `submit` too: an interrupt may arrive when the thread has already started
            training = pool.submit(bpe.train_from_iterator, _chunks(stories, stopped), trainer)
            while not training.done():  # not only `result`: a signal just before an unlimited wait does not end it
                wait([training], timeout=0.1)
            training.result()
        finally:
            stopped.set()
    tokens = _token_bytes(bpe.get_vocab())
    if len(tokens) + 1 < vocab_size:
        warnings.warn(
            f"the stories yield a vocabulary of only {len(tokens) + 1} tokens instead of {vocab_size}", stacklevel=2
        )
    return tokenizer_of(f"bpe:{vocab_size}", tokens)


def _chunks(stories: Iterable[str], stopped: threading.Event) -> Iterator[str]:
    """The stories, long ones split: the time that BPE training spends on a word is quadratic in its length."""
    for story in stories:
        if stopped.is_set():
            return
        yield from (story[start : start + TRAINING_CHUNK] for start in range(0, len(story), TRAINING_CHUNK))


def _token_bytes(vocabulary: dict[str, int]) -> list[bytes]:
    """The bytes of each token: the 256 single bytes in order, then the tokens of `vocabulary` that a merge created."""
    byte_of = byte_of_character()
    learned = sorted(vocabulary, key=vocabulary.__getitem__)
    merged = [bytes(byte_of[character] for character in token) for token in learned if len(token) > 1]
    return [bytes([byte]) for byte in range(256)] + merged


def byte_of_character() -> dict[str, int]:
    """GPT-2's printable character for each byte -> that byte.

    A printable byte stands for itself. The others are assigned the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def tokenizer_of(name: str, tokens: list[bytes]) -> tiktoken.Encoding:
    """The tokenizer whose token i is `tokens[i]`, followed by the end-of-text token.

    Raises StoryLLMError unless the tokens are different and include all 256 bytes.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) != len(tokens) or b"" in ranks or not all(bytes([byte]) in ranks for byte in range(256)):
        raise StoryLLMError(
            "the vocabulary is corrupted (a token is empty, duplicated or missing); prepare the data again"
        )
    if len(tokens) > 65535:
        raise StoryLLMError(f"the vocabulary has {len(tokens) + 1} tokens, must have at most 65536 (16-bit ids)")
    return tiktoken.Encoding(
        name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(tokens)}
    )


def tokenizer_to_dict(tokenizer: tiktoken.Encoding) -> dict[str, Any]:
    """The complete vocabulary as plain text, for a JSON file or a checkpoint."""
    tokens = [tokenizer.decode_single_token_bytes(rank) for rank in range(tokenizer.eot_token)]
    return {"name": tokenizer.name, "tokens": " ".join(base64.b64encode(token).decode() for token in tokens)}


def tokenizer_from_dict(values: dict[str, Any]) -> tiktoken.Encoding:
    """The tokenizer from `tokenizer_to_dict`, without network access. Raises StoryLLMError for any other dictionary."""
    try:
        tokens = [base64.b64decode(token, validate=True) for token in values["tokens"].split(" ")]
        return tokenizer_of(str(values["name"]), tokens)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise StoryLLMError("the vocabulary was not written by StoryLLM; prepare the data again") from error


def tokenizer_hash(tokenizer: tiktoken.Encoding) -> str:
    """SHA-256 of the tokens in order. Two tokenizers have the same hash exactly when they produce the same ids."""
    return hashlib.sha256(tokenizer_to_dict(tokenizer)["tokens"].encode()).hexdigest()
