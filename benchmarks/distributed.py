"""Training on several processes: tokens per second, efficiency, and the time of a reduction of all gradients.

    storyllm prepare --out data                                   # or other data, with the recipe's vocabulary
    python benchmarks/distributed.py --data-dir data              # 1, 2, 4, ... GPUs; without GPUs, 1 and 2 processes
    python benchmarks/distributed.py --data-dir data --recipe demo --updates 20

Each number of processes trains the same recipe with torchrun, for a few updates. Rates are medians of the log, without
the first updates. On CPUs, each process has one thread. The last columns compare the time of Muon's complete
Newton-Schulz iteration, which the processes divide, with that of sending each process's part of the result to the
others.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import describe_machine, run_cli

import storyllm
from storyllm.device import resolve_device_config
from storyllm.training.launch import command_line_options
from storyllm.training.muon import orthogonalize
from storyllm.training.optimizer import parameter_groups


def main(
    data_dir: Path = Path("data"),
    recipe: str = "fast",
    processes: tuple[int, ...] = (),
    updates: int = 20,
    worker: bool = False,
) -> None:
    """Measures training with these numbers of processes: by default 1, 2, 4, ... GPUs, or 1 and 2 on a CPU."""
    config = storyllm.get_recipe(recipe)
    vocab_size = storyllm.open_token_file(data_dir / "train.bin").info.vocab_size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = config.override({"model.vocab_size": vocab_size, "train.device": device})
    if worker:
        measure_communication(config)
        return
    print(f"{describe_machine()}, load {os.getloadavg()[0]:.1f}")
    available = torch.cuda.device_count() if device == "cuda" else 2
    counts = processes or tuple(n for n in (1, 2, 4, 8, 16) if n <= available)
    tokens_per_update = config.train.windows_per_update * config.model.block_size
    print(f"{recipe}, {tokens_per_update:,} tokens per update, {device}\n")
    print("processes   tokens/s efficiency   all-reduce  Newton-Schulz  all-gather")
    rates: dict[int, float] = {}
    for count in counts:
        rates[count] = tokens_per_second(config, data_dir, count, updates)
        communication = json.loads(
            torchrun(count, __file__, "--worker", "--recipe", recipe, "--data-dir", str(data_dir))
        )
        efficiency = rates[count] / rates[counts[0]] * counts[0] / count
        times = " ".join(f"{1e3 * communication[name]:>{width}.1f} ms" for name, width in TIMES.items())
        print(f"{count:>9} {rates[count]:>10,.0f} {efficiency:>10.0%} {times}")
        sys.stdout.flush()


TIMES = {"all_reduce": 9, "newton_schulz": 11, "all_gather": 8}  # and the widths of their columns


def tokens_per_second(config: storyllm.Recipe, data_dir: Path, count: int, updates: int) -> float:
    """The median rate of `count` processes over some updates, without evaluations."""
    iterations = updates * config.train.gradient_accumulation_steps
    settings = {"max_iters": iterations, "eval_interval": iterations, "eval_windows": count, "sample_interval": 0}
    config = config.override({f"train.{name}": value for name, value in settings.items()})
    with tempfile.TemporaryDirectory() as folder:
        options = [*command_line_options(config), "--data-dir", str(data_dir), "--checkpoint-dir", folder]
        torchrun(count, "-m", "storyllm", "train", *options)
        rates = [update["tokens_per_second"] for update in storyllm.read_log(Path(folder) / "log.jsonl").updates]
    return statistics.median(rates[updates // 4 :])


def torchrun(count: int, *arguments: str) -> str:
    """What a program prints that torchrun runs in `count` processes with one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def measure_communication(config: storyllm.Recipe, repeats: int = 5) -> None:
    """As one of the processes: prints the seconds of communication and of the Newton-Schulz iteration as JSON."""
    device = torch.device(config.train.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    with torch.device(device):
        model = storyllm.GPT(config.model)
    gradients = torch.zeros(model.num_parameters(), device=device)
    muon, _ = parameter_groups(model, config.train)
    matrices: dict[torch.Size, list[torch.Tensor]] = {}
    for group in muon:
        for weight in group["params"]:
            for matrix in weight.detach().chunk(group.get("parts", 1)):
                matrix = matrix.t() if matrix.size(0) > matrix.size(1) else matrix
                matrices.setdefault(matrix.shape, []).append(matrix)
    dtype = resolve_device_config(config.train, config.model).dtype
    stacks = [torch.stack(batch) for batch in matrices.values()]
    size = sum(stack.numel() for stack in stacks) // dist.get_world_size()
    parts = list(torch.zeros(dist.get_world_size(), size, dtype=dtype, device=device))
    tasks: dict[str, Any] = {
        "all_reduce": lambda: dist.all_reduce(gradients),
        "newton_schulz": lambda: [orthogonalize(stack, dtype) for stack in stacks],
        "all_gather": lambda: dist.all_gather(parts, parts[dist.get_rank()].clone()) if stacks else None,
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats + 1):
        for name, task in tasks.items():
            dist.barrier()
            started = time.perf_counter()
            task()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        print(json.dumps({name: statistics.median(times[1:]) for name, times in seconds.items()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
