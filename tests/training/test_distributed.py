"""Several processes train one model: the same mathematics, joint decisions, one writer, one message."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import TINY, TINY_MODEL_OPTIONS, iteration_of, losses, weights

import storyllm
from storyllm import StoryLLMError, read_log, train
from storyllm.checkpoint import load_checkpoint
from storyllm.cli import main
from storyllm.training import distributed, muon
from storyllm.training.distributed import torchrun_processes

pytestmark = pytest.mark.timeout(300)

# 10 windows per update: 5 and 5, or 4, 3 and 3, in micro-batches of 2. Without dropout, whose masks depend on the rank.
RECIPE = TINY.override(
    {
        "model.dropout": 0.0,
        "train.max_iters": 100,
        "train.learning_rate": 1e-3,
        "train.batch_size": 5,
        "train.gradient_accumulation_steps": 2,
        "train.micro_batch_size": 2,
        "train.eval_interval": 20,
        "train.eval_windows": 7,
    }
)
SHORT = {"train.max_iters": 20, "train.eval_interval": 10}


def train_rank(rank: int, changes: dict[str, Any], data: str, folder: int | str) -> int:
    """What a process does: it trains, and its exit code is the signal that interrupted it."""
    return train(RECIPE.override(changes), data, str(folder)).interrupted


def differences(folder: Path, other: Path) -> dict[str, float]:
    """The largest differences between two runs."""
    (updates, evaluations), (other_updates, other_evaluations) = losses(folder), losses(other)
    assert [u["iteration"] for u in updates] == [u["iteration"] for u in other_updates]
    result = {}
    for name, ones, twos in (
        ("train_loss", updates, other_updates),
        ("grad_norm", updates, other_updates),
        ("val_loss", evaluations, other_evaluations),
    ):
        result[name] = max(abs(one[name] - two[name]) for one, two in zip(ones, twos, strict=True))
    ours, theirs = weights(folder), weights(other)
    result["weights"] = max(float(np.abs(np.subtract(ours[name], theirs[name])).max()) for name in ours)
    return result


def assert_same_run(folder: Path, other: Path, tolerance: float = 1e-4) -> None:
    found = differences(folder, other)
    found["grad_norm"] /= 10  # it is larger than a loss
    assert all(difference <= tolerance for difference in found.values()), found


def errors(folder: Path, size: int) -> list[str]:
    """What each process wrote to standard error."""
    return [(folder / f"rank-{rank}.err").read_text() for rank in range(size)]


# The same mathematics


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_losses_and_weights_are_those_of_one_process(ranks, tiny_data, tmp_path, optimizer, dtype, tolerance):
    changes = {"train.optimizer": optimizer, "train.dtype": dtype}
    for size in (1, 2, 3):
        assert ranks.run(size, train_rank, changes, tiny_data, size, cwd=tmp_path) == [0] * size
    for size in (2, 3):
        assert_same_run(tmp_path / str(size), tmp_path / "1", tolerance)


@pytest.mark.parametrize(
    "changes",
    [
        {"train.batch_size": 1, "train.eval_windows": 1},  # one process has no windows
        {"train.max_iters": 19},  # a short last update: 5 windows
        {"model.gradient_checkpointing": True},
        {"train.compile": True, "train.micro_batch_size": 3},
        {"train.dtype": "float16", "tolerance": 1e-2},
    ],
    ids=["few windows", "short update", "checkpointing", "compiled", "float16"],
)
def test_three_processes_do_what_one_does(ranks, tiny_data, tmp_path, changes):
    changes = {**SHORT, **changes}
    tolerance = changes.pop("tolerance", 1e-4)
    for size in (1, 3):
        assert ranks.run(size, train_rank, changes, tiny_data, size, cwd=tmp_path) == [0] * size, errors(tmp_path, size)
    assert_same_run(tmp_path / "3", tmp_path / "1", tolerance)
    assert read_log(tmp_path / "3" / "log.jsonl").warnings == []


def test_a_run_resumes_with_any_number_of_processes(ranks, tiny_data, tmp_path):
    for size, stop_at in ((2, 40), (3, 60), (1, 100)):
        changes = {"train.stop_at": stop_at}
        assert ranks.run(size, train_rank, changes, tiny_data, "resumed", cwd=tmp_path) == [0] * size
    ranks.run(1, train_rank, {}, tiny_data, "one", cwd=tmp_path)
    assert_same_run(tmp_path / "resumed", tmp_path / "one")
    lines = (tmp_path / "resumed" / "log.jsonl").read_text().splitlines()
    sizes = [json.loads(line).get("world_size") for line in lines]
    assert [size for size in sizes if size] == [2, 3, 1]


def test_with_the_same_number_of_processes_a_resumed_run_is_the_same_to_the_bit(ranks, tiny_data, tmp_path):
    dropout = {**SHORT, "model.dropout": 0.2}
    ranks.run(2, train_rank, {**dropout, "train.stop_at": 10}, tiny_data, "resumed", cwd=tmp_path)
    ranks.run(2, train_rank, dropout, tiny_data, "resumed", cwd=tmp_path)
    ranks.run(2, train_rank, dropout, tiny_data, "uninterrupted", cwd=tmp_path)
    assert_same_run(tmp_path / "resumed", tmp_path / "uninterrupted", tolerance=0.0)


def record_reductions(rank: int, data: str) -> None:
    """Trains with small buckets; prints the backward passes and reductions in their order."""
    distributed.BUCKET_BYTES = 20_000
    events: list[Any] = []
    all_reduce, backward = dist.all_reduce, torch.Tensor.backward

    def recorded_all_reduce(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        events.append(tensor.numel())
        return all_reduce(tensor, *args, **options)

    def recorded_backward(self: torch.Tensor, *args: Any, **options: Any) -> None:
        backward(self, *args, **options)
        events.append("end of backward")

    dist.all_reduce, torch.Tensor.backward = recorded_all_reduce, recorded_backward
    train(RECIPE.override(SHORT), data, "run")
    print(json.dumps(events))


def test_each_gradient_is_reduced_once_per_update_during_the_last_backward_pass(ranks, tiny_data, tmp_path):
    assert ranks.run(3, record_reductions, tiny_data, cwd=tmp_path) == [0, 0, 0]
    parameters = storyllm.GPT(RECIPE.model).num_parameters()
    for rank, passes in ((0, 2), (1, 2), (2, 2)):  # shares of 4, 3 and 3 windows in micro-batches of 2
        events = json.loads((tmp_path / f"rank-{rank}.out").read_text().splitlines()[-1])
        del events[: events.index("end of backward")]
        while events and events[0] == "end of backward" and len(events) > 1 and events[1] == "end of backward":
            events.pop(0)  # the trial before the first update
        updates, update = [], []
        for event in events:
            update.append(event)
            if sum(e for e in update if isinstance(e, int)) == parameters and update.count("end of backward") >= passes:
                updates.append(update)
                update = []
        assert len(updates) == 10 and not update
        for update in updates[1:]:
            first = update.index("end of backward")
            assert not [event for event in update[:first] if isinstance(event, int)]  # none in the first pass
            assert update[-1] == "end of backward"  # all were launched before the last pass ended
            assert len([event for event in update if isinstance(event, int)]) > 3


def record_orthogonalized(rank: int, data: str) -> None:
    """Trains with Muon; prints how many matrices this process orthogonalized, and of which size."""
    orthogonalize, batches = muon.orthogonalize, []

    def recorded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        batches.append((tuple(x.shape[1:]), len(x)))
        return orthogonalize(x, dtype)

    muon.orthogonalize = recorded
    train(RECIPE.override({**SHORT, "train.optimizer": "muon"}), data, "run")
    print(json.dumps(batches))


def test_matrices_of_muon_are_divided_among_the_processes(ranks, tiny_data, tmp_path):
    assert ranks.run(3, record_orthogonalized, tiny_data, cwd=tmp_path) == [0, 0, 0]
    width, layers = RECIPE.model.n_embd, RECIPE.model.n_layer
    found = [json.loads((tmp_path / f"rank-{rank}.out").read_text().splitlines()[-1]) for rank in range(3)]
    updates = 10
    assert {len(batches) for batches in found} == {2 * updates}
    for shape, matrices in (((width, width), 4 * layers), ((width, 4 * width), 2 * layers)):
        shares = [[count for size, count in batches if tuple(size) == shape] for batches in found]
        expected = [-(-matrices // 3), -(-(matrices - 1) // 3), matrices // 3]
        assert shares == [[count] * updates for count in expected]


def test_the_log_has_the_processes_and_total_rates(ranks, tiny_data, tmp_path):
    assert ranks.run(3, train_rank, SHORT, tiny_data, "run", cwd=tmp_path) == [0, 0, 0]
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert (log.run["world_size"], log.run["windows_per_process"]) == (3, [4, 3, 3])
    assert len(log.run["hosts"]) == 3
    outputs = [(tmp_path / f"rank-{rank}.out").read_text() for rank in range(3)]
    assert "iteration     20" in outputs[0] and outputs[1:] == ["", ""]
    assert errors(tmp_path, 3)[1:] == ["", ""]


# Joint decisions


def run_out_of_memory(rank: int, data: str, limit: int) -> None:
    """Trains; rank 1 has only memory for `limit` windows at once."""
    embedding = torch.nn.functional.embedding

    def limited_embedding(ids: torch.Tensor, *args: Any) -> torch.Tensor:
        if rank == 1 and ids.dim() == 2 and len(ids) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return embedding(ids, *args)

    torch.nn.functional.embedding = limited_embedding
    with contextlib.suppress(StoryLLMError) if limit else contextlib.nullcontext():
        train(RECIPE.override({**SHORT, "train.micro_batch_size": 5}), data, "short")


def test_if_one_process_runs_out_of_memory_all_retry_with_smaller_micro_batches(ranks, tiny_data, tmp_path):
    assert ranks.run(2, run_out_of_memory, tiny_data, 2, cwd=tmp_path) == [0, 0]
    log = read_log(tmp_path / "short" / "log.jsonl")
    assert [warning["message"].split(" on ")[0] for warning in log.warnings] == ["rank 1"]
    assert log.warnings[0]["message"].endswith("ran out of memory, retrying with 2")
    assert load_checkpoint(tmp_path / "short" / "last.pt")["micro_batch_size"] == 2
    ranks.run(2, train_rank, SHORT, tiny_data, "enough", cwd=tmp_path)
    assert_same_run(tmp_path / "short", tmp_path / "enough")


def run_out_of_memory_in_an_update(rank: int, data: str) -> None:
    """Trains; in the middle of the last backward pass of an update, rank 1 runs out of memory once."""
    reduce, calls = distributed.GradientSum._launch_next, []

    def failing_launch(self: Any) -> None:
        calls.append(1)
        reduce(self)
        if rank == 1 and len(calls) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")

    distributed.BUCKET_BYTES = 20_000
    distributed.GradientSum._launch_next = failing_launch  # the only place that is certain to be within the pass
    train(RECIPE.override(SHORT), data, "short")


def test_running_out_of_memory_while_gradients_are_added_up_repeats_the_update(ranks, tiny_data, tmp_path):
    assert ranks.run(2, run_out_of_memory_in_an_update, tiny_data, cwd=tmp_path) == [0, 0], errors(tmp_path, 2)
    assert len(read_log(tmp_path / "short" / "log.jsonl").warnings) == 1
    ranks.run(2, train_rank, SHORT, tiny_data, "enough", cwd=tmp_path)
    assert_same_run(tmp_path / "short", tmp_path / "enough")


def run_out_of_memory_in_the_step(rank: int, data: str) -> None:
    """Trains with Muon; rank 1 runs out of memory in the optimizer step of the third update."""
    orthogonalize, calls = muon.orthogonalize, []

    def failing(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        calls.append(1)
        if rank == 1 and len(calls) == 6:  # there are two shapes
            raise torch.OutOfMemoryError("CUDA out of memory")
        return orthogonalize(x, dtype)

    muon.orthogonalize = failing
    try:
        train(RECIPE.override({**SHORT, "train.optimizer": "muon"}), data, "run")
    except StoryLLMError as error:
        print(error)
        raise SystemExit(2) from error


def test_running_out_of_memory_in_the_optimizer_step_ends_the_run(ranks, tiny_data, tmp_path):
    assert ranks.run(2, run_out_of_memory_in_the_step, tiny_data, cwd=tmp_path) == [2, 2], errors(tmp_path, 2)
    outputs = [(tmp_path / f"rank-{rank}.out").read_text() for rank in range(2)]
    assert "rank 1 on" in outputs[1] and "ran out of memory in the optimizer step" in outputs[1]
    assert "lost" not in outputs[0]
    train_rank(0, {**SHORT, "train.optimizer": "muon"}, tiny_data, tmp_path / "run")  # resumes


def interrupt_rank_1(rank: int, data: str) -> int:
    """Trains; rank 1 gets SIGTERM in an update."""
    manual_seed, updates = torch.manual_seed, []

    def counting_manual_seed(seed: int) -> Any:
        updates.append(seed)
        if rank == 1 and len(updates) == 5:
            signal.raise_signal(signal.SIGTERM)
        return manual_seed(seed)

    torch.manual_seed = counting_manual_seed
    return train(RECIPE.override(SHORT), data, "run").interrupted


def test_a_signal_for_one_process_stops_and_saves_the_run(ranks, tiny_data, tmp_path):
    assert ranks.run(2, interrupt_rank_1, tiny_data, cwd=tmp_path) == [signal.SIGTERM] * 2
    assert 0 < iteration_of(tmp_path / "run" / "last.pt") < 20
    assert ranks.run(2, train_rank, SHORT, tiny_data, "run", cwd=tmp_path) == [0, 0]
    ranks.run(2, train_rank, SHORT, tiny_data, "other", cwd=tmp_path)
    assert losses(tmp_path / "run")[0] == losses(tmp_path / "other")[0]
    assert weights(tmp_path / "run") == weights(tmp_path / "other")


def overflow(rank: int, data: str) -> None:
    scaler = torch.amp.GradScaler
    torch.amp.GradScaler = lambda *args, **options: scaler(*args, **options, init_scale=2.0**40)
    train(RECIPE.override({**SHORT, "train.dtype": "float16"}), data, "run")


def test_an_fp16_overflow_skips_the_update_on_all_processes(ranks, tiny_data, tmp_path):
    assert ranks.run(2, overflow, tiny_data, cwd=tmp_path) == [0, 0]
    assert read_log(tmp_path / "run" / "log.jsonl").updates[-1]["skipped_updates"] > 3


def test_a_finished_run_is_finished_on_all_processes(ranks, tiny_data, tmp_path):
    for _ in range(2):
        assert ranks.run(2, train_rank, SHORT, tiny_data, "run", cwd=tmp_path) == [0, 0]
    assert "already finished" in (tmp_path / "rank-0.out").read_text()


# Errors: each process exits with code 2, and one of them says why


def run_command(rank: int, options: list[str], of_rank_1: list[str], broken: str = "") -> int:
    """Runs `storyllm train` with other options on rank 1, and perhaps with a fault."""
    os.environ["STORYLLM_TIMEOUT"] = "15"
    if broken == "disk full" and rank == 0:

        def fail(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        torch.save = fail
    if broken == "other version" and rank == 1:
        torch.__version__ = torch.torch_version.TorchVersion("1.0")
    return main(["train", *options, *(of_rank_1 if rank == 1 else [])])


def options(data: Path) -> list[str]:
    folders = ["--data-dir", str(data), "--checkpoint-dir", "run"]
    return ["--recipe", "demo", *TINY_MODEL_OPTIONS, "--train.device", "cpu", "--train.max-iters", "20", *folders]


@pytest.mark.parametrize(
    ("of_rank_1", "broken", "message"),
    [
        (["--train.seed", "7"], "", "rank 1 on .* has train.seed 7, rank 0 on .* has 0; start all processes with"),
        (["--data-dir", "other"], "", "rank 1 on .* has train.bin '.*', rank 0 on .* has"),
        ([], "other version", "rank 1 on .* has torch '1.0', rank 0 on .* has"),
        ([], "disk full", "rank 0 on .*: cannot write .*last.pt .*No space left on device"),
        (["--data-dir", "missing"], "", r"rank 1 on .*: missing/train.bin not found"),
    ],
    ids=["recipe", "data", "version", "disk full", "no data"],
)
def test_an_error_is_one_line_with_code_2(ranks, tiny_data, tmp_path, of_rank_1, broken, message):
    config = storyllm.DataConfig(source="synthetic", synthetic_stories=60, tokenizer="bpe:300")
    storyllm.prepare(config, tmp_path / "other")
    assert ranks.run(2, run_command, options(tiny_data), of_rank_1, broken, cwd=tmp_path) == [2, 2]
    lines = [line for text in errors(tmp_path, 2) for line in text.splitlines()]
    assert not [line for line in lines if "Traceback" in line], lines
    if "missing" not in of_rank_1:
        assert len(lines) == 1, lines
    assert any(re.search(message, line) for line in lines), lines


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_does_not_answer_is_named(ranks, tiny_data, tmp_path, signum):
    endless = [*options(tiny_data), "--train.max-iters", "1000000", "--train.eval-interval", "1000000"]
    pids = ranks.start(3, run_command, endless, [], cwd=tmp_path)
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") > 5):
        time.sleep(0.05)
    os.kill(pids[2], signum)
    started = time.monotonic()
    while sum("lost" in text for text in errors(tmp_path, 2)) == 0 and time.monotonic() < started + 100:
        time.sleep(0.05)
    if signum == signal.SIGSTOP:
        os.kill(pids[2], signal.SIGKILL)
    assert ranks.wait() == [2, 2, -signal.SIGKILL]
    (line,) = [line for text in errors(tmp_path, 2) for line in text.splitlines()]
    assert "lost rank 2 on" in line and "run the same command again" in line


@pytest.mark.parametrize("value", ["", "soon", "0", "nan"])
def test_the_timeout_is_a_number_of_seconds(monkeypatch, value):
    for name, number in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, number)
    monkeypatch.setenv("STORYLLM_TIMEOUT", value)
    with pytest.raises(StoryLLMError, match=r"STORYLLM_TIMEOUT is .*, must be a number of seconds"):
        torchrun_processes("cpu")


@pytest.mark.parametrize(
    ("device", "message"),
    [("auto", "2 processes need a GPU each, this machine has 1"), ("cuda:0", "device is 'cuda:0'")],
)
def test_each_process_needs_its_own_gpu(monkeypatch, device, message):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(StoryLLMError, match=message):
        torchrun_processes(device)
    assert torchrun_processes("cpu").size == 2
