"""The named recipes."""

from __future__ import annotations

import dataclasses

from .config import DataConfig, GPTConfig, Recipe, StoryLLMError, TrainConfig

_FAITHFUL = Recipe()

# Learns the most from few tokens: Muon, a high learning rate that decays to zero, small batches, no dropout, windows
# without replacement. docs/experiments.md describes how each setting was chosen.
_FAST = Recipe(
    model=dataclasses.replace(_FAITHFUL.model, dropout=0.0),
    train=TrainConfig(
        max_iters=2_440,
        batch_size=8,
        gradient_accumulation_steps=1,
        windows="shuffled",
        optimizer="muon",
        schedule="wsd",
        learning_rate=1e-2,
        muon_lr_scale=0.2,
        min_lr=0.0,
        warmup_iters=120,
        decay_fraction=0.8,
        beta2=0.99,
        grad_clip=0.0,
        eval_interval=244,
        eval_windows=256,
        sample_interval=488,
    ),
)

# The initialization lets attention copy names from the start. With GPT-2's, characters change their names in a story.
_DEMO = Recipe(
    model=GPTConfig(
        vocab_size=1024,
        block_size=256,
        n_layer=2,
        n_head=4,
        n_embd=128,
        dropout=0.0,
        embedding_std=0.5,
        position_std=0.1,
        final_norm_gain=0.1,
        copy_strength=0.3,
    ),
    data=DataConfig(source="synthetic", tokenizer="bpe:1024"),
    train=TrainConfig(
        max_iters=3_600,
        batch_size=4,
        gradient_accumulation_steps=1,
        learning_rate=3e-3,
        min_lr=1e-4,
        warmup_iters=50,
        beta2=0.99,
        grad_clip=1.0,
        eval_interval=100,
        eval_windows=32,
        sample_interval=600,
    ),
)

RECIPES: dict[str, Recipe] = {
    # The specification: 6 layers, width 384, 20,000 iterations, a learning rate that rises from 1e-4 to 5e-4.
    "faithful": _FAITHFUL,
    # The model, tokenizer and context of `faithful`; reaches its published loss with 2.5 million tokens.
    "fast": _FAST,
    # A vocabulary and model sized for the stories. The length is an estimate of what a T4 trains in ten minutes.
    "small-vocab": Recipe(
        model=GPTConfig(vocab_size=4096, block_size=256, n_layer=6, n_head=4, n_embd=256, dropout=0.0),
        data=DataConfig(tokenizer="bpe:4096"),
        train=dataclasses.replace(_FAST.train, max_iters=30_000, eval_interval=1_000, sample_interval=5_000),
    ),
    # From nothing to a readable story within a few minutes on two CPU cores, without a network connection.
    "demo": _DEMO,
    # The model and data of `demo` with the settings of `fast`, a third of the tokens, and a higher rate for Muon.
    "demo-fast": dataclasses.replace(
        _DEMO,
        train=dataclasses.replace(
            _FAST.train,
            max_iters=1_200,
            batch_size=4,
            muon_lr_scale=0.3,
            warmup_iters=60,
            eval_interval=120,
            sample_interval=200,
        ),
    ),
    # Starts from another model (--init-from), whose shape replaces this one, and keeps its context of at most 256.
    "finetune": Recipe(
        model=GPTConfig(vocab_size=4096, block_size=256, n_layer=6, n_head=4, n_embd=256, dropout=0.0),
        data=DataConfig(tokenizer="bpe:4096"),
        train=TrainConfig(
            max_iters=400,
            batch_size=8,
            gradient_accumulation_steps=1,
            windows="shuffled",
            learning_rate=1e-3,
            min_lr=0.0,
            warmup_iters=20,
            warmup_start_factor=0.05,
            beta2=0.99,
            grad_clip=1.0,
            eval_interval=40,
            eval_windows=64,
        ),
    ),
    # The specification's future work: longer contexts with the same tokens per iteration, and GPT-2's smallest size.
    "context-512": _FAITHFUL.override({"model.block_size": 512, "train.batch_size": 8}),
    "context-1024": _FAITHFUL.override({"model.block_size": 1024, "train.batch_size": 4}),
    "gpt2-small": _FAITHFUL.override(
        {"model.block_size": 1024, "model.n_layer": 12, "model.n_head": 12, "model.n_embd": 768, "train.batch_size": 4}
    ),
}


def get_recipe(name: str) -> Recipe:
    """The recipe with that name. Raises StoryLLMError, listing the known names, if there is none."""
    if name not in RECIPES:
        raise StoryLLMError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
