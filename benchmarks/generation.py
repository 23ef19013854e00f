"""Tokens per second of generation: StoryLLM against GPT-2 of `transformers` with its KV cache, and the plain loop.

    python benchmarks/generation.py                                # one story, and 32 in one batch, on a CPU
    python benchmarks/generation.py --weights int8 bfloat16        # also with smaller weights
    python benchmarks/generation.py --device cuda --stories 1 256

The models have the recipe's shape and random weights. Prompts have 16 tokens, and generation fills the context. Beyond
the context, where every new token has the last `block_size` tokens read again, the baseline is the plain loop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import plain_loop
import torch
import transformers
from common import STORYLLM, describe_machine, median_seconds, print_table, run_cli
from torch import Tensor

import storyllm
from storyllm.model.quantization import convert_linear_layers

PROMPT_TOKENS = 16


def main(
    device: str = "cpu",
    recipe: str = "faithful",
    stories: tuple[int, ...] = (1, 32),
    repeats: int = 3,
    tokens_beyond: int = 32,
    weights: tuple[str, ...] = (),
    plain: bool = True,
) -> None:
    """Times sampling at temperature 1 without top-k or top-p, for each number of stories in a batch.

    `tokens_beyond` is the number of new tokens per story beyond the context. `weights` adds StoryLLM's model with these
    weights; all others have float32 weights. `plain` includes the plain loop, which is slow with many stories.
    """
    config = storyllm.get_recipe(recipe).model
    print(f"{describe_machine()}, recipe {recipe}, transformers {transformers.__version__}, medians of {repeats}")
    torch.manual_seed(0)
    model = storyllm.GPT(config).to(device).eval()
    converted = {f"{STORYLLM}, {name} weights": copy.deepcopy(model) for name in weights}
    for name, other in zip(weights, converted.values(), strict=True):
        convert_linear_layers(other, name)
    plain_model = plain_loop.PlainGPT(config).to(device).eval()
    generate_with_transformers = make_transformers_generate(config, device)
    new_tokens = config.block_size - PROMPT_TOKENS
    for count in stories:
        idx = torch.randint(config.vocab_size, (count, PROMPT_TOKENS), device=device)
        functions: dict[str, Callable[[], object]] = {
            STORYLLM: partial(model.generate, idx, new_tokens),
            **{name: partial(other.generate, idx, new_tokens) for name, other in converted.items()},
            "transformers": partial(generate_with_transformers, idx, new_tokens),
        }
        if plain:
            functions["plain loop"] = partial(plain_model.generate, idx, new_tokens)
        print_rates(f"batch of {count}", functions, repeats, count * new_tokens)
        full = torch.randint(config.vocab_size, (count, config.block_size), device=device)
        functions = {
            STORYLLM: partial(model.generate, full, tokens_beyond),
            **{name: partial(other.generate, full, tokens_beyond) for name, other in converted.items()},
        }
        if plain:
            functions["plain loop"] = partial(plain_model.generate, full, tokens_beyond)
        print_rates(f"batch of {count}, beyond the context", functions, repeats, count * tokens_beyond)


def make_transformers_generate(config: storyllm.GPTConfig, device: str) -> Callable[[Tensor, int], Tensor]:
    """A function that generates with a GPT-2 of that shape: (B, T) ids and a number of new tokens to (B, T + new)."""
    gpt2_config = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        activation_function="gelu",
        bos_token_id=config.vocab_size - 1,
        eos_token_id=config.vocab_size - 1,
    )
    model: Any = transformers.GPT2LMHeadModel(gpt2_config).eval()
    model.to(device)

    def generate(idx: Tensor, new_tokens: int) -> Tensor:
        return model.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=config.vocab_size - 1,
            use_cache=True,
        )

    return generate


def print_rates(title: str, functions: dict[str, Callable[[], object]], repeats: int, tokens: int) -> None:
    """Times functions that generate that many tokens, and prints their rates."""
    seconds = median_seconds(functions, repeats)
    print_table(title, "tokens/s", {name: tokens / value for name, value in seconds.items()})


if __name__ == "__main__":
    run_cli(main)
