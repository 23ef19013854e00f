"""Fixtures shared by the reliability tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import SAVE_EVERY_UPDATE, TINY

import storyllm


@pytest.fixture(scope="session")
def first_sixteen(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of TINY that stopped at iteration 16 of 22, with two previous versions of last.pt. Read-only."""
    folder = tmp_path_factory.mktemp("first_sixteen")
    storyllm.train(TINY.override({"train.stop_at": 16, **SAVE_EVERY_UPDATE}), tiny_data, folder)
    assert {path.name for path in folder.glob("last*")} == {"last.pt", "last.1.pt", "last.2.pt"}
    return folder


@pytest.fixture
def unfinished(first_sixteen: Path, tmp_path: Path) -> Path:
    """A copy of the run that stopped at iteration 16, to change and to resume."""
    return Path(shutil.copytree(first_sixteen, tmp_path / "unfinished"))
