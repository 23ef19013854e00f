"""Tokens a second of telling: ours against `transformers`' GPT-2 with its cache, and the plain loop.

    python benchmarks/telling.py                       # one story, and 32 at once, on a CPU
    python benchmarks/telling.py --device cuda --stories 1 256

Models of a recipe's shape with random weights, prompts of 16 tokens, and new ones as far as the context goes.
Beyond it, where the last tokens of the context go through afresh for each new one, the plain loop is the peer.
"""

from __future__ import annotations

import plain_loop
import torch
import transformers
from side_by_side import command_line, in_turn, machine, print_table

import storyllm

PROMPT = 16


def main(
    device: str = "cpu",
    recipe: str = "faithful",
    stories: tuple[int, ...] = (1, 32),
    repeats: int = 3,
    beyond: int = 32,
) -> None:
    """Times all in turn, with temperature 1 and the whole vocabulary; `beyond` new tokens where the context is full."""
    config = storyllm.get_recipe(recipe).model
    print(f"{machine()}, recipe {recipe}, transformers {transformers.__version__}, medians of {repeats}")
    torch.manual_seed(0)
    ours = storyllm.GPT(config).to(device).eval()
    plain = plain_loop.PlainGPT(config).to(device).eval()
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function="gelu",
        )
    )
    peer = peer.to(device).eval()
    new = config.block_size - PROMPT

    def generate_with_transformers(idx: torch.Tensor) -> torch.Tensor:
        return peer.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            do_sample=True,
            top_k=0,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=config.vocab_size - 1,
            use_cache=True,
        )

    for count in stories:
        idx = torch.randint(config.vocab_size, (count, PROMPT), device=device)
        full = torch.randint(config.vocab_size, (count, config.block_size), device=device)
        seconds = in_turn(
            {
                "ours": lambda idx=idx: ours.generate(idx, new),
                "transformers, with its cache": lambda idx=idx: generate_with_transformers(idx),
                "plain loop": lambda idx=idx: plain.generate(idx, new),
            },
            repeats,
        )
        rates = {name: count * new / value for name, value in seconds.items()}
        print_table(f"stories at once: {count}", "tokens/s", rates, less_is_better=False)
        seconds = in_turn(
            {
                "ours": lambda full=full: ours.generate(full, beyond),
                "plain loop": lambda full=full: plain.generate(full, beyond),
            },
            repeats,
        )
        rates = {name: count * beyond / value for name, value in seconds.items()}
        print_table(f"stories at once: {count}, beyond the context", "tokens/s", rates, less_is_better=False)


if __name__ == "__main__":
    command_line(main)
