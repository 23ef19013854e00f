"""Does the faithful recipe follow the published loss curve? Trains it as far as asked for and prints both.

    python benchmarks/faithful_curve.py                                 # TinyStories from the hub, 1,000 iterations
    python benchmarks/faithful_curve.py --source FOLDER --stop-at 500   # a local copy or a part of it

The schedule is that of all 20,000 iterations, wherever the run stops. Run again, it continues.
"""

from __future__ import annotations

from pathlib import Path

from side_by_side import command_line

import storyllm

# Training loss in nats per token of two published runs of the recipe, each the mean over 500 random batches:
# extremecoder-rgb/StoryLLM and maverick0721/SLM-from-scratch. Both trained on all of TinyStories.
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
) -> int:
    """Prepares the data, trains `faithful` up to iteration `stop_at` and compares."""
    recipe = storyllm.RECIPES["faithful"].override({"data.source": source, "train.stop_at": stop_at})
    storyllm.prepare(recipe.data, data_dir)
    log = storyllm.train(recipe, data_dir, checkpoint_dir)
    print(f"\n{log.run['device']}, torch {log.run['versions']['torch']}, {log.updates[-1]['seconds'] / 60:.0f} minutes")
    print(f"{'iteration':>9} {'published':>17} {'train loss':>11} {'val loss':>9} {'difference':>11}")
    for entry in log.evaluations:
        if entry["iteration"] in PUBLISHED:
            published = PUBLISHED[entry["iteration"]]
            difference = entry["train_loss"] - sum(published) / 2
            print(
                f"{entry['iteration']:>9,} {published[0]:>8.4f} {published[1]:>8.4f} {entry['train_loss']:>11.4f} "
                f"{entry['val_loss']:>9.4f} {difference:>+11.4f}"
            )
    return 130 if log.interrupted else 0


if __name__ == "__main__":
    command_line(main)
