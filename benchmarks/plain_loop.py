"""The baseline of the benchmarks: how a small GPT is usually trained in a notebook.

`datasets.map` tokenizes story by story, and shards are copied into a memory map. Each batch opens the memory map again
and stacks its windows one by one, computes all logits, and reads the loss. An evaluation uses 500 random batches per
split. Generation reads the complete context for each new token.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from storyllm import GPTConfig, TrainConfig, lr_at

SHARDS = 1_024
EVAL_BATCHES = 500


def prepare(stories: datasets.Dataset, tokenizer: tiktoken.Encoding, path: Path, num_proc: int) -> None:
    """Writes the column "text", with an end-of-text token after each story, as 16-bit ids to `path`."""

    def tokenize(row: dict[str, str]) -> dict[str, Any]:
        ids = [*tokenizer.encode_ordinary(row["text"]), tokenizer.eot_token]
        return {"ids": ids, "len": len(ids)}

    tokenized = stories.map(tokenize, remove_columns=["text"], num_proc=num_proc)
    ids = np.memmap(path, dtype=np.uint16, mode="w+", shape=(sum(tokenized["len"]),))
    start, shards = 0, min(SHARDS, len(tokenized))
    for index in range(shards):
        shard = tokenized.shard(num_shards=shards, index=index, contiguous=True).with_format("numpy")
        shard_ids = np.concatenate(shard["ids"])
        ids[start : start + len(shard_ids)] = shard_ids
        start += len(shard_ids)
    ids.flush()


def get_batch(path: Path, batch_size: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Random windows of the ids in `path`: (batch_size, block_size) inputs and targets."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in starts])
    return x, y


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PlainGPT(nn.Module):
    """GPT-2 with the usual PyTorch modules. Its state dict has the names of `storyllm.GPT`'s."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight  # type: ignore[assignment]
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, T) ids to (B, T, V) logits and the loss, or without targets to the last (B, 1, V) logits and None."""
        positions = torch.arange(idx.size(1), device=idx.device)
        x = self.transformer["wte"](idx) + self.transformer["wpe"](positions)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer["h"].children():
            x = block(x)
        x = self.transformer["ln_f"](x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0) -> Tensor:
        """(B, T) prompts to (B, T + max_new_tokens) ids, without a cache."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :])
            probs = F.softmax(logits[:, -1] / temperature, dim=-1)
            idx = torch.cat([idx, torch.multinomial(probs, num_samples=1)], dim=1)
        return idx


def train(
    model: PlainGPT,
    get_train_batch: Callable[[int], tuple[Tensor, Tensor]],
    config: TrainConfig,
    device: str,
    dtype: torch.dtype = torch.float32,
    get_eval_batch: Callable[[str], tuple[Tensor, Tensor]] | None = None,
    eval_batches: int = EVAL_BATCHES,
) -> Iterator[float]:
    """Trains up to `config.last_iteration` and yields the loss of each iteration, in nats per token.

    `get_train_batch` returns the batch of an iteration. With `get_eval_batch`, which returns a random batch of a split,
    there is an evaluation every `config.resolved_eval_interval` iterations.
    """
    autocast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype=dtype)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2))
    model.train()
    for i in range(config.last_iteration):
        if get_eval_batch is not None and i % config.resolved_eval_interval == 0:
            with torch.no_grad(), autocast:
                model.eval()
                for split in ("train", "validation"):
                    losses = torch.zeros(eval_batches)
                    for k in range(eval_batches):
                        x, y = get_eval_batch(split)
                        losses[k] = model(x.to(device), y.to(device))[1].item()
                model.train()
        x, y = get_train_batch(i)
        with autocast:
            _, loss = model(x.to(device), y.to(device))
        scaler.scale(loss / config.gradient_accumulation_steps).backward()
        if (i + 1) % config.gradient_accumulation_steps == 0:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(i, config)
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
        yield loss.item()
