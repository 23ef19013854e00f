"""Loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import StoryLLMError
from ..data.token_file import TokenFile, open_token_file
from ..data.tokenizer import tokenizer_hash
from ..data.windows import sequential_windows
from ..device import DeviceConfig
from ..model.decoding import eval_mode
from ..storyteller import Storyteller

# Tokens per forward pass: enough to keep a GPU busy; on a CPU, more would only take memory.
CPU_TOKENS, GPU_TOKENS = 1_024, 16_384


@dataclass(frozen=True)
class Report:
    """The result of `evaluate`. Each token of the file except the first was predicted once."""

    loss: float  # nats per token
    perplexity: float  # exp(loss)
    bits_per_byte: float  # total loss in bits / bytes of text; comparable across vocabularies
    tokens: int  # predicted tokens
    bytes: int  # bytes of text


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """Converts a loss in nats per token, averaged over `tokens` tokens, to bits per byte of their text."""
    return loss * tokens / math.log(2) / max(1, text_bytes)


def open_tokens_of(storyteller: Storyteller, data: str | Path) -> TokenFile:
    """Opens a `.bin` file. Raises StoryLLMError unless it was prepared with the storyteller's tokenizer."""
    tokens = open_token_file(data)
    tokens.check_ids()
    if tokens.info.tokenizer_hash != tokenizer_hash(storyteller.tokenizer):
        raise StoryLLMError(
            f"{data} uses the tokenizer {tokens.info.tokenizer} ({tokens.info.vocab_size} tokens), the model uses "
            f"another, {storyteller.tokenizer.name} ({storyteller.tokenizer.n_vocab}); prepare the data with that one"
        )
    return tokens


@torch.no_grad()
def evaluate(storyteller: Storyteller, data: str | Path) -> Report:
    """The loss over a complete `.bin` file, in float32 and deterministic.

    Windows of `block_size` tokens do not overlap; a token is predicted from the earlier tokens of its window. Raises
    StoryLLMError if the data was prepared with another tokenizer.
    """
    if not isinstance(storyteller, Storyteller):
        raise StoryLLMError(
            f"evaluate got {type(storyteller).__name__}, expected a Storyteller; use storyllm.load(path)"
        )
    tokens = open_tokens_of(storyteller, data)
    if len(tokens.ids) < 2:
        raise StoryLLMError(f"{data} has {len(tokens.ids)} token, needs at least 2; prepare more stories")
    model = storyteller.model
    device, block_size = model.device, model.config.block_size
    nats, predicted = 0.0, 0
    windows_per_batch = max(1, (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS) // block_size)
    with eval_mode(model):
        for x, y in sequential_windows(tokens.ids, block_size, windows_per_batch):
            loss = model.loss(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))
            nats += loss.item() * y.size
            predicted += y.size
    loss_per_token = nats / predicted
    return Report(
        loss=loss_per_token,
        perplexity=math.inf if loss_per_token > 700 else math.exp(loss_per_token),
        bits_per_byte=bits_per_byte(loss_per_token, predicted, tokens.info.bytes),
        tokens=predicted,
        bytes=tokens.info.bytes,
    )


@dataclass(frozen=True)
class StoryLosses:
    """The result of `story_losses`."""

    nats: np.ndarray  # (stories,) the total loss of each story's tokens and its end-of-text token
    tokens: np.ndarray  # (stories,) of them; the first token of the ids is not predicted
    by_position: np.ndarray  # (block_size,) mean loss in nats of a token that has 1, 2, ... tokens before it


@torch.no_grad()
def story_losses(storyteller: Storyteller, ids: np.ndarray, progress: Callable[[int], object]) -> StoryLosses:
    """The losses of `evaluate` for each story, and for each position in the context (Kaplan et al. 2020).

    `progress` is called with the number of tokens predicted since its last call.
    """
    model = storyteller.model
    device, block_size = model.device, model.config.block_size
    windows_per_batch = max(1, CPU_TOKENS // block_size)  # few, since all their logits are in memory
    losses, sums, counts = [], np.zeros(block_size), np.zeros(block_size, int)
    with eval_mode(model):
        for x, y in sequential_windows(ids, block_size, windows_per_batch):
            logits, _ = model(torch.from_numpy(x).to(device))  # (B, T, vocab_size)
            targets = torch.from_numpy(y).to(device).flatten()
            nats = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none").cpu().double().numpy()
            losses.append(nats)
            sums[: y.shape[1]] += nats.reshape(y.shape).sum(0)
            counts[: y.shape[1]] += len(y)
            progress(y.size)
    is_last = ids == storyteller.tokenizer.eot_token
    story = (np.cumsum(is_last) - is_last)[1:]  # the number of the story of each predicted token
    stories = int(is_last.sum())
    with np.errstate(invalid="ignore"):
        by_position = sums / counts  # NaN at positions that no window reaches
    nats = np.bincount(story, np.concatenate(losses), minlength=stories)
    return StoryLosses(nats, np.bincount(story, minlength=stories), by_position)


@torch.no_grad()
def total_loss(
    loss_fn: Callable[[Tensor, Tensor], Tensor], micro_batches: Iterable[tuple[Tensor, Tensor]], device: DeviceConfig
) -> tuple[float, int]:
    """The sum over the windows of their losses in nats per token, and their number. For a model in evaluation mode."""
    total, windows = torch.zeros((), dtype=torch.float32, device=device.device), 0
    for x, y in micro_batches:
        with device.autocast():
            total += loss_fn(x, y) * len(x)
        windows += len(x)
    return total.item(), windows
