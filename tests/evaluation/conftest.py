"""A report of tiny models, and pages in a browser, for the tests of the report and of the rating sheets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY

import storyllm
from storyllm import GPT, StoryReport, Storyteller


@pytest.fixture(scope="session")
def judged(tiny_data: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[StoryReport, Path]:
    """The report on a trained and an untrained model, and its folder. Read-only."""
    pytest.importorskip("sacrebleu", reason='sacrebleu is not installed (pip install "storyllm[judge]")')
    torch.manual_seed(0)
    untrained = Storyteller(GPT(TINY.model), storyllm.load_tokenizer(tiny_data))
    folder = tmp_path_factory.mktemp("judged") / "report"
    models = {"trained": tiny_run / "best_model_params.pt", "untrained": untrained}
    return storyllm.judge(models, tiny_data, folder, beginnings=4, max_new_tokens=60, device="cpu"), folder


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Opens a file in an empty browser profile, and fails the test if the page logs an error or requests anything."""
    problems: list[str] = []
    contexts = []

    def open_file(path: Path, width: int = 1280, context: Any = None, **options: Any) -> Any:
        context = context or browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: problems.append(request.url) if "http" in request.url[:5] else None)
        page.goto(path.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert problems == []
