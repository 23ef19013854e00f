"""All measurements that need a GPU: training, number formats, compilation, memory, the loss and generation.

    storyllm prepare --out data                                    # or other data with GPT-2's vocabulary
    python benchmarks/gpu.py --data-dir data                       # about ten minutes
    python benchmarks/gpu.py --data-dir data --device cpu --small  # a quick check that it runs, not a measurement

FLOPs are counted by `storyllm.device.flops_per_token`. The achievable FLOP/s are those of a large matrix product,
measured first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faithful_curve
import generation
import loss
import plain_loop
import torch
from common import STORYLLM, describe_machine, make_update, median_seconds, print_table, run_cli

import storyllm
from storyllm.device import flops_per_token, resolve_device_config

T4_MICRO_BATCH_SIZE = 64  # a size that fits the memory of a T4
SMALL = {
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.n_embd": 32,
    "train.batch_size": 2,
    "train.gradient_accumulation_steps": 4,
    "train.eval_windows": 8,
}


def main(
    data_dir: Path = Path("data"),
    device: str = "cuda",
    iterations: int = 20_000,
    baseline_iterations: int = 2_000,
    repeats: int = 5,
    small: bool = False,
    run_dir: Path | None = None,
) -> None:
    """Runs all measurements. A failed one, for instance for lack of memory, does not stop the others.

    Trains `faithful` for `iterations` iterations, and the plain loop for `baseline_iterations`. `run_dir` keeps the
    run of `faithful`; it must be new or empty.
    """
    recipe = storyllm.get_recipe("faithful").override({"train.device": device})
    eval_batches = plain_loop.EVAL_BATCHES
    generation_options: dict[str, Any] = {"stories": (1, 256)}
    if small:
        recipe = recipe.override(SMALL)
        iterations, baseline_iterations, repeats, eval_batches = 16, 8, 1, 2
        generation_options = {"recipe": "demo", "stories": (1, 2), "tokens_beyond": 2}
    vocab_size = storyllm.open_token_file(data_dir / "train.bin").info.vocab_size
    recipe = recipe.override({"model.vocab_size": vocab_size})
    print(describe_machine())
    peak = matmul_flops(device, 256 if small else 8_192)
    sections: dict[str, Callable[[], None]] = {
        "training": lambda: end_to_end(recipe, data_dir, run_dir, iterations, baseline_iterations, eval_batches, peak),
        "updates": lambda: updates(recipe, repeats, peak),
        "optimizers": lambda: optimizers(recipe, repeats),
        "memory": lambda: memory(recipe),
        "loss": lambda: loss.main(tokens=16 if small else 8_192, device=device, repeats=repeats, memory=not small),
        "generation": lambda: generation.main(device=device, repeats=repeats, **generation_options),
    }
    failed = []
    for name, section in sections.items():
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            section()
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def matmul_flops(device: str, size: int) -> float:
    """Measures FLOP/s of a (size, size) by (size, size) product in the number format that suits the device."""
    dtype = resolve_device_config(storyllm.TrainConfig(device=device), storyllm.GPTConfig()).dtype
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    flops = 2 * size**3 / median_seconds({"matmul": lambda: a @ b}, 20)["matmul"]
    print(f"matrix product, {size} x {size} in {dtype}: {flops / 1e12:.1f} TFLOP/s")
    return flops


def end_to_end(
    recipe: storyllm.Recipe,
    data_dir: Path,
    run_dir: Path | None,
    iterations: int,
    baseline_iterations: int,
    eval_batches: int,
    peak: float,
) -> None:
    """Time per iteration of complete runs, including startup, compilation, evaluations and checkpoints."""
    recipe = recipe.override({"train.stop_at": iterations})
    with tempfile.TemporaryDirectory() as temporary:
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):  # hides the progress bar
            log = storyllm.train(recipe, data_dir, run_dir or temporary)
        seconds = time.perf_counter() - started
    device = resolve_device_config(recipe.train, recipe.model)
    tokens_per_second = statistics.median(update["tokens_per_second"] for update in log.updates)
    flops = tokens_per_second * flops_per_token(recipe.model)
    print(f"\n{log.run['device_description']}")
    print(f"{iterations:,} iterations in {seconds:.1f} s, {tokens_per_second:,.0f} tokens/s during updates")
    print(f"{flops / peak:.1%} of the FLOP/s of the matrix product")
    if device.peak_flops is not None:
        print(f"{flops / device.peak_flops:.1%} of the GPU's peak FLOP/s (MFU)")
    faithful_curve.print_comparison(log)

    config = dataclasses.replace(recipe.train, stop_at=baseline_iterations)
    paths = {split: data_dir / f"{split}.bin" for split in ("train", "validation")}

    def get_batch(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        return plain_loop.get_batch(paths[split], config.batch_size, recipe.model.block_size)

    milliseconds = {STORYLLM: 1e3 * seconds / iterations}
    for name, get_eval_batch in (("plain loop", get_batch), ("plain loop, no evaluations", None)):
        model = plain_loop.PlainGPT(recipe.model).to(device.device)
        started = time.perf_counter()
        for _ in plain_loop.train(
            model,
            lambda i: get_batch("train"),
            config,
            device.device.type,
            device.dtype,
            get_eval_batch,
            eval_batches,
        ):
            pass
        milliseconds[name] = 1e3 * (time.perf_counter() - started) / baseline_iterations
    print_table(f"time per iteration, complete run (plain loop in {device.dtype})", "ms", milliseconds)


def updates(recipe: storyllm.Recipe, repeats: int, peak: float) -> None:
    """FLOP/s of one update with the automatic settings, and with one of them changed at a time."""
    device = resolve_device_config(recipe.train, recipe.model)
    variants: dict[str, dict[str, Any]] = {
        STORYLLM: {},
        "float32": {"dtype": "float32"},
        "not compiled": {"compile": False},
    }
    if device.device.type == "cuda":
        variants["compiled"] = {"compile": True}
    windows = recipe.train.windows_per_update
    for size in (32, 64, 128, 256, 512, 1_024):
        if size <= min(windows, 2 * device.micro_batch_size):  # larger ones may not fit
            variants[f"not compiled, micro-batch size {size}"] = {"compile": False, "micro_batch_size": size}
    x, y = random_batch(recipe)
    functions = {name: make_update(with_training(recipe, **changes), x, y) for name, changes in variants.items()}
    seconds = median_seconds(functions, repeats)
    flops = windows * recipe.model.block_size * flops_per_token(recipe.model)
    tflops = {name: flops / value / 1e12 for name, value in seconds.items()}
    title = f"one update of {windows} windows ({device.description})"
    print_table(title, "TFLOP/s", {**tflops, "matrix product": peak / 1e12})


def optimizers(recipe: storyllm.Recipe, repeats: int) -> None:
    """The cost of Muon, whose bf16 products some GPUs only emulate: one update with the training settings of `fast`."""
    fast = dataclasses.replace(storyllm.get_recipe("fast").train, device=recipe.train.device)
    recipe = storyllm.Recipe(model=dataclasses.replace(recipe.model, dropout=0.0), train=fast)
    x, y = random_batch(recipe)
    functions = {
        STORYLLM: make_update(recipe, x, y),
        "AdamW alone": make_update(with_training(recipe, optimizer="adamw"), x, y),
    }
    milliseconds = {name: 1e3 * value for name, value in median_seconds(functions, repeats).items()}
    print_table(f"one update of {len(x)} windows with the settings of fast", "ms", milliseconds)


def memory(recipe: storyllm.Recipe) -> None:
    """PyTorch's peak allocated memory during an update that fits a T4, and during generation."""
    if not torch.cuda.is_available():
        print("\npeak GPU memory: not measured, CUDA is not available")
        return
    model = storyllm.GPT(recipe.model).cuda().eval()
    changes = {"dtype": "float16", "micro_batch_size": T4_MICRO_BATCH_SIZE, "compile": False}
    tasks: dict[str, Callable[[], object]] = {
        f"update, float16, micro-batch size {T4_MICRO_BATCH_SIZE}, not compiled": make_update(
            with_training(recipe, **changes), *random_batch(recipe)
        ),
        "generating 200 tokens": lambda: model.generate(torch.zeros(1, 1, dtype=torch.long, device="cuda"), 200),
    }
    print("\npeak GPU memory, both models included")
    for name, task in tasks.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        task()
        torch.cuda.synchronize()
        print(f"  {name:<55} {torch.cuda.max_memory_allocated() / 1e6:>8,.0f} MB")


def with_training(recipe: storyllm.Recipe, **changes: Any) -> storyllm.Recipe:
    """`recipe` with changed training fields."""
    return recipe.override({f"train.{name}": value for name, value in changes.items()})


def random_batch(recipe: storyllm.Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs and targets for one update."""
    shape = (2, recipe.train.windows_per_update, recipe.model.block_size)
    x, y = torch.randint(recipe.model.vocab_size, shape)
    return x, y


if __name__ == "__main__":
    run_cli(main)
