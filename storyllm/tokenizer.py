"""Text <-> token ids: GPT-2's vocabulary, or one trained on the stories, both as one `tiktoken.Encoding`.

Either way every id fits 16 bits, and the last one is the end-of-text token.
"""

from __future__ import annotations

import base64
import hashlib
import re
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tiktoken

from .config import StoryLLMError

END_OF_TEXT = "<|endoftext|>"

# How GPT-2 cuts text into words before any merging (Radford et al. 2019); `tokenizers` has the same rule built in.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


LEARNED_AT_ONCE = 10_000  # characters of a story that a vocabulary is learned from together
MOST_SPACE = 500_000  # characters of white space in a row; tiktoken's search gives up at twice as many


def check_space(text: str, where: str) -> None:
    """Raises StoryLLMError, beginning with `where`, for more white space in a row than tiktoken can encode."""
    if len(text) > MOST_SPACE and (longest := max(map(len, re.findall(r"\s+", text)), default=0)) > MOST_SPACE:
        raise StoryLLMError(f"{where} has {longest:,} spaces in a row, expected {MOST_SPACE:,} at most: take some out")


def gpt2_tokenizer() -> tiktoken.Encoding:
    """GPT-2's vocabulary of 50,257 tokens, from tiktoken's cache or, the first time, from the network.

    Raises StoryLLMError, with what to do, where there is neither.
    """
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # what tiktoken raises comes from whichever library it downloads with
        raise StoryLLMError(
            f"GPT-2's vocabulary is not on this machine and could not be downloaded ({type(error).__name__}): "
            "go online once, or set TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's copy, "
            "or train a vocabulary on the stories instead (tokenizer bpe:4096)"
        ) from error


def train_bpe(stories: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """A byte-level BPE vocabulary (Sennrich et al. 2016) of `vocab_size` tokens, learned from the stories.

    256 bytes, the merges in the order they were learned, and the end-of-text token last. A corpus with too few
    different words gives fewer tokens, with a warning.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # the end-of-text token is ours to add
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # In a thread of its own, because `tokenizers` answers no Ctrl-C: that comes to this one, and ends the stories.
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        learning = pool.submit(learner.train_from_iterator, _pieces(stories, stopped), trainer)
        try:
            learning.result()
        finally:
            stopped.set()
    # Its tokens are written in an alphabet of printable characters, one for each byte; ids follow the order learned.
    byte_of = _printable_bytes()
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(byte_of[character] for character in token) for token, _ in learned if len(token) > 1]
    if len(tokens) + 1 < vocab_size:
        warnings.warn(
            f"the stories give only {len(tokens) + 1} of the {vocab_size} tokens asked for: the vocabulary has those",
            stacklevel=2,
        )
    return _encoding(f"bpe:{vocab_size}", tokens)


def _pieces(stories: Iterable[str], stopped: threading.Event) -> Iterator[str]:
    """The stories, long ones in pieces: the time to learn from a word grows with the square of its length."""
    for story in stories:
        if stopped.is_set():
            return
        yield from (story[start : start + LEARNED_AT_ONCE] for start in range(0, len(story), LEARNED_AT_ONCE))


def _printable_bytes() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where it prints, else the next free one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _encoding(name: str, tokens: list[bytes]) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) != len(tokens) or b"" in ranks or not all(bytes([byte]) in ranks for byte in range(256)):
        raise StoryLLMError("a vocabulary needs all 256 bytes and no token empty or twice: this one is damaged")
    if len(tokens) > 65535:
        raise StoryLLMError(f"the vocabulary has {len(tokens) + 1} tokens, expected at most 65536 (16-bit ids)")
    return tiktoken.Encoding(name, pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(tokens)})


def tokenizer_to_dict(tokenizer: tiktoken.Encoding) -> dict[str, Any]:
    """The whole vocabulary as plain text, for a file or a checkpoint; `tokenizer_from_dict` takes it back."""
    tokens = [tokenizer.decode_single_token_bytes(rank) for rank in range(tokenizer.eot_token)]
    return {"name": tokenizer.name, "tokens": " ".join(base64.b64encode(token).decode() for token in tokens)}


def tokenizer_from_dict(values: dict[str, Any]) -> tiktoken.Encoding:
    """The tokenizer that `tokenizer_to_dict` wrote, without a network. Raises StoryLLMError for anything else."""
    try:
        tokens = [base64.b64decode(token, validate=True) for token in values["tokens"].split(" ")]
        return _encoding(str(values["name"]), tokens)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, StoryLLMError):
            raise
        raise StoryLLMError("this is not a vocabulary that StoryLLM wrote: prepare the data again") from error


def tokenizer_hash(tokenizer: tiktoken.Encoding) -> str:
    """SHA-256 over the tokens in their order: the same for two tokenizers exactly when they give the same ids."""
    return hashlib.sha256(tokenizer_to_dict(tokenizer)["tokens"].encode()).hexdigest()
