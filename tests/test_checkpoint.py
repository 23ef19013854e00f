"""Checkpoints: they load alone, anywhere, and what is not one is refused in one line."""

import os
import subprocess
import sys

import pytest
import torch

from storyllm import GPT, Recipe, StoryLLMError, load
from storyllm.checkpoint import check_same_run, load_checkpoint, model_contents, restore_model, save_checkpoint
from storyllm.tokens import read_tokenizer


@pytest.fixture
def contents(tiny_data):
    tokenizer = read_tokenizer(tiny_data)
    recipe = Recipe().override(
        {"model.vocab_size": 300, "model.block_size": 16, "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 32}
    )
    torch.manual_seed(0)
    return model_contents(GPT(recipe.model), tokenizer, recipe)


@pytest.fixture
def path(contents, tmp_path):
    save_checkpoint(tmp_path / "best_model_params.pt", contents)
    return tmp_path / "best_model_params.pt"


def test_a_model_comes_back_to_the_bit(contents, path):
    model, tokenizer, recipe = restore_model(load_checkpoint(path), path)
    assert recipe.to_dict() == contents["recipe"]
    assert not model.training
    assert {name: t.tolist() for name, t in model.state_dict().items()} == {
        name: t.tolist() for name, t in contents["model"].items()
    }
    assert tokenizer.decode(tokenizer.encode_ordinary("A crab sang.")) == "A crab sang."


def test_it_loads_alone_in_another_folder_without_network_or_cache(path, tmp_path):
    program = "import sys, storyllm; print(storyllm.load(sys.argv[1]).tell('One day', max_new_tokens=3, seed=0))"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "TIKTOKEN_CACHE_DIR": str(elsewhere), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("One day"), done.stderr


def test_the_tied_weight_is_stored_once(contents, path):
    weights = {t.data_ptr(): t.nbytes for t in contents["model"].values()}
    assert path.stat().st_size < sum(weights.values()) + 50_000


def test_loading_leaves_the_random_generator_as_it_was(path):
    before = torch.get_rng_state()
    load(path)
    assert torch.equal(before, torch.get_rng_state())


def test_a_file_cut_short_anywhere_is_refused(path):
    whole = path.read_bytes()
    for size in [0, 1, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(StoryLLMError, match=r"best_model_params\.pt is damaged or not a checkpoint"):
            load(path)


def test_what_is_not_ours_is_refused(path, contents):
    for other in [{"model": contents["model"]}, [1, 2], contents["model"], {**contents, "format": "storyllm 99"}]:
        torch.save(other, path)
        with pytest.raises(StoryLLMError, match="is not a StoryLLM checkpoint"):
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
        lambda c: c["model"].update(extra=torch.ones(1)),
        lambda c: c.pop("tokenizer"),
        lambda c: c["tokenizer"].update(tokens="AA=="),
        lambda c: c.update(recipe=None),
    ],
)
def test_weights_that_do_not_fit_are_refused(path, change):
    broken = load_checkpoint(path)
    change(broken)
    save_checkpoint(path, broken)
    with pytest.raises(StoryLLMError, match=r"best_model_params\.pt holds weights that do not fit") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(StoryLLMError, match="there is no checkpoint"):
        load(tmp_path / "none.pt")


def test_a_failed_save_leaves_the_old_one(path, contents):
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {**contents, "what cannot be saved": lambda: None})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 96640")])
def test_a_full_disk_is_one_line_and_the_earlier_file_stays(path, contents, monkeypatch, error):
    before = path.read_bytes()

    def full(contents, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StoryLLMError, match=r"best_model_params\.pt cannot be written .*make room") as caught:
        save_checkpoint(path, contents)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


DATA = {"train": "0", "validation": "1"}
STATE = {
    "optimizer": {},
    "data_sha256": DATA,
    "device": "cpu",
    "iteration": 3,
    "evaluated": 0,
    "best_val_loss": 5.0,
    "seconds": 1.0,
    "log_bytes": 100,
    "skipped_updates": 0,
    "micro_batch_size": 4,
}


@pytest.mark.parametrize(
    "change",
    [
        *({name: None} for name in ("recipe", "data_sha256", "device")),
        *({name: None} for name in ("iteration", "evaluated", "log_bytes", "seconds", "skipped_updates")),
        *({"iteration": value} for value in (-1, 2.5, "3", [3], True)),
        *({"micro_batch_size": 0}, {"best_val_loss": "low"}, {"seconds": float("nan")}),
    ],
)
def test_a_state_that_lacks_something_is_refused(contents, change, tmp_path):
    saved = {**contents, **STATE}
    recipe = Recipe.from_dict(contents["recipe"])
    check_same_run(saved, recipe, DATA, tmp_path / "last.pt")
    without = {name: value for name, value in saved.items() if name not in change}
    for damaged in ({**saved, **change}, without):
        if damaged == saved:
            continue
        with pytest.raises(StoryLLMError, match=r"last\.pt "):
            check_same_run(damaged, recipe, DATA, tmp_path / "last.pt")
