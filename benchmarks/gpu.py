"""All that wants a GPU, in one go: training end to end, number formats, compilation, memory, the loss, telling.

    storyllm prepare --out data                                   # or any other data with GPT-2's vocabulary
    python benchmarks/gpu.py --data-dir data                      # some ten minutes
    python benchmarks/gpu.py --data-dir data --device cpu --small # does it run? (the figures mean nothing)

Arithmetic is counted as in `storyllm/pace.py`; the matrix rate is that of a large product on the same card, measured
just before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
import traceback
from pathlib import Path

import loss
import plain_loop
import telling
import torch
from side_by_side import command_line, in_turn, machine, print_table, update

import storyllm
from storyllm.device import choose_machine
from storyllm.pace import flops_per_token
from storyllm.tokens import open_tokens

T4_WINDOWS = 64  # what "auto" lets through a T4 at once


def main(
    data_dir: Path = Path("data"),
    device: str = "cuda",
    iterations: int = 20_000,
    peer_iterations: int = 2_000,
    repeats: int = 5,
    small: bool = False,
) -> None:
    """Trains `faithful` for `iterations` and the plain loop for `peer_iterations`, and compares their rates."""
    recipe = storyllm.RECIPES["faithful"].override({"train.device": device})
    eval_batches = plain_loop.EVAL_BATCHES
    if small:
        recipe = recipe.override(
            {
                "model.n_layer": 2,
                "model.n_head": 2,
                "model.n_embd": 32,
                "train.batch_size": 2,
                "train.gradient_accumulation_steps": 4,
                "train.eval_windows": 8,
            }
        )
        iterations, peer_iterations, repeats, eval_batches = 16, 8, 1, 2
    vocab_size = open_tokens(data_dir / "train.bin").info.vocab_size
    recipe = recipe.override({"model.vocab_size": vocab_size})
    print(machine())
    rate = matrix_rate(device, 256 if small else 8_192)
    told = {"recipe": "demo", "stories": (1, 2), "beyond": 2} if small else {"stories": (1, 256)}
    sections = {
        "training": lambda: end_to_end(recipe, data_dir, iterations, peer_iterations, eval_batches, rate),
        "updates": lambda: steps(recipe, repeats, rate),
        "optimizers": lambda: optimizers(recipe, repeats),
        "memory": lambda: memory(recipe),
        "loss": lambda: loss.main(tokens=64 if small else 8_192, device=device, repeats=repeats),
        "telling": lambda: telling.main(device=device, repeats=repeats, **told),
    }
    failed = []
    for name, section in sections.items():
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            section()
        except Exception:  # such as memory that is too small: the others are worth having all the same
            traceback.print_exc()
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def matrix_rate(device: str, size: int) -> float:
    """Operations a second of a (size, size) by (size, size) product in the 16-bit format that suits the device."""
    dtype = choose_machine(storyllm.TrainConfig(device=device), storyllm.GPTConfig()).dtype
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    rate = 2 * size**3 / in_turn({"product": lambda: a @ b}, 20)["product"]
    print(f"matrix rate, {size} x {size} in {dtype}: {rate / 1e12:.1f} TFLOP/s")
    return rate


def end_to_end(
    recipe: storyllm.Recipe, data_dir: Path, iterations: int, peer_iterations: int, eval_batches: int, rate: float
) -> None:
    """Seconds an iteration, with start, compilation, evaluations and checkpoints, of ours and of the plain loop."""
    recipe = recipe.override({"train.stop_at": iterations})
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):  # its progress bar
            log = storyllm.train(recipe, data_dir, folder)
        ours = time.perf_counter() - started
    chosen = choose_machine(recipe.train, recipe.model)
    print(f"\n{log.run['device']}")
    tokens_per_second = statistics.median(update["tokens_per_second"] for update in log.updates)
    used = tokens_per_second * flops_per_token(recipe.model)
    print(f"{iterations:,} iterations in {ours:.1f} s; {tokens_per_second:,.0f} tokens/s while training")
    print(f"a step makes use of {used / rate:.1%} of the matrix rate just measured")
    if chosen.peak_flops is not None:
        print(f"and of {used / chosen.peak_flops:.1%} of the rate in the data sheet (MFU)")

    config = dataclasses.replace(recipe.train, stop_at=peer_iterations)
    paths = {split: data_dir / f"{split}.bin" for split in ("train", "validation")}

    def batch(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        return plain_loop.get_batch(paths[split], config.batch_size, recipe.model.block_size)

    figures = {"ours": 1e3 * ours / iterations}
    for evaluates in (True, False):
        model = plain_loop.PlainGPT(recipe.model).to(chosen.device)
        eval_batch = batch if evaluates else None
        started = time.perf_counter()
        for _ in plain_loop.train(
            model, lambda i: batch("train"), config, chosen.device.type, chosen.dtype, eval_batch, eval_batches
        ):
            pass
        name = f"plain loop, {'its' if evaluates else 'without'} evaluations"
        figures[name] = 1e3 * (time.perf_counter() - started) / peer_iterations
    print_table(f"an iteration, end to end, the peer in {chosen.dtype}", "ms", figures)


def steps(recipe: storyllm.Recipe, repeats: int, rate: float) -> None:
    """An update with one thing at a time otherwise than "auto" has it, in counted operations a second."""
    chosen = choose_machine(recipe.train, recipe.model)
    variants: dict[str, dict] = {
        "ours": {},
        "float32": {"dtype": "float32"},
        "not compiled": {"compile": False},
        **({"compiled": {"compile": True}} if chosen.device.type == "cuda" else {}),
    }
    windows = recipe.train.batch_size * recipe.train.gradient_accumulation_steps
    for size in (32, 64, 128, 256, 512, 1_024):
        if size <= min(windows, 2 * chosen.micro_batch_size):  # more may not fit
            variants[f"not compiled, {size} windows at once"] = {"compile": False, "micro_batch_size": size}
    x, y = batch_of(recipe)
    seconds = in_turn({name: update(changed(recipe, **fields), x, y) for name, fields in variants.items()}, repeats)
    operations = windows * recipe.model.block_size * flops_per_token(recipe.model)
    rates = {name: operations / value / 1e12 for name, value in seconds.items()}
    title = f"an update of {windows} windows ({chosen.why})"
    print_table(title, "TFLOP/s", {**rates, "the matrix rate": rate / 1e12}, less_is_better=False)


def optimizers(recipe: storyllm.Recipe, repeats: int) -> None:
    """An update as `fast` makes it, of the model of `recipe`: what Muon costs here, where bf16 may be emulated."""
    fast = dataclasses.replace(storyllm.RECIPES["fast"].train, device=recipe.train.device)
    recipe = storyllm.Recipe(model=dataclasses.replace(recipe.model, dropout=0.0), train=fast)
    batch = batch_of(recipe)
    tasks = {"ours": update(recipe, *batch), "AdamW alone": update(changed(recipe, optimizer="adamw"), *batch)}
    seconds = in_turn(tasks, repeats)
    title = f"an update of {len(batch[0])} windows with the settings of fast"
    print_table(title, "ms", {name: 1e3 * value for name, value in seconds.items()})


def changed(recipe: storyllm.Recipe, **fields: object) -> storyllm.Recipe:
    """`recipe` with these fields of its training changed."""
    return recipe.override({f"train.{name}": value for name, value in fields.items()})


def batch_of(recipe: storyllm.Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs and targets for an update."""
    windows = recipe.train.batch_size * recipe.train.gradient_accumulation_steps
    return torch.randint(recipe.model.vocab_size, (2, windows, recipe.model.block_size)).unbind()


def memory(recipe: storyllm.Recipe) -> None:
    """The most that PyTorch had allocated on the GPU, for a step as a T4 takes it and for telling."""
    if not torch.cuda.is_available():
        print("\nmemory of a GPU: there is none here")
        return
    tell = storyllm.GPT(recipe.model).cuda().eval()
    tasks = {
        f"a step, float16, {T4_WINDOWS} windows at once, not compiled": update(
            changed(recipe, dtype="float16", micro_batch_size=T4_WINDOWS, compile=False), *batch_of(recipe)
        ),
        "telling 200 tokens": lambda: tell.generate(torch.zeros(1, 1, dtype=torch.long, device="cuda"), 200),
    }
    print("\npeak memory on the GPU, both models there")
    for name, task in tasks.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        task()
        torch.cuda.synchronize()
        print(f"  {name:<55} {torch.cuda.max_memory_allocated() / 1e6:>8,.0f} MB")


if __name__ == "__main__":
    command_line(main)
