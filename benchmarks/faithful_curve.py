"""Does `faithful` follow the published loss curve? Trains it up to an iteration and prints both.

    python benchmarks/faithful_curve.py                                 # TinyStories from the Hub, 1,000 iterations
    python benchmarks/faithful_curve.py --source FOLDER --stop-at 500   # local stories

The learning rate schedule is always that of 20,000 iterations. An interrupted run resumes.
"""

from __future__ import annotations

from pathlib import Path

from common import published_curve, run_cli

import storyllm


def main(
    source: str = "roneneldan/TinyStories",
    data_dir: Path = Path("data"),
    checkpoint_dir: Path = Path("checkpoints/faithful"),
    stop_at: int = 1_000,
    eval_windows: int = 1_024,
) -> int:
    """Prepares the data, trains `faithful` up to iteration `stop_at`, and prints its losses next to the published.

    The losses are measured on `eval_windows` windows per split.
    """
    changes = {"data.source": source, "train.stop_at": stop_at, "train.eval_windows": eval_windows}
    recipe = storyllm.get_recipe("faithful").override(changes)
    storyllm.prepare(recipe.data, data_dir)
    log = storyllm.train(recipe, data_dir, checkpoint_dir)
    print_comparison(log)
    return 128 + log.interrupted if log.interrupted else 0


def print_comparison(log: storyllm.Log) -> None:
    """Prints the evaluations of a run at the iterations with published losses."""
    published = {row["iteration"]: (row["train_loss_a"], row["train_loss_b"]) for row in published_curve()}
    minutes = log.updates[-1]["seconds"] / 60 if log.updates else 0
    print(f"\n{log.run['device']}, torch {log.run['versions']['torch']}, {minutes:.0f} minutes")
    print(f"{'iteration':>9} {'published':>17} {'train loss':>11} {'val loss':>9} {'difference':>11}")
    for entry in log.evaluations:
        if entry["iteration"] in published:
            first, second = published[entry["iteration"]]
            difference = entry["train_loss"] - (first + second) / 2
            print(
                f"{entry['iteration']:>9,} {first:>8.4f} {second:>8.4f} {entry['train_loss']:>11.4f} "
                f"{entry['val_loss']:>9.4f} {difference:>+11.4f}"
            )


if __name__ == "__main__":
    run_cli(main)
