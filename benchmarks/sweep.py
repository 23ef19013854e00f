"""Which settings learn most from few tokens? Trains one run a row, and prints what each came to on held-out stories.

    storyllm prepare --source TRAINING_STORIES --tokenizer bpe:2048 --validation-fraction 0.03 --out sweep_data
    python benchmarks/sweep.py --data-dir sweep_data --base "model.n_layer=3 model.n_embd=192" --tokens 1000000 \\
        --rows "train.learning_rate=2e-3" "train.learning_rate=4e-3" "train.optimizer=adamw train.learning_rate=2e-3"

A row is fields of the recipe with their values, on top of --base. The schedule is made for --tokens: warm-up and decay
are shares of it. Runs are kept in --folder: a sweep that was cut off continues, and no run is made twice.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from side_by_side import command_line, machine

import storyllm


def fields(row: str) -> dict[str, object]:
    """{name: value} of "name=value name=value"; values as in JSON, or plain words."""
    found: dict[str, object] = {}
    for assignment in row.split():
        name, _, value = assignment.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def main(
    rows: list[str],
    data_dir: Path = Path("sweep_data"),
    recipe: str = "faithful",
    base: str = "",
    tokens: int = 1_000_000,
    warmup: float = 0.05,
    decay: float = 0.6,
    seeds: int = 1,
    folder: Path = Path("checkpoints/sweep"),
) -> int:
    """Trains a run for each row and seed on `tokens` tokens; prints its loss on the whole held-out file."""
    print(f"{machine()}\n{recipe}, {base}, {tokens:,} tokens, warm-up {warmup:g}, decay {decay:g} of them")
    print(f"{'loss':>8} {'bits/byte':>10} {'minutes':>8}  row")
    for row in rows:
        for seed in range(seeds):
            changed = storyllm.get_recipe(recipe).override({**fields(base), **fields(row), "train.seed": seed})
            iterations = max(1, tokens // (changed.train.batch_size * changed.model.block_size))
            schedule = {"warmup_iters": int(warmup * iterations), "decay_iters": int(decay * iterations)}
            schedule |= {"max_iters": iterations, "eval_interval": iterations, "eval_windows": 64}
            changed = changed.override({f"train.{name}": value for name, value in schedule.items()})
            name = hashlib.sha256(json.dumps(changed.to_dict()).encode()).hexdigest()[:12]
            started = time.monotonic()
            with redirect_stdout(StringIO()):
                log = storyllm.train(changed, data_dir, folder / name)
            if log.interrupted:
                return 128 + log.interrupted
            minutes = (log.updates[-1]["seconds"] if log.updates else time.monotonic() - started) / 60
            report = storyllm.evaluate(storyllm.load(folder / name / "last.pt"), data_dir / "validation.bin")
            seed_shown = f", seed {seed}" if seeds > 1 else ""
            print(f"{report.loss:>8.4f} {report.bits_per_byte:>10.4f} {minutes:>8.1f}  {row}{seed_shown}", flush=True)
    return 0


if __name__ == "__main__":
    command_line(main)
