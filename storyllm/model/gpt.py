"""GPT-2's architecture (Radford et al. 2019).

The state dict has GPT-2's names, on `nn.Linear` with (out, in) weights. Shapes: batch size B, sequence length T,
C = n_embd, H = n_head, D = C / H.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..config import GPTConfig, StoryLLMError
from .decoding import check_ids, decode
from .initialization import initialize
from .kv_cache import KVCache
from .linear import Linear
from .loss import linear_cross_entropy


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017); a token attends to itself and earlier tokens."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v in one matrix
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, layer: int, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        heads = (part.view(B, T, self.config.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        q, k, v = heads  # (B, H, T, D) each
        if cache is None:
            y = self.attend(q, k, v)  # (B, H, T, D)
        else:
            k, v = cache.append(layer, k, v)  # (B, H, S, D)
            y = self.attend(q, k, v, cache.mask(T), causal=not cache.length)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
        """softmax(q k^T / sqrt(D)) v, where `mask` (T, S) selects the visible keys.

        Without a mask, a query sees the keys up to its own position if `causal`, otherwise all keys.
        """
        dropout = self.config.dropout if self.training else 0.0
        if self.config.flash_attention:  # is_causal instead of a mask allows the fastest kernel
            is_causal = causal and mask is None
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))  # (B, H, T, S)
        if mask is None and causal:
            T = q.size(2)
            mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return F.dropout(scores.softmax(dim=-1), p=dropout) @ v


class MLP(nn.Module):
    """Two linear layers with a hidden size of 4 C and GELU (Hendrycks and Gimpel 2016), exact or approximated."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


class Block(nn.Module):
    """A pre-norm transformer block: attention and MLP, each with a residual connection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layer: int, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), layer, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """A GPT-2 style language model. The weights are initialized from PyTorch's global generator."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if not isinstance(config, GPTConfig):
            raise StoryLLMError(f"GPT got {type(config).__name__}, expected a GPTConfig; pass recipe.model")
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        initialize(self)

    def tie_weights(self) -> None:
        """Shares one parameter between the token embedding and the head (Press and Wolf 2017)."""
        self.lm_head.weight = self.transformer["wte"].weight  # type: ignore[assignment]

    def num_parameters(self, count_tied_head: bool = False) -> int:
        """Number of parameters. The weight shared by embedding and head counts twice if `count_tied_head`."""
        total = sum(p.numel() for p in self.parameters())
        return total + (self.lm_head.weight.numel() if count_tied_head else 0)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) ids to the (B, T, C) final hidden states. With a cache, `idx` follows the cached tokens.

        Raises StoryLLMError if `idx` has another shape or the tokens exceed the context.
        """
        check_ids(idx)
        T = idx.size(1)
        start = cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            raise StoryLLMError(f"got {start + T} tokens, block_size is {self.config.block_size}; truncate the input")
        positions = torch.arange(T, device=idx.device) if cache is None else cache.positions(T)
        x = self.transformer["wte"](idx) + self.transformer["wpe"](positions)  # (B, T, C)
        x = self.transformer["drop"](x)
        for layer, block in enumerate(self.transformer["h"].children()):
            if self.config.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, layer, use_reentrant=False)
            else:
                x = block(x, layer, cache)
        if cache is not None:
            cache.advance(T)
        return self.transformer["ln_f"](x)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, T) ids to (B, T, vocab_size) logits, and the mean loss in nats per token if (B, T) targets are given.

        Targets of -100 do not count, as in `F.cross_entropy`; the loss is NaN if all are. Raises StoryLLMError if `idx`
        or `targets` has another shape.
        """
        _check_targets(idx, targets)
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The loss of `forward`, in nats per token, without materializing all logits (see `linear_cross_entropy`).

        Raises StoryLLMError if `idx` or `targets` has another shape than (B, T).
        """
        _check_targets(idx, targets)
        if not isinstance(self.lm_head, Linear):  # converted to smaller weights
            return self(idx, targets)[1]
        return linear_cross_entropy(self.hidden(idx).flatten(0, 1), self.lm_head.weight, targets.flatten())

    def next_logits(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) ids to the (B, vocab_size) logits of the next token. With a cache, `idx` follows the cached tokens."""
        return self.lm_head(self.hidden(idx, cache)[:, -1])

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(B, T) prompts to (B, T + max_new_tokens): the prompts followed by that many new ids.

        See `next_token_probs` for the sampling parameters and `decode` for how it works.
        """
        new_ids = decode(self, idx, max_new_tokens, temperature, top_k, top_p, generator)
        return torch.cat([idx, *(ids[:, None] for ids in new_ids)], dim=1)


def _check_targets(idx: Tensor, targets: Tensor | None) -> None:
    """Raises StoryLLMError unless the targets, if any, have the shape of `idx` and at least one token."""
    if targets is not None and (targets.shape != idx.shape or targets.numel() == 0):
        raise StoryLLMError(
            f"targets have shape {tuple(targets.shape)}, must be that of idx, {tuple(idx.shape)}, with at least one "
            "token; pass one target for each id"
        )
