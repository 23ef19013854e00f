"""How good the model is: loss over a whole file, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import StoryLLMError
from .device import Machine
from .generation import Storyteller
from .tokenizer import tokenizer_hash
from .tokens import open_tokens, sequential_windows

# Tokens that are read together: more keeps a GPU busy, and would only take memory from a CPU.
CPU_TOKENS, GPU_TOKENS = 1_024, 16_384


@dataclass(frozen=True)
class Report:
    """What `evaluate` found. Every token of the file but the first was predicted once."""

    loss: float  # nats per token
    perplexity: float  # exp(loss)
    bits_per_byte: float  # all the nats, in bits, over the bytes of text: comparable between vocabularies
    tokens: int  # predicted
    bytes: int  # of text


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """Loss in nats per token over `tokens` tokens, as bits per byte of the text that they stand for."""
    return loss * tokens / math.log(2) / max(1, text_bytes)


@torch.no_grad()
def evaluate(teller: Storyteller, data: str | Path) -> Report:
    """Reads the whole of a `.bin` once, in float32: deterministic, the same on every call.

    Windows of the model's context do not overlap; each token is predicted from those before it in its window.
    Raises StoryLLMError if the data was made with another tokenizer than the model's.
    """
    if not isinstance(teller, Storyteller):
        raise StoryLLMError(
            f"evaluate was given a {type(teller).__name__}, expected a Storyteller: storyllm.load(path)"
        )
    tokens = open_tokens(data)
    if tokens.info.tokenizer_hash != tokenizer_hash(teller.tokenizer):
        raise StoryLLMError(
            f"{data} was made with the tokenizer {tokens.info.tokenizer} ({tokens.info.vocab_size} tokens), "
            f"the model's is another, {teller.tokenizer.name} ({teller.tokenizer.n_vocab}): prepare the data with it"
        )
    if len(tokens.ids) < 2:
        raise StoryLLMError(f"{data} has {len(tokens.ids)} token, expected at least 2: prepare more stories")
    device, block_size = teller.model.lm_head.weight.device, teller.model.config.block_size
    was_training = teller.model.training
    teller.model.eval()
    nats, predicted = 0.0, 0
    windows_at_once = max(1, (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS) // block_size)
    for x, y in sequential_windows(tokens.ids, block_size, windows_at_once):
        loss = teller.model.loss(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))
        nats += loss.item() * y.size
        predicted += y.size
    teller.model.train(was_training)
    loss_per_token = nats / predicted
    return Report(
        loss=loss_per_token,
        perplexity=math.exp(loss_per_token) if loss_per_token < 700 else math.inf,
        bits_per_byte=bits_per_byte(loss_per_token, predicted, tokens.info.bytes),
        tokens=predicted,
        bytes=tokens.info.bytes,
    )


@torch.no_grad()
def mean_loss(
    loss_of: Callable[[Tensor, Tensor], Tensor], micro_batches: Iterable[tuple[Tensor, Tensor]], machine: Machine
) -> float:
    """Mean loss in nats per token over all the windows, each weighing the same; the model is in evaluation mode."""
    total, windows = torch.zeros((), device=machine.device), 0
    for x, y in micro_batches:
        with machine.autocast():
            total += loss_of(x, y) * len(x)
        windows += len(x)
    return total.item() / windows
