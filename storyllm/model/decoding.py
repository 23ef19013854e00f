"""The decoding loop: prompt in, tokens out as they are generated."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import GPTConfig, StoryLLMError
from .kv_cache import KVCache, StaticKVCache
from .sampling import check_sampling, sample_next

# Capturing a CUDA graph costs about as much as this many steps save.
MIN_GRAPH_STEPS = 32


class LanguageModel(Protocol):
    """What decoding needs of a model."""

    config: GPTConfig
    training: bool

    def eval(self) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def parameters(self) -> Iterator[Any]: ...
    def next_logits(self, idx: Tensor, cache: KVCache | None = None) -> Tensor: ...


def check_ids(idx: Tensor) -> None:
    """Raises StoryLLMError unless `idx` has the shape (B, T) with T of at least 1."""
    if idx.ndim != 2 or idx.size(1) == 0:
        raise StoryLLMError(f"idx has shape {tuple(idx.shape)}, must be (B, T) with T of at least 1")


@torch.inference_mode()
def decode(
    model: LanguageModel,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    forced: Tensor | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yields (B,) new ids, `max_new_tokens` times, for (B, T) prompts. Dropout is off, in any mode of the model.

    Non-negative ids in `forced`, (steps, B) for the first steps, replace sampled ones. With it, prompts of different
    lengths are decoded in one batch.

    Within the context a token costs one step with the KV cache. Beyond it, each new token shifts all positions, so the
    last `block_size` tokens are read again. `use_cache=False` always does that. Raises StoryLLMError if a parameter is
    invalid.
    """
    temperature, top_k, top_p = check_sampling(temperature, top_k, top_p)
    check_ids(idx)
    block_size = model.config.block_size
    step = _CachedStep(model, idx, max_new_tokens) if use_cache else None
    for i in range(max_new_tokens):
        with eval_mode(model):
            if step is not None and idx.size(1) <= block_size:
                logits = step(idx)  # (B, vocab_size)
            else:
                logits = model.next_logits(idx[:, -block_size:])
        next_ids = sample_next(logits, temperature, top_k, top_p, generator)
        if forced is not None and i < len(forced):
            next_ids = torch.where(forced[i] >= 0, forced[i], next_ids)
        # One id more than the context tells that the context is exceeded; earlier ones are never read again.
        idx = torch.cat([idx, next_ids[:, None]], dim=1)[:, -(block_size + 1) :]
        yield next_ids


class _CachedStep:
    """Computes the logits after (B, T) ids that grow by one token per call.

    The first call reads the prompt. On a CUDA GPU, long generations then replay a graph of one step.
    """

    def __init__(self, model: LanguageModel, prompt: Tensor, max_new_tokens: int) -> None:
        self.model = model
        weight = next(model.parameters())
        self.cache = KVCache(model.config, prompt.size(0), prompt.device, weight.dtype)
        steps = min(max_new_tokens, model.config.block_size - prompt.size(1))
        self.use_graph = prompt.device.type == "cuda" and steps >= MIN_GRAPH_STEPS
        self.graph: Callable[[], Tensor] | None = None

    def __call__(self, idx: Tensor) -> Tensor:
        if not self.use_graph or not self.cache.length:
            return self.model.next_logits(idx[:, self.cache.length :], self.cache)
        if self.graph is None:
            self.last_ids = idx[:, -1:].clone()  # the graph's input
            self.static_cache = StaticKVCache(self.cache)
            self.graph = capture_graph(lambda: self.model.next_logits(self.last_ids, self.static_cache), idx.device)
        self.last_ids.copy_(idx[:, -1:])
        self.static_cache.position.fill_(idx.size(1) - 1)
        return self.graph()


@contextlib.contextmanager
def eval_mode(model: LanguageModel) -> Iterator[None]:
    """Dropout is off in this block."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device: CUDA libraries keep a workspace for each stream they have been used on."""
    return torch.cuda.Stream(device)


def capture_graph(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`step` as a CUDA graph, which replaces hundreds of kernel launches by one.

    `step` must be repeatable and use the same memory for inputs and outputs each time. If the capture fails, warns and
    returns `step` itself.
    """
    stream = _capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):  # also makes `device` current
            for _ in range(2):  # warm up: libraries select kernels and allocate workspaces
                step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = step()
    except RuntimeError as error:
        warnings.warn(f"CUDA graph capture failed ({str(error).splitlines()[0]}), decoding without it", stacklevel=2)
        return step
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
