"""Stories to token ids: `storyllm.prepare` against `datasets.map` with a tokenizing function.

    python benchmarks/tokenization.py                               # synthetic stories
    python benchmarks/tokenization.py --source FOLDER --copies 12   # your own, repeated 12 times for a long run

Checks that both write identical bytes. The baseline starts from a dataset that is already loaded; StoryLLM also reads
the stories and computes checksums.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import plain_loop
import pyarrow as pa
import pyarrow.parquet as pq
from common import (
    STORYLLM,
    describe_machine,
    median_seconds,
    peak_memory_mb,
    print_table,
    run_cli,
    run_in_subprocess,
)

import storyllm

# The text of TinyStories' training split: 473,992,236 ids, less one per story, at the 4.06 bytes per id of a sample.
TINYSTORIES_MB = 1_916


def main(
    source: str = "synthetic",
    tokenizer: str = "gpt2",
    repeats: int = 3,
    copies: int = 12,
    memory: bool = True,
    memory_of: str | None = None,
) -> None:
    """Tokenizes the training stories of `source` both ways.

    With `memory`, StoryLLM then prepares the stories once and repeated `copies` times, each in a new process.
    `memory_of`, a source, is for these processes: it prints the time and the peak memory.
    """
    if memory_of is not None:
        print_seconds_and_memory(memory_of, tokenizer)
        return
    print(f"{describe_machine()}, tokenizer {tokenizer}, medians of {repeats}")
    stories = list(storyllm.read_stories(storyllm.DataConfig(source=source, tokenizer=tokenizer), "train"))
    megabytes = sum(len(story.encode()) for story in stories) / 1e6
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_stories(folder / "one", stories, 1)
        compare(folder / "one", tokenizer, folder, megabytes, repeats)
        if memory:
            write_stories(folder / "many", stories, copies)
            print_memory(folder, tokenizer, megabytes, copies)


def compare(source: Path, tokenizer: str, folder: Path, megabytes: float, repeats: int) -> None:
    """Times both ways and compares their files."""
    data = storyllm.DataConfig(source=str(source), tokenizer=tokenizer)
    out_dir = folder / "prepared"
    prepare_quietly(data, out_dir)
    encoding = storyllm.load_tokenizer(out_dir)
    datasets.disable_caching()
    datasets.disable_progress_bars()
    loaded = datasets.Dataset.from_parquet(str(source / "train.parquet"), cache_dir=str(folder / "cache"))
    processes = os.cpu_count() or 1
    functions: dict[str, Callable[[], object]] = {
        STORYLLM: lambda: prepare_quietly(data, without_token_files(out_dir)),
        "datasets.map and a memory map": lambda: plain_loop.prepare(
            loaded, encoding, folder / "baseline.bin", processes
        ),
    }
    seconds = median_seconds(functions, repeats)
    identical = (out_dir / "train.bin").read_bytes() == (folder / "baseline.bin").read_bytes()
    title = f"{megabytes:.0f} MB of stories, identical output: {identical}"
    print_table(title, "MB/s", {name: megabytes / value for name, value in seconds.items()})


def print_memory(folder: Path, tokenizer: str, megabytes: float, copies: int) -> None:
    """Prepares the sources `one` and `many`, and prints peak memory, time, and an estimate for all of TinyStories."""
    sizes = {"one": megabytes, "many": copies * megabytes}
    print("\nmemory and time of `prepare`")
    for name, size in sizes.items():
        seconds, peak = run_in_subprocess(__file__, "--tokenizer", tokenizer, "--memory-of", str(folder / name))
        print(f"  {size:>8,.0f} MB of stories: peak memory {peak:,.0f} MB, {seconds:.1f} s, {size / seconds:.1f} MB/s")
    total = TINYSTORIES_MB / sizes["many"] * seconds
    print(f"  {TINYSTORIES_MB:>8,} MB, TinyStories' training split: {total:.0f} s (extrapolated)")


def print_seconds_and_memory(source: str, tokenizer: str) -> None:
    """Prepares `source` and prints the seconds and the peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        prepare_quietly(storyllm.DataConfig(source=source, tokenizer=tokenizer), Path(folder))
        print(time.perf_counter() - started, peak_memory_mb())


def write_stories(folder: Path, stories: list[str], copies: int) -> None:
    """Writes the stories `copies` times as train.parquet, and ten of them as validation.parquet."""
    folder.mkdir()
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(folder / "train.parquet", schema) as writer:
        for _ in range(copies):
            writer.write_table(pa.table({"text": stories}, schema=schema))
    pq.write_table(pa.table({"text": stories[:10]}, schema=schema), folder / "validation.parquet")


def prepare_quietly(data: storyllm.DataConfig, folder: Path) -> None:
    """`storyllm.prepare` without its progress bars."""
    with contextlib.redirect_stdout(io.StringIO()):
        storyllm.prepare(data, folder)


def without_token_files(folder: Path) -> Path:
    """Deletes the `.bin` files, which `prepare` would otherwise reuse, and returns the folder."""
    for path in folder.glob("*.bin"):
        path.unlink()
    return folder


if __name__ == "__main__":
    run_cli(main)
