"""Keys and values of the tokens read so far, so that each new token costs one forward pass of one position."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import GPTConfig


class KVCache:
    """Keys and values of each layer, with room for (B, n_head, block_size, head size) of both."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.data = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0  # number of cached tokens

    def positions(self, T: int) -> Tensor:
        """The (T,) positions of the next T tokens."""
        return torch.arange(self.length, self.length + T, device=self.data.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the (B, H, T, D) keys and values of the next T tokens; returns all keys and values of the layer."""
        end = self.length + k.size(2)
        self.data[layer, 0, :, :, self.length : end] = k
        self.data[layer, 1, :, :, self.length : end] = v
        return self.data[layer, 0, :, :, :end], self.data[layer, 1, :, :, :end]

    def advance(self, T: int) -> None:
        """Counts T more tokens, once they have passed all layers."""
        self.length += T

    def mask(self, T: int) -> Tensor | None:
        """The (T, S) mask of the keys that each of the next T queries may attend to; None if `is_causal` suffices."""
        if T == 1 or not self.length:
            return None
        S = self.length + T
        return torch.ones(T, S, dtype=torch.bool, device=self.data.device).tril(diagonal=self.length)


class StaticKVCache(KVCache):
    """Takes over the contents of another cache and keeps all shapes fixed, as a CUDA graph requires.

    The position of the next token is a tensor on the device; attention masks the part that is still empty.
    """

    def __init__(self, cache: KVCache) -> None:
        self.data, self.length = cache.data, cache.length
        self.position = torch.tensor([cache.length], device=self.data.device)

    def positions(self, T: int) -> Tensor:
        return self.position

    def advance(self, T: int) -> None:
        """Does nothing: the caller sets `position` before each step."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.data[layer]
        k, v = k.to(keys.dtype), v.to(values.dtype)  # autocast may change their dtype
        return keys.index_copy_(2, self.position, k), values.index_copy_(2, self.position, v)

    def mask(self, T: int) -> Tensor:
        return (torch.arange(self.data.size(4), device=self.data.device) <= self.position)[None]  # (1, S)
