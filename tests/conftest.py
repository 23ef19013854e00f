"""Fixtures shared by the tests. No test uses the network; a test skips if something it needs is not installed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SAMPLE_DATA, TINY, Ranks, random_stories

import storyllm

torch.set_num_threads(1)  # more threads only add overhead for models this small
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it


@pytest.fixture(scope="session")
def sample_stories() -> Path:
    """The folder of real TinyStories."""
    folder = SAMPLE_DATA / "tinystories"
    if not folder.is_dir() or not any(folder.rglob("*")):
        pytest.skip("the sample data (real TinyStories) is not available")
    return folder


@pytest.fixture
def gpt2_cache(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiktoken cache with GPT-2's vocabulary."""
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or SAMPLE_DATA / "tiktoken")
    if not folder.is_dir() or not any(folder.iterdir()):
        pytest.skip("GPT-2's vocabulary is not in tiktoken's cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder prepared from 400 random stories with `bpe:300`, 10% for validation. Read-only."""
    folder = tmp_path_factory.mktemp("tiny_data")
    text = folder / "stories.txt"
    text.write_bytes("\n<|endoftext|>\n".join(random_stories(400)).encode())
    config = storyllm.DataConfig(source=str(text), tokenizer="bpe:300", validation_fraction=0.1)
    info = storyllm.prepare(config, folder / "prepared")
    assert min(info.train.tokens, info.validation.tokens) > 2_000
    return folder / "prepared"


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete, uninterrupted run of TINY on `tiny_data`. Read-only."""
    folder = tmp_path_factory.mktemp("tiny_run")
    storyllm.train(TINY, tiny_data, folder)
    return folder


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Starts the processes of runs on several processes, with gloo."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the processes are forked")
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")  # while it runs, nothing else may use asyncio
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("Chromium is not installed")
    if sys.platform != "linux":
        pytest.skip("the browser tests use Linux")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"], timeout=120_000)
        yield browser
        browser.close()
