"""The GPT: GPT-2's architecture (Radford et al. 2019), and the cache that makes it tell a story quickly.

Names in the state dict are GPT-2's, on `nn.Linear` with its (out, in) weights. Shapes: B windows, T tokens in each,
C = n_embd channels, H heads of D = C / H channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .config import GPTConfig, StoryLLMError
from .sampling import check_sampling, next_token_probs, sample

# Rows of logits that `GPT.loss` holds at a time. With GPT-2's vocabulary a row takes 200 kB, so this many take 0.8 GB.
LOSS_CHUNK = 4_096


class KVCache:
    """Keys and values of the tokens seen so far, for each layer: room for (B, H, block_size, D) each."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.data = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the (B, H, T, D) keys and values of the next T tokens; returns all of this layer's so far."""
        end = self.length + k.size(2)
        self.data[layer, 0, :, :, self.length : end] = k
        self.data[layer, 1, :, :, self.length : end] = v
        return self.data[layer, 0, :, :, :end], self.data[layer, 1, :, :, :end]


class CausalSelfAttention(nn.Module):
    """Each token looks at itself and those before it, with `n_head` heads (Vaswani et al. 2017)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, layer: int, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        heads = (part.view(B, T, self.config.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        q, k, v = heads  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = self.attend(q, k, v)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q kT / sqrt(D)) v, where the last T of S keys belong to the T queries and none looks ahead."""
        T, S = q.size(2), k.size(2)
        dropout = self.config.dropout if self.training else 0.0
        if self.config.flash_attention and T == S:  # is_causal instead of a mask lets PyTorch take its fastest kernel
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)  # may query t see key s?
        if self.config.flash_attention:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))  # (B, H, T, S)
        weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
        return F.dropout(weights, p=dropout) @ v


class MLP(nn.Module):
    """Each token by itself: to four times the width, GELU (Hendrycks and Gimpel 2016, the exact form), and back."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
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
        wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer = nn.ModuleDict(
            {
                "wte": wte,
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = wte.weight  # weight tying (Press and Wolf 2017)
        self.apply(self._init_weights)

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
        positions = torch.arange(start, start + T, device=idx.device)
        x = self.transformer["wte"](idx) + self.transformer["wpe"](positions)  # (B, T, C)
        x = self.transformer["drop"](x)
        for layer, block in enumerate(self.transformer["h"].children()):
            if self.config.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, layer, use_reentrant=False)
            else:
                x = block(x, layer, cache)
        if cache is not None:
            cache.length += T
        return self.transformer["ln_f"](x)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, T) ids to (B, T, vocab_size) logits, and the mean loss in nats per token if (B, T) targets are given."""
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The same scalar as `forward` gives, in nats per token, without ever holding all the logits.

        Logits are the largest tensor by far. They are made for LOSS_CHUNK tokens at a time and, where there is more
        than one chunk, made again in the backward pass instead of kept.
        """
        x, y = self.hidden(idx).flatten(0, 1), targets.flatten()  # (B * T, C), (B * T,)
        if y.numel() <= LOSS_CHUNK:
            return self._summed_loss(x, y) / y.numel()
        chunks = zip(x.split(LOSS_CHUNK), y.split(LOSS_CHUNK), strict=True)
        losses = [checkpoint(self._summed_loss, xc, yc, use_reentrant=False) for xc, yc in chunks]
        return torch.stack(losses).sum() / y.numel()

    def _summed_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(x).float(), targets, reduction="sum")

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
        cache = None
        if use_cache:
            cache = KVCache(self.config, idx.size(0), idx.device, self.lm_head.weight.dtype)
        for step in range(max_new_tokens):
            logits = self.next_logits(idx, cache)
            next_ids = sample(next_token_probs(logits, temperature, top_k, top_p), generator)
            if forced is not None:
                next_ids = torch.where(forced[step] >= 0, forced[step], next_ids)
            idx = torch.cat([idx, next_ids[:, None]], dim=1)
            yield next_ids

    def next_logits(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) ids to the (B, vocab_size) logits of what follows them, dropout off.

        A cache must hold a beginning of `idx`; only the rest goes through the model, while `idx` fits the context.
        """
        was_training = self.training
        if was_training:
            self.eval()
        if cache is not None and idx.size(1) <= self.config.block_size:
            x = self.hidden(idx[:, cache.length :], cache)
        else:
            x = self.hidden(idx[:, -self.config.block_size :])
        if was_training:
            self.train()
        return self.lm_head(x[:, -1])
