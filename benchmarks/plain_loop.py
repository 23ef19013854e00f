"""The peer of the other benchmarks: how a small GPT is usually trained in a notebook, written plainly.

Stories are tokenized one by one by `datasets.map` and copied shard by shard into a memory map. For each batch that map
is opened and its windows are stacked one by one. Every batch has its own forward and backward pass, with all its logits
and a look at its loss. An evaluation takes 500 random batches of each split. A story is told by feeding the whole
context again for each token.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

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
    """The stories of the column "text", each with an end-of-text token, as 16-bit ids in `path`."""

    def tokenize(row: dict) -> dict:
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
    """`batch_size` random windows of the ids in `path`, as (batch_size, block_size) inputs and targets."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in starts])
    return x, y


class Attention(nn.Module):
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


class Feedforward(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x))), self.dropout, self.training)


class Layer(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = Feedforward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PlainGPT(nn.Module):
    """GPT-2 as everybody writes it. Its state dict has the names of `storyllm.GPT`'s."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        layers = [Layer(config) for _ in range(config.n_layer)]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(layers),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        positions = torch.arange(idx.size(1), device=idx.device)
        x = self.transformer["wte"](idx) + self.transformer["wpe"](positions)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer in self.transformer["h"]:
            x = layer(x)
        x = self.transformer["ln_f"](x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0) -> Tensor:
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :])
            probs = F.softmax(logits[:, -1] / temperature, dim=-1)
            idx = torch.cat([idx, torch.multinomial(probs, num_samples=1)], dim=1)
        return idx


def train(
    model: PlainGPT,
    batch_of: Callable[[int], tuple[Tensor, Tensor]],
    config: TrainConfig,
    device: str,
    dtype: torch.dtype = torch.float32,
    eval_batch_of: Callable[[str], tuple[Tensor, Tensor]] | None = None,
    eval_batches: int = EVAL_BATCHES,
) -> Iterator[float]:
    """Trains on the batches 0, 1, 2, ... for `config.stop_at` iterations; yields the loss of each.

    With `eval_batch_of`, which gives a random batch of a split, it evaluates every `config.eval_interval` iterations.
    """
    autocast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype=dtype)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2))
    model.train()
    for i in range(config.stop_at or config.max_iters):
        if eval_batch_of is not None and i % config.eval_interval == 0:
            with torch.no_grad(), autocast:
                model.eval()
                for split in ("train", "validation"):
                    losses = torch.zeros(eval_batches)
                    for k in range(eval_batches):
                        x, y = eval_batch_of(split)
                        losses[k] = model(x.to(device), y.to(device))[1].item()
                model.train()
        x, y = batch_of(i)
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
