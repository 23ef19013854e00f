"""Stories to token ids: `storyllm.prepare` against a tokenizing function for `datasets.map`, byte for byte the same.

    python benchmarks/tokenizing.py                                      # built-in stories
    python benchmarks/tokenizing.py --source FOLDER --copies 12          # real ones, 12 times over for a long run

The peer starts from a dataset that is loaded already; ours reads, tokenizes, writes and takes its checksums.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from pathlib import Path

import datasets
import plain_loop
import pyarrow as pa
import pyarrow.parquet as pq
from side_by_side import command_line, in_own_process, in_turn, machine, peak_memory, print_table

import storyllm

# The text of TinyStories' training split: 473,992,236 ids less one a story, at the 4.06 bytes that a sample has an id.
DATASET_MEGABYTES = 1_916


def main(
    source: str = "builtin",
    tokenizer: str = "gpt2",
    repeats: int = 3,
    copies: int = 12,
    alone: str | None = None,
) -> None:
    """Tokenizes the training stories of `source` both ways, then `copies` times as many ours alone.

    `alone`, a folder, is for the processes that it starts itself.
    """
    if alone is not None:
        return prepare_alone(alone, tokenizer)
    print(f"{machine()}, tokenizer {tokenizer}, medians of {repeats}")
    data = storyllm.DataConfig(source=source, tokenizer=tokenizer)
    stories = list(storyllm.read_stories(data, "train"))
    megabytes = sum(len(story.encode()) for story in stories) / 1e6
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "one", stories, 1)
        write(folder / "many", stories, copies)
        local = storyllm.DataConfig(source=str(folder / "one"), tokenizer=tokenizer)
        prepare_quietly(local, folder / "ours")
        encoding = storyllm.read_tokenizer(folder / "ours")
        datasets.disable_caching()
        datasets.disable_progress_bars()
        loaded = datasets.Dataset.from_parquet(str(folder / "one" / "train.parquet"), cache_dir=str(folder / "cache"))
        functions = {
            "ours": lambda: prepare_quietly(local, fresh(folder / "ours")),
            "datasets.map, shards into a memory map": lambda: plain_loop.prepare(
                loaded, encoding, folder / "peer.bin", os.cpu_count() or 1
            ),
        }
        seconds = in_turn(functions, repeats)
        same = (folder / "ours" / "train.bin").read_bytes() == (folder / "peer.bin").read_bytes()
        rates = {name: megabytes / value for name, value in seconds.items()}
        print_table(f"{megabytes:.0f} MB, the same bytes: {same}", "MB/s", rates, less_is_better=False)

        print(f"\nmemory, and a long run ({copies} copies)")
        few, many = (
            in_own_process(__file__, "--tokenizer", tokenizer, "--alone", str(folder / kind))
            for kind in ("one", "many")
        )
        print(f"  peak memory for {megabytes:,.0f} MB of stories     {few[1]:>8,.0f} MB")
        print(f"  peak memory for {copies * megabytes:,.0f} MB of stories    {many[1]:>8,.0f} MB")
        print(f"  {copies * megabytes:,.0f} MB took {many[0]:.1f} s, {copies * megabytes / many[0]:.1f} MB/s")
        whole = DATASET_MEGABYTES / copies / megabytes * many[0]
        print(f"  so all of TinyStories' training split ({DATASET_MEGABYTES:,} MB): {whole:.0f} s")


def write(folder: Path, stories: list[str], copies: int) -> None:
    folder.mkdir()
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(folder / "train.parquet", schema) as writer:
        for _ in range(copies):
            writer.write_table(pa.table({"text": stories}, schema=schema))
    pq.write_table(pa.table({"text": stories[:10]}, schema=schema), folder / "validation.parquet")


def prepare_quietly(data: storyllm.DataConfig, folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bar
        storyllm.prepare(data, folder)


def fresh(folder: Path) -> Path:
    """The folder without what a preparation made: done already, it would be nothing to do."""
    for path in folder.glob("*.bin"):
        path.unlink()
    return folder


def prepare_alone(source: str, tokenizer: str) -> None:
    """Prepares `source` and prints the seconds that it took and the process's peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        prepare_quietly(storyllm.DataConfig(source=source, tokenizer=tokenizer), Path(folder))
        print(time.perf_counter() - started, peak_memory())


if __name__ == "__main__":
    command_line(main)
