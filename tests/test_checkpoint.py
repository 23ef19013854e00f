"""Model files: complete in themselves, loaded without executing anything, and rejected if they are not intact."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, environment, flip_bit, folder_contents

from storyllm import GPT, StoryLLMError, load, load_tokenizer
from storyllm.checkpoint import (
    CorruptedCheckpointError,
    load_checkpoint,
    model_contents,
    restore_model,
    save_checkpoint,
)


@pytest.fixture
def contents(tiny_data: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    return model_contents(GPT(TINY.model), load_tokenizer(tiny_data), TINY)


@pytest.fixture
def path(contents: dict[str, Any], tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "best_model_params.pt", contents)
    return tmp_path / "best_model_params.pt"


@contextmanager
def file_size_limit(size: int):
    """Writing more than `size` bytes to a file fails in this block, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_model_is_restored_to_the_bit(contents, path):
    model, tokenizer, recipe = restore_model(load_checkpoint(path), path)
    assert recipe == TINY
    assert not model.training
    weights = model.state_dict()
    assert weights.keys() == contents["model"].keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in contents["model"].items())
    assert tokenizer.decode(tokenizer.encode_ordinary("A crab sang.")) == "A crab sang."


def test_a_restored_model_has_tied_weights_and_can_be_trained(path):
    model, _, _ = restore_model(load_checkpoint(path), path)
    assert model.lm_head.weight is model.transformer["wte"].weight
    idx = torch.zeros(1, 4, dtype=torch.long)
    model.train().loss(idx, idx).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_checkpoint_is_all_that_a_new_process_needs(path, tmp_path):
    program = "import sys, storyllm; print(*storyllm.load(sys.argv[1]).score('One day').tokens, sep='')"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program, str(path.rename(elsewhere / "story.pt"))],
        cwd=elsewhere,
        env={**environment(), "TIKTOKEN_CACHE_DIR": str(elsewhere)},  # an empty cache
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("One day"), done.stderr
    assert done.stderr == ""


def test_tied_weights_are_stored_once(contents, path):
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in contents["model"].values()}
    assert path.stat().st_size < sum(weights.values()) + 50_000


def test_a_checkpoint_from_before_a_field_existed_has_its_default(path):
    contents = load_checkpoint(path)
    del contents["recipe"]["model"]["activation"]
    save_checkpoint(path, contents)
    assert load(path).model.config.activation == "gelu"


def test_loading_does_not_use_the_global_generator(path):
    before = torch.get_rng_state()
    load(path)
    assert torch.equal(before, torch.get_rng_state())


def test_earlier_versions_are_kept(contents, tmp_path):
    for number in range(4):
        save_checkpoint(tmp_path / "last.pt", {**contents, "number": number}, keep=2)
    numbers = {file.name: load_checkpoint(file)["number"] for file in tmp_path.iterdir()}
    assert numbers == {"last.pt": 3, "last.1.pt": 2, "last.2.pt": 1}


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.5, 0.999999])
def test_a_truncated_file_is_rejected(path, fraction):
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(CorruptedCheckpointError, match=r"best_model_params\.pt"):
        load(path)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_flipped_bit_in_the_weights_is_detected(path, fraction):
    flip_bit(path, int(fraction * path.stat().st_size), bit=3)
    with pytest.raises(CorruptedCheckpointError, match=r"best_model_params\.pt"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "other",
    [
        lambda contents: {"model": contents["model"]},
        lambda contents: contents["model"],
        lambda contents: {**contents, "format": "storyllm 99"},
        lambda contents: [1, 2],
    ],
)
def test_a_file_of_another_program_is_rejected(path, contents, other):
    torch.save(other(contents), path)
    with pytest.raises(CorruptedCheckpointError, match="StoryLLM"):
        load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["recipe"]["model"].update(n_embd=64),
        lambda c: c["recipe"]["model"].update(n_layer=3),
        lambda c: c["recipe"]["model"].update(vocab_size=299),
        lambda c: c["recipe"]["model"].update(n_head=5),
        lambda c: c["recipe"]["model"].update(surprise=1),
        lambda c: c["model"].pop("lm_head.weight"),
        lambda c: c["model"].update({"lm_head.weight": c["model"]["lm_head.weight"] + 1}),  # not tied
        lambda c: c["model"].update(extra=torch.ones(1)),
        lambda c: c["model"].update({"transformer.ln_f.weight": torch.ones(32, dtype=torch.float16)}),
        lambda c: c.pop("tokenizer"),
        lambda c: c["tokenizer"].update(tokens="AA=="),
        lambda c: c.update(recipe=None),
        lambda c: c.update(model=[1]),
    ],
)
def test_inconsistent_contents_are_rejected_in_one_line(path, change):
    contents = load_checkpoint(path)
    change(contents)
    save_checkpoint(path, contents)
    with pytest.raises(StoryLLMError, match=r"weights in .*best_model_params\.pt") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_rejected(tmp_path):
    for missing in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(StoryLLMError, match=f"{missing}.*not found"):
            load(missing)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any file")
def test_a_file_without_read_permission_is_rejected(path):
    path.chmod(0)
    with pytest.raises(StoryLLMError, match=r"best_model_params\.pt.*permission"):
        load(path)


def test_contents_that_cannot_be_saved_leave_the_old_file(path, contents):
    before = folder_contents(path.parent)
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {**contents, "function": lambda: None})
    assert folder_contents(path.parent) == before


@pytest.mark.parametrize("size", [0, 10_000, 90_000])
def test_a_full_disk_is_a_one_line_error_and_leaves_the_old_file(path, contents, size):
    before = folder_contents(path.parent)
    message = r"write .*best_model_params\.pt \(File too large\); free some space"
    with file_size_limit(size), pytest.raises(StoryLLMError, match=message) as caught:
        save_checkpoint(path, contents)
    assert "\n" not in str(caught.value)
    assert folder_contents(path.parent) == before


def test_a_runtime_error_of_pytorchs_writer_is_a_one_line_error(path, contents, monkeypatch):
    """What `torch.save` raises on a full disk in some versions of PyTorch."""
    before = folder_contents(path.parent)

    def fail(contents, file):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664]\nunexpected pos 96640 vs 96534")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(StoryLLMError, match=r"write .*best_model_params\.pt.*unexpected pos.*space"):
        save_checkpoint(path, contents)
    assert folder_contents(path.parent) == before
