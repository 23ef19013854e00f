"""What does a token teach? Trains recipes on the same stories, and compares their losses on all validation stories.

    python benchmarks/learning_curves.py --source FOLDER --runs fast --tokens 2500000             # what README claims
    python benchmarks/learning_curves.py --source FOLDER --tokens 4400000 --seeds 3               # for a GPU
    python benchmarks/learning_curves.py --source FOLDER --runs fast --tokens 82000000 --seeds 3  # as long as faithful

FOLDER holds stories with a validation split. A run's schedule is made for --tokens, but for `faithful`, which keeps
its own and stops there. Runs are kept in --folder: what was cut off continues, and no run is made twice.
"""

from __future__ import annotations

from pathlib import Path

from side_by_side import command_line, machine

import storyllm

# {name: (recipe, changes)}
RUNS = {
    "faithful": ("faithful", {}),
    "fast": ("fast", {}),
    "adamw": ("fast", {"train.optimizer": "adamw", "train.learning_rate": 1e-3}),  # the best for AdamW alone
    "small-vocab": ("small-vocab", {}),
}


def main(
    source: str = "roneneldan/TinyStories",
    runs: tuple[str, ...] = ("faithful", "fast", "adamw"),
    tokens: int = 2_500_000,
    seeds: int = 1,
    folder: Path = Path("checkpoints/learning_curves"),
    out: Path | None = None,
    dtype: str = "auto",
    eval_windows: int = 256,
) -> int:
    """Trains each run with each seed on `tokens` tokens; prints a table, and draws the figure `out`.

    The curves are losses on `eval_windows` fixed windows, the table's on all validation stories.
    """
    print(machine())
    print(f"{'run':<12} {'seed':>4} {'tokens':>12} {'parameters':>11} {'loss':>7} {'bits/byte':>9} {'minutes':>8}")
    logs: dict[str, storyllm.Log] = {}
    for name in runs:
        base, changes = RUNS[name]
        for seed in range(seeds):
            recipe = storyllm.get_recipe(base).override(
                {**changes, "data.source": source, "train.seed": seed, "train.dtype": dtype}
            )
            per_iteration = recipe.train.batch_size * recipe.model.block_size
            iterations = max(1, tokens // per_iteration)
            limit = "train.stop_at" if base == "faithful" else "train.max_iters"
            evaluations = {"train.eval_interval": max(1, iterations // 20), "train.eval_windows": eval_windows}
            recipe = recipe.override({limit: iterations, **evaluations})
            data_dir = folder / f"data-{recipe.data.tokenizer.replace(':', '')}"
            run = folder / f"{name}-{iterations * per_iteration}-{seed}"
            storyllm.prepare(recipe.data, data_dir)
            log = storyllm.train(recipe, data_dir, run)
            if log.interrupted:
                return 128 + log.interrupted
            report = storyllm.evaluate(storyllm.load(run / "last.pt"), data_dir / "validation.bin")
            print(
                f"{name:<12} {seed:>4} {iterations * per_iteration:>12,} {log.run['parameters']:>11,} "
                f"{report.loss:>7.4f} {report.bits_per_byte:>9.4f} {log.updates[-1]['seconds'] / 60:>8.1f}",
                flush=True,
            )
            logs[name if seeds == 1 else f"{name}, seed {seed}"] = log
    if out is not None:
        storyllm.plot_runs(logs, out)
    return 0


if __name__ == "__main__":
    command_line(main)
