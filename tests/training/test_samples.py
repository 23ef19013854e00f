"""Samples during training: when they are generated, that they change nothing else, and how they are shown."""

from __future__ import annotations

import pytest
from helpers import SAVE_EVERY_UPDATE, TINY, interrupted_in_the_third_update, losses, weights

from storyllm import Log, StoryLLMError, load, read_log, samples_table, train
from storyllm.training.samples import MAX_NEW_TOKENS, TEMPERATURE

SAMPLED = TINY.override({"train.sample_interval": 5, "train.sample_prompt": "One day"})
DUE = [0, 5, 10, 15, 20, 22]  # as for evaluations: multiples of the interval, and the end


def samples(folder):
    return [(sample["iteration"], sample["text"]) for sample in read_log(folder / "log.jsonl").samples]


@pytest.fixture(scope="module")
def sampled_run(tiny_data, tmp_path_factory):
    """The folder of an uninterrupted run of SAMPLED. Read-only."""
    folder = tmp_path_factory.mktemp("sampled")
    train(SAMPLED, tiny_data, folder)
    return folder


# During training


def test_a_sample_continues_the_prompt_at_each_interval_and_the_end(sampled_run):
    log = read_log(sampled_run / "log.jsonl")
    assert [sample["iteration"] for sample in log.samples] == DUE
    assert {sample["prompt"] for sample in log.samples} == {"One day"}
    texts = [sample["text"] for sample in log.samples]
    assert all(text.startswith("One day") and len(text) > len("One day") for text in texts)
    assert len(set(texts)) == len(DUE)


def test_a_sample_is_what_the_weights_generate(sampled_run):
    storyteller = load(sampled_run / "last.pt", device="cpu")
    assert samples(sampled_run)[-1][1] == storyteller.generate("One day", MAX_NEW_TOKENS, TEMPERATURE, seed=0)


def test_samples_change_nothing_else(sampled_run, tiny_run):
    assert losses(sampled_run) == losses(tiny_run)
    for name in ("last.pt", "best_model_params.pt"):
        assert weights(sampled_run, name) == weights(tiny_run, name)
    assert read_log(tiny_run / "log.jsonl").samples == []  # by default


def test_samples_are_printed(tiny_data, tmp_path, capsys):
    log = train(SAMPLED.override({"train.stop_at": 4}), tiny_data, tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    for sample in log.samples:
        assert f"iteration {sample['iteration']}: One day" in printed


def test_the_same_weights_are_sampled_once(tiny_data, tmp_path):
    """With an interval shorter than an update, also if the run stops within an update."""
    recipe = SAMPLED.override({"train.sample_interval": 1})
    for stop_at in (11, None):
        train(recipe.override({"train.stop_at": stop_at}), tiny_data, tmp_path)
    assert [iteration for iteration, _ in samples(tmp_path)] == [0, 4, 8, 12, 16, 20, 22]


def test_an_interrupted_run_has_the_same_samples(sampled_run, tiny_data, tmp_path):
    with interrupted_in_the_third_update():
        assert train(SAMPLED, tiny_data, tmp_path).interrupted
    train(SAMPLED, tiny_data, tmp_path)
    assert samples(tmp_path) == samples(sampled_run)


@pytest.mark.parametrize("lost", [1, 2])
def test_a_run_that_resumes_from_an_earlier_state_has_the_same_samples(sampled_run, tiny_data, tmp_path, lost):
    train(SAMPLED.override({"train.stop_at": 16, **SAVE_EVERY_UPDATE}), tiny_data, tmp_path)
    for name in ["last.pt", "last.1.pt"][:lost]:
        (tmp_path / name).unlink()
    with pytest.warns(UserWarning, match="resuming from the earlier"):
        train(SAMPLED, tiny_data, tmp_path)
    assert samples(tmp_path) == samples(sampled_run)
    assert weights(tmp_path) == weights(sampled_run)


def test_interval_and_prompt_may_change_when_a_run_resumes(sampled_run, tiny_data, tmp_path):
    for changes in (
        {"train.stop_at": 8},
        {"train.stop_at": 16, "train.sample_interval": 0},
        {"train.sample_interval": 4, "train.sample_prompt": ""},
    ):
        train(SAMPLED.override(changes), tiny_data, tmp_path)
    log = read_log(tmp_path / "log.jsonl")
    assert [(sample["iteration"], sample["prompt"]) for sample in log.samples] == [
        *((0, "One day"), (5, "One day"), (8, "One day"), (16, ""), (20, ""), (22, "")),
    ]
    assert weights(tmp_path) == weights(sampled_run)


def test_an_invalid_prompt_is_an_error_and_can_be_corrected(tiny_data, tmp_path):
    with pytest.raises(StoryLLMError, match="consecutive whitespace"):
        train(SAMPLED.override({"train.sample_prompt": " " * 1_000_000}), tiny_data, tmp_path)
    assert train(SAMPLED, tiny_data, tmp_path).samples


# Side by side


def log_of(*texts: str) -> Log:
    return Log(samples=[{"event": "sample", "iteration": 100 * i, "text": text} for i, text in enumerate(texts)])


def test_the_table_shows_the_samples_side_by_side():
    table = samples_table(log_of("One day a cat sat.", "One\n\nday \x1b[31m"), columns=2, width=13)
    assert table.splitlines() == [
        "iteration 0     iteration 100",
        "-------------   -------------",
        "One day a cat   One",
        "sat.",
        "                day \\x1b[31m",
    ]


@pytest.mark.parametrize(
    ("count", "columns", "expected"),
    [
        (1, 4, [0]),
        (3, 4, [0, 1, 2]),
        (4, 4, [0, 1, 2, 3]),
        (37, 4, [0, 2, 10, 36]),
        (37, 2, [0, 36]),
        (37, 1, [0]),
        (3, 100, [0, 1, 2]),
    ],
)
def test_of_many_samples_the_table_shows_more_of_the_early_ones(count, columns, expected):
    table = samples_table(log_of(*map(str, range(count))), columns)
    assert table.splitlines()[2].split() == [str(i) for i in expected]
    assert table.splitlines()[0].split()[1::2] == [f"{100 * i:,}" for i in expected]


def test_a_table_of_nothing_is_an_error():
    with pytest.raises(StoryLLMError, match=r"no samples; set train\.sample_interval"):
        samples_table(Log())
    for arguments in ({"columns": 0}, {"width": 0}):
        with pytest.raises(StoryLLMError, match=f"{next(iter(arguments))} is 0, must be at least 1"):
            samples_table(log_of("One"), **arguments)
