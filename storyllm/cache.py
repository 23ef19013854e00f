"""What a model keeps of the tokens it has read, so that the next one costs one step."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .config import GPTConfig


class KVCache:
    """Keys and values of the tokens seen so far, for each layer: room for (B, H, block_size, D) each."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.data = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held

    def positions(self, T: int) -> Tensor:
        """Where the next T tokens stand: (T,)."""
        return torch.arange(self.length, self.length + T, device=self.data.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the (B, H, T, D) keys and values of the next T tokens; returns all of this layer's so far."""
        end = self.length + k.size(2)
        self.data[layer, 0, :, :, self.length : end] = k
        self.data[layer, 1, :, :, self.length : end] = v
        return self.data[layer, 0, :, :, :end], self.data[layer, 1, :, :, :end]

    def advance(self, T: int) -> None:
        """T tokens more have gone through all the layers."""
        self.length += T

    def mask(self, T: int) -> Tensor | None:
        """Which of the keys that `append` returns each of the T queries may see: (T, S), or None for all before it."""
        if T == 1 or not self.length:
            return None
        S = self.length + T
        return torch.ones(T, S, dtype=torch.bool, device=self.data.device).tril(diagonal=self.length)


class FixedKVCache(KVCache):
    """Goes on from another cache, a token at a time, with shapes that stay the same, as a CUDA graph needs them.

    Where the token stands is a number on the device, and attention sees all the room with its empty part masked.
    """

    def __init__(self, cache: KVCache) -> None:
        self.data, self.length = cache.data, cache.length
        self.position = torch.tensor([cache.length], device=self.data.device)

    def positions(self, T: int) -> Tensor:
        return self.position

    def advance(self, T: int) -> None:
        """Nothing: who replays a step sets `position` before it."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.data[layer]
        k, v = k.to(keys.dtype), v.to(values.dtype)  # under autocast they may come in another
        return keys.index_copy_(2, self.position, k), values.index_copy_(2, self.position, v)

    def mask(self, T: int) -> Tensor:
        return (torch.arange(self.data.size(4), device=self.data.device) <= self.position)[None]  # (1, S)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: the libraries keep working memory for every stream that they have seen."""
    return torch.cuda.Stream(device)


def capture(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`step` as a CUDA graph: one launch instead of hundreds, each of which would take longer than its work.

    It must be free to run several times, with the same memory for what goes in and out. Where it cannot be captured, a
    line says so and it stays as it is.
    """
    stream = _capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):  # makes the device the current one as well
            for _ in range(2):  # libraries choose their kernels and take their memory before the capture
                step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = step()
    except RuntimeError as error:
        print(f"CUDA graphs do not work here ({str(error).splitlines()[0]}): telling goes on without them")
        return step
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
