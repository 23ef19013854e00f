"""Throughput, MFU, the estimated time left, and the progress bar."""

from __future__ import annotations

import pytest
import torch
from helpers import TINY

from storyllm import RECIPES
from storyllm.device import flops_per_token
from storyllm.training.progress import Progress, format_duration, model_flops_utilization

# 100 iterations of 2 windows; evaluations at 0, 30, 60, 90 and 100, of 15 windows per split.
RECIPE = TINY.override({"train.max_iters": 100, "train.batch_size": 2, "train.eval_interval": 30})
RECIPE = RECIPE.override({"train.eval_windows": 15})


def test_nothing_is_estimated_before_anything_is_measured():
    assert Progress(RECIPE, 0, None).seconds_left(0, -1) == 0


def test_before_the_first_evaluation_a_forward_pass_counts_a_third():
    progress = Progress(RECIPE, 0, None)
    progress.add_windows(10, 20.0)  # 2 seconds per window
    assert progress.seconds_left(0, -1) == pytest.approx(200 * 2 + 5 * (30 * 2 / 3))


def test_measured_windows_and_evaluations_are_averaged():
    progress = Progress(RECIPE, 0, None)
    progress.add_windows(10, 20.0)
    progress.add_windows(30, 20.0)
    progress.add_evaluation(5.0)
    progress.add_evaluation(7.0)
    assert progress.seconds_left(40, 30) == pytest.approx(120 * 1 + 3 * 6)


@pytest.mark.parametrize(
    ("max_iters", "stop_at", "iteration", "last_evaluation", "expected"),
    [
        (100, None, 0, -1, 5),  # 0, 30, 60, 90, 100
        (100, None, 0, 0, 4),
        (100, None, 60, 30, 3),
        (100, None, 60, 60, 2),
        (100, None, 100, 90, 1),
        (90, None, 0, -1, 4),  # 0, 30, 60, 90
        (100, 70, 0, -1, 4),  # 0, 30, 60, 70
        (100, 60, 40, 30, 1),
    ],
)
def test_remaining_evaluations_are_counted(max_iters, stop_at, iteration, last_evaluation, expected):
    progress = Progress(RECIPE.override({"train.max_iters": max_iters, "train.stop_at": stop_at}), 0, None)
    progress.add_evaluation(1.0)  # training itself takes no time here
    assert progress.seconds_left(iteration, last_evaluation) == expected


def test_update_metrics_are_those_of_the_update():
    progress = Progress(RECIPE, 0, peak_flops=1e9)
    metrics = progress.update_metrics(8, 4.0, iteration=4, last_evaluation=0)
    assert metrics["tokens_per_second"] == 8 * 16 / 4
    assert metrics["mfu"] == pytest.approx(32 * flops_per_token(RECIPE.model) / 1e9, abs=1e-4)
    assert metrics["seconds_left"] == pytest.approx(progress.seconds_left(4, 0), abs=0.1)
    assert "mfu" not in Progress(RECIPE, 0, None).update_metrics(8, 4.0, 4, 0)


def test_mfu_is_the_fraction_of_peak_flops():
    config = RECIPES["faithful"].model
    assert model_flops_utilization(65e12 / flops_per_token(config), config, 65e12) == pytest.approx(1.0)
    assert model_flops_utilization(40_000, config, 65e12) == pytest.approx(0.1125, abs=0.001)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 seconds"), (89, "89 seconds"), (90, "1.5 minutes"), (7_200, "2.0 hours")]
)
def test_durations_are_readable(seconds, text):
    assert format_duration(seconds) == text


def test_track_yields_every_micro_batch_and_moves_the_bar(capsys):
    micro_batches = [(torch.zeros(size, 3), torch.ones(size, 3)) for size in (3, 1)]
    progress = Progress(RECIPE, 10, None)
    assert list(progress.track(micro_batches, 10)) == micro_batches  # also without a bar
    with progress:
        positions = [progress.bar.n for _ in progress.track(micro_batches, 10)]
        assert [*positions, progress.bar.n] == [10, 11.5, 12]  # 2 windows per iteration
    assert "12/100" in capsys.readouterr().out


def test_the_run_is_printed_on_standard_output(capsys):
    progress = Progress(RECIPE, 0, peak_flops=1e9)
    progress.estimate(0.5, iteration=0, last_evaluation=-1)
    with progress:
        progress.show_evaluation(30, {"train_loss": 1.23456, "val_loss": 2.34567, "val_bits_per_byte": 0.98765})
        entry = {"learning_rate": 1e-4, **progress.update_metrics(8, 4.0, 34, 30)}
        progress.show_update({**entry, "iteration": 34, "train_loss": None})
        progress.show_update({**entry, "iteration": 34, "train_loss": 3.14159})
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "2.1 minutes for 100 iterations" in printed.out  # 200 windows and 5 evaluations
    assert "1.2346" in printed.out and "2.3457 (0.988 bits per byte)" in printed.out
    assert "left, loss 3.142, lr 1.0e-04, 32 tokens/s" in printed.out and "% MFU" in printed.out
    assert "long run" not in printed.out


def test_a_long_run_comes_with_smaller_recipes(capsys):
    Progress(RECIPE, 0, None).estimate(3_600, iteration=0, last_evaluation=-1)
    printed = capsys.readouterr().out
    assert all(name in RECIPES and name in printed for name in ("demo", "small-vocab"))


def test_a_finished_bar_shows_no_time_left(capsys):
    progress = Progress(RECIPE, 99, None)
    with progress:
        entry = {
            "iteration": 100,
            "learning_rate": 1e-4,
            "train_loss": 3.0,
            **progress.update_metrics(8, 4.0, 100, 100),
        }
        progress.show_update(entry)
    assert "left" not in capsys.readouterr().out
