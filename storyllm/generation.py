"""A model and its tokenizer: the storyteller."""

from __future__ import annotations

import codecs
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import tiktoken
import torch

from .checkpoint import load_checkpoint, restore_model
from .config import StoryLLMError
from .device import choose_device
from .model import GPT
from .sampling import check_sampling
from .tokenizer import check_space


class Storyteller:
    """Tells stories. `model` and `tokenizer` are what it is made of, for those who want to look closer."""

    def __init__(self, model: GPT, tokenizer: tiktoken.Encoding) -> None:
        if model.config.vocab_size != tokenizer.n_vocab:
            raise StoryLLMError(
                f"the model has {model.config.vocab_size} tokens, the tokenizer {tokenizer.n_vocab}: take its own"
            )
        self.model = model
        self.tokenizer = tokenizer

    @overload
    def tell(  # type: ignore[overload-overlap]  # a str is a sequence of str, too: the first that fits counts
        self,
        prompt: str = ...,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
    ) -> str: ...
    @overload
    def tell(
        self,
        prompt: Sequence[str],
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
    ) -> list[str]: ...
    def tell(
        self,
        prompt: str | Sequence[str] = "",
        max_new_tokens: int = 200,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> str | list[str]:
        """A story that begins with `prompt`: text in, text out; several prompts at once give a list of stories.

        An empty prompt starts a story afresh. A story ends at the end-of-text token or after `max_new_tokens`.
        `seed` makes it repeatable on the same machine; temperature, top_k, top_p: see `next_token_probs`.
        Raises StoryLLMError for a value out of range. Warns where a prompt is longer than the context.
        """
        if not isinstance(prompt, (str, list, tuple)):
            raise StoryLLMError(f"prompt is {type(prompt).__name__}, expected text or a list of texts")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        stories = [""] * len(prompts)
        for row, piece in self._pieces(prompts, max_new_tokens, temperature, top_k, top_p, seed):
            stories[row] += piece
        return stories[0] if isinstance(prompt, str) else stories

    def stream(
        self,
        prompt: str = "",
        max_new_tokens: int = 200,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """The same story as `tell`, piece by piece as it is made: first the prompt, then a token's text at a time."""
        for _, piece in self._pieces([prompt], max_new_tokens, temperature, top_k, top_p, seed):
            yield piece

    def _pieces(
        self,
        prompts: list[str],
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seed: int | None,
    ) -> Iterator[tuple[int, str]]:
        """(row, text) as the stories grow, their prompts first; rows of several advance together, a token each."""
        _check_telling(prompts, max_new_tokens, seed)
        check_sampling(temperature, top_k, top_p)
        if not prompts:
            return
        device = self.model.lm_head.weight.device
        generator = torch.Generator(device=device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        rows = [self._prompt_ids(prompt) for prompt in prompts]
        yield from ((row, prompt) for row, prompt in enumerate(prompts) if prompt)
        # Rows advance from the shortest prompt's end. A longer prompt's own tokens take the place of drawn ones.
        start, end = min(map(len, rows)), max(map(len, rows)) + max_new_tokens
        idx = torch.tensor([row[:start] for row in rows], device=device)
        forced = torch.full((end, len(rows)), -1, device=device)
        for row, ids in enumerate(rows):
            forced[: len(ids), row] = torch.tensor(ids, device=device)
        # A character can be spread over several tokens: its text comes when it is whole.
        decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in rows]
        ends = [len(ids) + max_new_tokens for ids in rows]
        telling = set(range(len(rows)))
        new_ids = self.model.stream(idx, end - start, temperature, top_k, top_p, generator, forced=forced[start:])
        for position, next_ids in enumerate(new_ids, start):
            for row, token in enumerate(next_ids.tolist()):
                if row not in telling or position < len(rows[row]):
                    continue
                over = token == self.tokenizer.eot_token
                text = b"" if over else self.tokenizer.decode_single_token_bytes(token)
                last = over or position + 1 == ends[row]
                if piece := decoders[row].decode(text, final=last):
                    yield row, piece
                if last:
                    telling.discard(row)
            if not telling:
                return

    def _prompt_ids(self, prompt: str) -> list[int]:
        ids = self.tokenizer.encode_ordinary(prompt) or [self.tokenizer.eot_token]
        context = self.model.config.block_size
        if len(ids) > context:
            warnings.warn(
                f"prompt has {len(ids)} tokens, the context is {context}: it is cut to its last {context}", stacklevel=4
            )
        return ids[-context:]


def _check_telling(prompts: list[str], max_new_tokens: int, seed: int | None) -> None:
    """Raises StoryLLMError for what no story can be told with, before the first word of it is out."""
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise StoryLLMError(f"a prompt is {type(prompt).__name__}, expected text")
        check_space(prompt, "a prompt")
    if type(max_new_tokens) is not int or max_new_tokens < 0:
        raise StoryLLMError(f"max_new_tokens is {max_new_tokens}, expected a whole number of at least 0")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise StoryLLMError(f"seed is {seed!r}, expected a whole number from 0 to 2**63 - 1, or None")


def load(path: str | Path, device: str = "auto") -> Storyteller:
    """The storyteller in a checkpoint (`best_model_params.pt` or `last.pt`), on the best device here.

    Needs nothing but the file. Raises StoryLLMError if it is missing, damaged or not one of ours.
    """
    model, tokenizer, _ = restore_model(load_checkpoint(path), path)
    return Storyteller(model.to(choose_device(device)), tokenizer)
