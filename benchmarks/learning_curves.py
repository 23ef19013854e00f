"""How much does a recipe learn from each token? Trains recipes on the same stories and compares their losses.

    python benchmarks/learning_curves.py --source FOLDER --runs fast --tokens 2500000
    python benchmarks/learning_curves.py --source FOLDER --runs fast adamw --published --out curves.png
    python benchmarks/learning_curves.py --source FOLDER --runs fast --tokens 4400000 --seeds 3   # for a GPU
    python benchmarks/learning_curves.py --source FOLDER --runs fast --tokens 20000000 \\
        --settings "train.batch_size=32 train.weight_decay=0.5"

A run is a recipe's name, or "adamw": `fast` with AdamW alone. --settings changes fields of all of them. The schedule of
a run spans --tokens, except for `faithful`, which keeps its own and stops early. Runs are kept in --folder: an
interrupted one resumes, and completed ones are not repeated. The stories need a validation split.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from common import describe_machine, published_curve, run_cli
from sweep import parse_settings

import storyllm

# Runs that differ from a recipe: {name: (recipe, changes)}. The learning rate is the best one found for AdamW alone.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("fast", {"train.optimizer": "adamw", "train.learning_rate": 1e-3})
}


def main(
    source: str = "roneneldan/TinyStories",
    runs: tuple[str, ...] = ("faithful", "fast", "adamw"),
    tokens: int = 2_500_000,
    seeds: int = 1,
    folder: Path = Path("checkpoints/learning_curves"),
    out: Path | None = None,
    published: bool = False,
    dtype: str = "auto",
    eval_windows: int = 256,
    settings: str = "",
) -> int:
    """Trains each run with each seed on `tokens` tokens and prints a row with its loss on all validation stories.

    `out` is a figure of the losses during training, which are measured on `eval_windows` fixed windows. With
    `published`, it also shows the published curve of `faithful`.
    """
    print(describe_machine())
    print(f"{'run':<12} {'seed':>4} {'tokens':>12} {'parameters':>11} {'loss':>7} {'bits/byte':>9} {'minutes':>8}")
    logs: dict[str, str | Path | storyllm.Log] = {}
    for name in runs:
        for seed in range(seeds):
            changes = {**parse_settings(settings), "train.dtype": dtype, "train.eval_windows": eval_windows}
            recipe = make_recipe(name, source, seed, tokens, changes)
            data_dir = folder / f"data-{recipe.data.tokenizer.replace(':', '')}"
            trained_tokens = recipe.train.last_iteration * recipe.train.batch_size * recipe.model.block_size
            suffix = f" {settings}" if settings else ""
            run_dir = folder / f"{name}-{trained_tokens}-{seed}{suffix}"
            storyllm.prepare(recipe.data, data_dir)
            log = storyllm.train(recipe, data_dir, run_dir)
            if log.interrupted:
                return 128 + log.interrupted
            report = storyllm.evaluate(storyllm.load(run_dir / "last.pt"), data_dir / "validation.bin")
            print(
                f"{name:<12} {seed:>4} {trained_tokens:>12,} {log.run['parameters']:>11,} "
                f"{report.loss:>7.4f} {report.bits_per_byte:>9.4f} {log.updates[-1]['seconds'] / 60:>8.1f}",
                flush=True,
            )
            logs[name if seeds == 1 else f"{name}, seed {seed}"] = log
    if published:
        logs["published run of faithful"] = published_log()
    if out is not None:
        storyllm.plot_runs(logs, out)
    return 0


def make_recipe(run: str, source: str, seed: int, tokens: int, changes: dict[str, Any]) -> storyllm.Recipe:
    """The recipe of a run, with the number of iterations that `tokens` gives and about 20 evaluations."""
    name, variant = VARIANTS.get(run, (run, {}))
    recipe = storyllm.get_recipe(name).override({**variant, **changes})
    iterations = max(1, tokens // (recipe.train.batch_size * recipe.model.block_size))
    return recipe.override(
        {
            "data.source": source,
            "train.seed": seed,
            "train.stop_at" if name == "faithful" else "train.max_iters": iterations,
            "train.eval_interval": max(1, iterations // 20),
        }
    )


def published_log() -> storyllm.Log:
    """Run B of published_curve.csv, at constant speed. One of its tokens stands for 4.06 bytes of text."""
    recipe = storyllm.get_recipe("faithful")
    evaluations = [
        {
            "iteration": row["iteration"],
            "val_loss": row["val_loss_b"],
            "val_bits_per_byte": row["val_loss_b"] / math.log(2) / 4.06,
            "seconds": 13_882 * row["iteration"] / recipe.train.max_iters,
        }
        for row in published_curve()
    ]
    return storyllm.Log(run={"recipe": recipe.to_dict()}, evaluations=evaluations)


if __name__ == "__main__":
    run_cli(main)
