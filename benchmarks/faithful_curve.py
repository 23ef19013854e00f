"""Does `faithful` follow the published loss curve? Trains it up to an iteration and prints both.

    python benchmarks/faithful_curve.py                                 # TinyStories from the Hub, 1,000 iterations
    python benchmarks/faithful_curve.py --source FOLDER --stop-at 500   # local stories

The learning rate schedule is always that of 20,000 iterations. An interrupted run resumes.
"""

from __future__ import annotations

from pathlib import Path

from common import run_cli

import storyllm

# Training loss in nats per token of two published runs of the recipe on all of TinyStories, each the mean over 500
# random batches: extremecoder-rgb/StoryLLM and maverick0721/SLM-from-scratch.
PUBLISHED = {
    500: (9.4434, 9.4308),
    1000: (8.4843, 8.4780),
    1500: (7.5319, 7.5385),
    2000: (6.6829, 6.6834),
    2500: (5.9868, 5.9840),
    3000: (5.4754, 5.4793),
    4000: (4.7278, 4.7407),
    5000: (4.2813, 4.2824),
    10000: (3.1863, 3.1836),
    15000: (2.6693, 2.6687),
    19500: (2.3933, 2.3944),
}


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
    minutes = log.updates[-1]["seconds"] / 60 if log.updates else 0
    print(f"\n{log.run['device']}, torch {log.run['versions']['torch']}, {minutes:.0f} minutes")
    print(f"{'iteration':>9} {'published':>17} {'train loss':>11} {'val loss':>9} {'difference':>11}")
    for entry in log.evaluations:
        if entry["iteration"] in PUBLISHED:
            first, second = PUBLISHED[entry["iteration"]]
            difference = entry["train_loss"] - (first + second) / 2
            print(
                f"{entry['iteration']:>9,} {first:>8.4f} {second:>8.4f} {entry['train_loss']:>11.4f} "
                f"{entry['val_loss']:>9.4f} {difference:>+11.4f}"
            )


if __name__ == "__main__":
    run_cli(main)
