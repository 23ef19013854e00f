"""How many different names does a generated story use? A model that cannot keep a name has not learned to copy.

    storyllm prepare --recipe demo --out data
    storyllm train --recipe demo --data-dir data --checkpoint-dir checkpoints
    python benchmarks/names.py checkpoints/best_model_params.pt

For models of the synthetic stories, whose characters have one of 32 names each. Most of these stories use one or two.
"""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from common import run_cli
from tyro.conf import Positional

import storyllm
from storyllm.data.synthetic import NAMES

ALL_NAMES = {name for names in NAMES.values() for name in names}


def different_names(story: str) -> int:
    """The number of different names in a story."""
    return len(set(re.findall(r"\w+", story)) & ALL_NAMES)


def main(
    checkpoints: Positional[tuple[Path, ...]], stories: int = 200, temperature: float = 0.5, seed: int = 0
) -> None:
    """Generates stories without a prompt and counts the names in each. The first row is the corpus."""
    print(f"{'names per story':>16} {'at most two':>12}   {stories} stories, temperature {temperature:g}, seed {seed}")
    corpus = list(islice(storyllm.read_stories(storyllm.get_recipe("demo").data, "validation"), stories))
    rows = {"the corpus": corpus}
    for path in checkpoints:
        storyteller = storyllm.load(path)
        rows[str(path)] = storyteller.generate([""] * stories, temperature=temperature, seed=seed)
    for name, texts in rows.items():
        counts = [different_names(text) for text in texts]
        print(f"{sum(counts) / len(counts):>16.2f} {sum(n <= 2 for n in counts) / len(counts):>12.3f}   {name}")


if __name__ == "__main__":
    run_cli(main)
