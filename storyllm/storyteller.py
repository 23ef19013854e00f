"""A model and its tokenizer: text in, text out."""

from __future__ import annotations

import codecs
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import overload

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

from .config import StoryLLMError, plain_number, shown
from .data.stories import check_whitespace
from .data.windows import sequential_windows
from .device import cpu_has, resolve_device
from .importing import load_model
from .model.decoding import decode, eval_mode
from .model.gpt import GPT
from .model.quantization import convert_linear_layers
from .model.sampling import check_sampling

MIN_INT8_PARAMETERS = 5_000_000  # the weights of smaller models fit in a CPU's cache, and float32 is faster
DEFAULT_MAX_NEW_TOKENS = 500  # nearly all stories of TinyStories and of the synthetic generator are shorter


class UnfinishedStory(UserWarning):
    """`max_new_tokens` truncated a story."""


@dataclass(frozen=True)
class Score:
    """The result of `Storyteller.score`: three lists with an entry for each token of the text."""

    ids: list[int]
    tokens: list[str]  # the text of each token; bytes that are only part of a character are replaced
    log_probs: list[float]  # natural logarithms of the probabilities (nats)


class Storyteller:
    """Generates stories. `model` and `tokenizer` are public. Raises StoryLLMError if their vocabularies differ."""

    def __init__(self, model: GPT, tokenizer: tiktoken.Encoding) -> None:
        if model.config.vocab_size != tokenizer.n_vocab:
            raise StoryLLMError(
                f"the tokenizer has {tokenizer.n_vocab} tokens, the model {model.config.vocab_size}; "
                "use the model's own tokenizer"
            )
        self.model = model
        self.tokenizer = tokenizer

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is also a sequence of str; the first overload applies
        self,
        prompt: str = ...,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: Sequence[str],
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
    ) -> list[str]: ...
    def generate(
        self,
        prompt: str | Sequence[str] = "",
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> str | list[str]:
        """A story that begins with `prompt`. A list of prompts is decoded as one batch and gives a list of stories.

        With an empty prompt the model starts from the end-of-text token. A story ends at the end-of-text token or after
        `max_new_tokens`. `seed` makes it repeatable on the same machine. For temperature, top_k and top_p see
        `next_token_probs`. Raises StoryLLMError if a parameter is invalid. Warns if a prompt exceeds the context, or if
        `max_new_tokens` truncated a story.
        """
        if not isinstance(prompt, (str, list, tuple)):
            raise StoryLLMError(f"prompt is {type(prompt).__name__}, must be a string or a list of strings")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        stories = [""] * len(prompts)
        for row, piece in self._pieces(prompts, max_new_tokens, temperature, top_k, top_p, seed):
            stories[row] += piece
        return stories[0] if isinstance(prompt, str) else stories

    def stream(
        self,
        prompt: str = "",
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Yields the story that `generate` returns in pieces: first the prompt, then the text of each new token."""
        for _, piece in self._pieces([prompt], max_new_tokens, temperature, top_k, top_p, seed):
            yield piece

    @torch.no_grad()
    def score(self, text: str) -> Score:
        """The log-probability of each token of `text`, given the tokens before it, in nats.

        The first token is predicted from the end-of-text token, as at the start of a story. As in `evaluate`, windows
        of `block_size` tokens do not overlap: beyond the context, a token is predicted from the earlier tokens of its
        window. Raises StoryLLMError if `text` is not a string.
        """
        if not isinstance(text, str):
            raise StoryLLMError(f"text is {type(text).__name__}, must be a string")
        check_whitespace(text, "the text")
        ids = self.tokenizer.encode_ordinary(text)
        device, log_probs = self.model.device, []
        windows = sequential_windows(np.array([self.tokenizer.eot_token, *ids]), self.model.config.block_size, 1)
        with eval_mode(self.model):
            for x, y in windows:  # (1, T) each
                logits, _ = self.model(torch.from_numpy(x).to(device))
                targets = torch.from_numpy(y).to(device)
                log_probs += (-F.cross_entropy(logits[0].float(), targets[0], reduction="none")).tolist()
        tokens = [self.tokenizer.decode_single_token_bytes(i).decode("utf-8", "replace") for i in ids]
        return Score(ids, tokens, log_probs)

    def _pieces(
        self,
        prompts: list[str],
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seed: int | None,
    ) -> Iterator[tuple[int, str]]:
        """Yields (row, text): all prompts first, then the text of each new token. All rows advance in one batch."""
        max_new_tokens, seed = plain_number(max_new_tokens), plain_number(seed)
        _check_arguments(prompts, max_new_tokens, seed)
        check_sampling(temperature, top_k, top_p)
        device = self.model.device
        generator = torch.Generator(device=device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        rows = [self._encode_prompt(prompt) for prompt in prompts]
        yield from ((row, prompt) for row, prompt in enumerate(prompts) if prompt)
        if not prompts or max_new_tokens == 0:
            return
        # Decoding starts where the shortest prompt ends. The rest of the longer ones is forced.
        start, longest = min(map(len, rows)), max(map(len, rows))
        idx = torch.tensor([row[:start] for row in rows], device=device)
        forced = torch.full((longest, len(rows)), -1, device=device)
        for row, ids in enumerate(rows):
            forced[: len(ids), row] = torch.tensor(ids, device=device)
        # A character may span several tokens: an incremental decoder holds its bytes back until it is complete.
        decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in rows]
        ends = [len(ids) + max_new_tokens for ids in rows]
        unfinished, truncated = set(range(len(rows))), 0
        steps = longest - start + max_new_tokens
        new_ids = decode(self.model, idx, steps, temperature, top_k, top_p, generator, forced=forced[start:])
        for position, next_ids in enumerate(new_ids, start):
            for row, token in enumerate(next_ids.tolist()):
                if row not in unfinished or position < len(rows[row]):
                    continue
                is_eot = token == self.tokenizer.eot_token
                text = b"" if is_eot else self.tokenizer.decode_single_token_bytes(token)
                is_last = is_eot or position + 1 == ends[row]
                if piece := decoders[row].decode(text, final=is_last):
                    yield row, piece
                if is_last:
                    unfinished.discard(row)
                    truncated += not is_eot
            if not unfinished:
                break
        if truncated:
            subject = "the story" if len(rows) == 1 else f"{truncated} of {len(rows)} stories"
            message = f"{subject} did not end within max_new_tokens ({max_new_tokens}); raise it"
            warnings.warn(message, UnfinishedStory, stacklevel=3)

    def _encode_prompt(self, prompt: str) -> list[int]:
        ids = self.tokenizer.encode_ordinary(prompt) or [self.tokenizer.eot_token]
        block_size = self.model.config.block_size
        if len(ids) > block_size:
            warnings.warn(
                f"the prompt has {len(ids)} tokens, the model reads only the last {block_size} (block_size)",
                stacklevel=4,
            )
        return ids[-block_size:]


def _check_arguments(prompts: list[str], max_new_tokens: int, seed: int | None) -> None:
    """Raises StoryLLMError for an invalid argument, before the first token is generated."""
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise StoryLLMError(f"a prompt is {type(prompt).__name__}, must be a string")
        check_whitespace(prompt, "the prompt")
    if type(max_new_tokens) is not int or max_new_tokens < 0:
        raise StoryLLMError(f"max_new_tokens is {shown(max_new_tokens)}, must be an integer of at least 0")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise StoryLLMError(f"seed is {shown(seed)}, must be an integer from 0 to 2**63 - 1, or None")


def wrap(pieces: Iterable[str], width: int) -> Iterator[str]:
    """Breaks lines after at most `width` characters, at spaces. Yields each word as soon as it is complete.

    `pieces` are those of `Storyteller.stream`, or a list with a whole story. Text without spaces is not broken.
    """
    # A word, with the spaces before it, is complete when a space follows it or it fills a line, and at the end.
    complete = re.compile(rf"[ \n]*(?:[^ \n]{{{max(width, 1)},}}|[^ \n]+(?=[ \n]))")
    column, text = 0, ""
    for piece in chain(pieces, [None]):
        text += piece or ""
        words = re.findall(r"[ \n]*[^ \n]+|[ \n]+", text) if piece is None else complete.findall(text)
        text = text[sum(map(len, words)) :]
        for word in words:
            if word.startswith(" ") and word.strip() and "\n" not in word and column + len(word) > width:
                word = "\n" + word.lstrip(" ")
            column = len(word.rpartition("\n")[2]) + (0 if "\n" in word else column)
            yield word


def load(path: str | Path, device: str = "auto", weights: str = "float32") -> Storyteller:
    """The storyteller in a checkpoint (`best_model_params.pt` or `last.pt`). The file is all it needs.

    `path` may also be a run's folder, a GPT-2 model in Hugging Face's format (a folder, or OWNER/NAME on the Hub) or a
    checkpoint of nanoGPT (see `load_model`).
    With `weights` "int8" or "bfloat16", the linear layers have weights in that format, for faster generation on a CPU
    (see `convert_linear_layers`). "auto" is "int8" for a large model on a CPU with VNNI, otherwise "float32".
    Raises StoryLLMError if the file is missing, corrupted, or in another format, or the device is unavailable.
    """
    model, tokenizer, _ = load_model(path)
    model = model.to(resolve_device(device))
    if weights == "auto":
        large = model.num_parameters() >= MIN_INT8_PARAMETERS
        weights = "int8" if model.device.type == "cpu" and large and cpu_has("avx512_vnni", "avx_vnni") else "float32"
    if weights != "float32":
        convert_linear_layers(model, weights)
    return Storyteller(model, tokenizer)
