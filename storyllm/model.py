"""The GPT: GPT-2's architecture (Radford et al. 2019), and the cache that makes it tell a story quickly.

Names in the state dict are GPT-2's, on `nn.Linear` with its (out, in) weights. Shapes: B windows, T tokens in each,
C = n_embd channels, H heads of D = C / H channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .cache import FixedKVCache, KVCache, capture
from .config import GPTConfig, StoryLLMError
from .linear import Linear, linear_cross_entropy
from .sampling import check_sampling, draw

# Steps of telling from which on a CUDA graph of one is made: the capture takes as long as some steps without it.
CAPTURE_STEPS = 32


class CausalSelfAttention(nn.Module):
    """Each token looks at itself and those before it, with `n_head` heads (Vaswani et al. 2017)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v at once
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, layer: int, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        heads = (part.view(B, T, self.config.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        q, k, v = heads  # (B, H, T, D) each
        mask = None
        if cache is not None:
            k, v = cache.append(layer, k, v)
            mask = cache.mask(T)
        y = self.attend(q, k, v, mask)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """softmax(q kT / sqrt(D)) v, where a query sees the keys of its `mask`; without one, those up to its own."""
        T = q.size(2)
        dropout = self.config.dropout if self.training else 0.0
        if self.config.flash_attention:  # is_causal instead of a mask lets PyTorch take its fastest kernel
            causal = mask is None and T > 1
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))  # (B, H, T, S)
        if mask is None and T > 1:
            mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return F.dropout(scores.softmax(dim=-1), p=dropout) @ v


class MLP(nn.Module):
    """Each token by itself: to four times the width, GELU (Hendrycks and Gimpel 2016, the exact form), and back."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    """One transformer block, pre-norm: what attention and MLP say is added to the residual stream."""

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
    """A GPT-2 style language model with freshly drawn weights, from PyTorch's global random generator."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if not isinstance(config, GPTConfig):
            raise StoryLLMError(f"GPT was given a {type(config).__name__}, expected a GPTConfig: pass recipe.model")
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
        self.apply(self._init_weights)

    def tie_weights(self) -> None:
        """Makes the head's matrix and the token embedding's one parameter (Press and Wolf 2017)."""
        self.lm_head.weight = self.transformer["wte"].weight  # type: ignore[assignment]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (CausalSelfAttention, MLP)):
            # 2 * n_layer of these add up in the residual stream: GPT-2 scales them so that the sum stays even.
            # `apply` visits a module after its children, so this draw is the one that stays.
            nn.init.normal_(module.c_proj.weight, mean=0.0, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def num_parameters(self, count_tied_head: bool = False) -> int:
        """Number of parameters; the head shares the token embedding's, and is counted again only if asked for."""
        total = sum(p.numel() for p in self.parameters())
        return total + (self.lm_head.weight.numel() if count_tied_head else 0)

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) ids to (B, T, C): what the last layer norm says of each token. With a cache, `idx` continues it.

        Raises StoryLLMError when the tokens do not fit the context.
        """
        T = idx.size(1)
        start = cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            raise StoryLLMError(f"{start + T} tokens were given, the context is {self.config.block_size}: cut them")
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
        """(B, T) ids to (B, T, vocab_size) logits, and the mean loss in nats per token if (B, T) targets are given."""
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The same scalar as `forward` gives, in nats per token, without ever holding all the logits.

        Logits are the largest tensor by far: see `linear_cross_entropy`.
        """
        return linear_cross_entropy(self.hidden(idx).flatten(0, 1), self.lm_head.weight, targets.flatten())

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(B, T) ids to (B, T + max_new_tokens): the prompts and exactly that many new ids. See `next_token_probs`."""
        new = self.stream(idx, max_new_tokens, temperature, top_k, top_p, generator)
        return torch.cat([idx, *(ids[:, None] for ids in new)], dim=1)

    @torch.inference_mode()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        forced: Tensor | None = None,
        use_cache: bool = True,
    ) -> Iterator[Tensor]:
        """Yields (B,) new ids, `max_new_tokens` times. Dropout is off meanwhile, whatever mode the model is in.

        `forced` (max_new_tokens, B) gives ids that take the place of drawn ones, where they are not negative: prompts
        of different lengths advance together so.

        Inside the context a token costs one step through the cache. Beyond it every position shifts with each token,
        so nothing can be kept: the last `block_size` tokens go through afresh. `use_cache=False` does so always.
        """
        check_sampling(temperature, top_k, top_p)
        if idx.ndim != 2 or idx.size(1) == 0:
            raise StoryLLMError(f"idx has shape {tuple(idx.shape)}, expected (B, T) with T of at least 1")
        next_logits = self._decoder(idx, max_new_tokens) if use_cache else self.next_logits
        for step in range(max_new_tokens):
            next_ids = draw(next_logits(idx), temperature, top_k, top_p, generator)
            if forced is not None:
                next_ids = torch.where(forced[step] >= 0, forced[step], next_ids)
            idx = torch.cat([idx, next_ids[:, None]], dim=1)
            yield next_ids

    def _decoder(self, prompt: Tensor, max_new_tokens: int) -> Callable[[Tensor], Tensor]:
        """`next_logits` for ids that grow by a token a call: through a cache and, on a CUDA GPU, a graph of a step."""
        B, device = prompt.size(0), prompt.device
        cache = KVCache(self.config, B, device, self.lm_head.weight.dtype)
        if not _worth_capturing(device, min(max_new_tokens, self.config.block_size - prompt.size(1))):
            return lambda idx: self.next_logits(idx, cache)
        last = torch.zeros(B, 1, dtype=torch.long, device=device)  # what goes into the graph
        fixed: FixedKVCache | None = None
        step: Callable[[], Tensor] | None = None

        def next_logits(idx: Tensor) -> Tensor:
            nonlocal fixed, step
            if not cache.length or idx.size(1) > self.config.block_size:
                return self.next_logits(idx, cache)
            last.copy_(idx[:, -1:])
            if fixed is None or step is None:
                fixed = FixedKVCache(cache)
                step = capture(lambda: self._logits_after(last, fixed), device)
            fixed.position.fill_(idx.size(1) - 1)
            return step()

        return next_logits

    def next_logits(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) ids to the (B, vocab_size) logits of what follows them, dropout off.

        A cache must hold a beginning of `idx`; only the rest goes through the model, while `idx` fits the context.
        """
        if cache is not None and idx.size(1) <= self.config.block_size:
            return self._logits_after(idx[:, cache.length :], cache)
        return self._logits_after(idx[:, -self.config.block_size :])

    def _logits_after(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        was_training = self.training
        if was_training:
            self.eval()
        x = self.hidden(idx, cache)
        if was_training:
            self.train()
        return self.lm_head(x[:, -1])


def _worth_capturing(device: torch.device, steps: int) -> bool:
    """Is a step so short on this device that launching it takes the time, and does the capture pay for itself?"""
    return device.type == "cuda" and steps >= CAPTURE_STEPS
