"""The log is read back as it was written, and what is not a log is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from storyllm.config import RECIPES, StoryLLMError
from storyllm.log import Log, LogWriter, read_log

RUN = {"event": "run", "recipe": RECIPES["demo"].to_dict(), "device": "cpu", "git_revision": None, "note": "Zoë\u2028"}
UPDATES = [
    {"event": "update", "iteration": i, "train_loss": 10 / i, "learning_rate": 1e-4 * i, "grad_norm": 0.5}
    for i in range(1, 6)
]
EVALUATIONS = [
    {"event": "evaluation", "iteration": i, "train_loss": 9.0, "val_loss": 9.5, "val_bits_per_byte": 3.3}
    for i in (0, 5)
]


def written(path: Path, *entries: dict[str, Any], end: str = "\n") -> Path:
    path.write_bytes("".join(json.dumps(entry, ensure_ascii=False) + end for entry in entries).encode())
    return path


def test_reads_back_what_was_written_in_order(tmp_path: Path) -> None:
    path = written(tmp_path / "log.jsonl", RUN, EVALUATIONS[0], *UPDATES, EVALUATIONS[1])
    assert read_log(path) == Log(run=RUN, updates=UPDATES, evaluations=EVALUATIONS)
    assert read_log(str(path)) == read_log(path)
    assert not read_log(path).interrupted


def test_a_continued_run_is_described_as_it_was_last_started(tmp_path: Path) -> None:
    again = {**RUN, "device": "cuda"}
    log = read_log(written(tmp_path / "log.jsonl", RUN, *UPDATES[:2], again, *UPDATES[2:]))
    assert log.run == again
    assert log.updates == UPDATES


def test_line_ends_of_windows(tmp_path: Path) -> None:
    assert read_log(written(tmp_path / "log.jsonl", RUN, *UPDATES, end="\r\n")).updates == UPDATES


@pytest.mark.parametrize("name", ["log.jsonl", "no folder/log.jsonl", ""])
def test_a_missing_log_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoryLLMError) as caught:
        read_log(tmp_path / name)  # "" is the folder itself
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_an_empty_log(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b"")
    assert read_log(tmp_path / "log.jsonl") == Log()


@pytest.mark.parametrize("keep", [1, 10, -1])
def test_a_last_line_that_was_cut_is_passed_over(tmp_path: Path, keep: int) -> None:
    path = written(tmp_path / "log.jsonl", RUN, *UPDATES)
    path.write_bytes(path.read_bytes() + json.dumps(EVALUATIONS[0]).encode()[:keep])
    log = read_log(path)
    assert log.updates == UPDATES
    assert log.evaluations == []


def test_a_last_line_cut_within_a_character_is_passed_over(tmp_path: Path) -> None:
    path = written(tmp_path / "log.jsonl", RUN)
    path.write_bytes(path.read_bytes() + '{"event": "é'.encode()[:-1])
    assert read_log(path).run == RUN


@pytest.mark.parametrize(
    "line",
    [
        *(b"hello", b"", b"{", b"[1]", b"null", b"3", b'"event"', b'{"a": 1}', b"\xff\xfe", b"\x00", b"[" * 100_000),
        *(b'{"event": "checkout", "basket": 3}', b'{"event": ["update"]}', b'{"event": null}'),
    ],
)
def test_a_foreign_line_is_named_by_its_number(tmp_path: Path, line: bytes) -> None:
    path = written(tmp_path / "log.jsonl", RUN, UPDATES[0])
    path.write_bytes(path.read_bytes() + line + b"\n" + json.dumps(UPDATES[1]).encode() + b"\n")
    with pytest.raises(StoryLLMError, match=r"line 3\b") as caught:
        read_log(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_logs_do_not_share_their_lists() -> None:
    Log().updates.append({})
    assert Log().updates == []


def test_what_a_writer_wrote_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with LogWriter(path, 0) as log:
        for entry in (RUN, EVALUATIONS[0], *UPDATES, {"event": "warning", "iteration": 3, "message": "so it is"}):
            log.write(entry)
        log.sync()
        assert log.size() == path.stat().st_size
    read = read_log(path)
    assert (read.run, read.updates, read.evaluations) == (RUN, UPDATES, EVALUATIONS[:1])
    assert [entry["message"] for entry in read.warnings] == ["so it is"]
    assert all(json.loads(line) for line in path.read_bytes().splitlines())  # each is plain JSON all the same


def test_a_writer_cuts_off_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with LogWriter(path, 0) as log:
        for entry in UPDATES[:3]:
            log.write(entry)
        size = log.size()
        log.write(UPDATES[3])
    with LogWriter(path, size) as log:
        log.write(UPDATES[4])
    assert read_log(path).updates == [*UPDATES[:3], UPDATES[4]]
    assert read_log(path, size).updates == UPDATES[:3]
    with LogWriter(path, size + 10_000) as log:  # never longer than it is
        assert log.size() == path.stat().st_size


@pytest.mark.parametrize("value", ["1", None, True, [1], 1.5, float("nan"), 1e300, -(10**30)])
def test_an_entry_without_its_numbers_is_refused(tmp_path: Path, value: Any) -> None:
    path = written(tmp_path / "log.jsonl", RUN, {**UPDATES[0], "iteration": value})
    with pytest.raises(StoryLLMError, match="line 2 is damaged or not a line of a StoryLLM log: mend it, or move"):
        read_log(path)
