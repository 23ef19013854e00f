"""`log.jsonl` reads back as it was written, and a corrupted one is rejected."""

from __future__ import annotations

import json
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest

import storyllm
from storyllm import RECIPES, Log, StoryLLMError, read_log
from storyllm.training.log import LogWriter, describe_environment

RUN = {"event": "run", "recipe": RECIPES["demo"].to_dict(), "device": "CPU", "git_revision": None, "note": "Zoë\u2028"}
UPDATES = [
    {"event": "update", "iteration": i, "train_loss": 10 / i, "learning_rate": 1e-4 * i, "grad_norm": 0.5}
    for i in range(1, 6)
]
EVALUATIONS = [
    {"event": "evaluation", "iteration": i, "train_loss": 9.0, "val_loss": 9.5, "val_bits_per_byte": 3.3}
    for i in (0, 5)
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def write(path: Path, *entries: dict[str, Any]) -> None:
    """Writes entries as plain JSON, without checksums."""
    path.write_bytes("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode())


# Reading


def test_entries_are_sorted_by_event_in_their_order(path):
    write(path, RUN, EVALUATIONS[0], *UPDATES, EVALUATIONS[1])
    assert read_log(path) == Log(run=RUN, updates=UPDATES, evaluations=EVALUATIONS)
    assert read_log(str(path)) == read_log(path)


def test_the_last_run_entry_counts(path):
    resumed = {**RUN, "device": "Tesla T4"}
    write(path, RUN, *UPDATES[:2], resumed, *UPDATES[2:])
    assert read_log(path).run == resumed
    assert read_log(path).updates == UPDATES


def test_windows_newlines_are_accepted(path):
    with LogWriter(path).open(0) as log:
        log.write(UPDATES[0])
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    with LogWriter(path).open(path.stat().st_size) as log:
        log.write(UPDATES[1])
    assert read_log(path).updates == UPDATES[:2]


@pytest.mark.parametrize("name", ["log.jsonl", "missing folder/log.jsonl", ""])
def test_a_missing_log_is_an_error(tmp_path, name):
    with pytest.raises(StoryLLMError, match="not found") as caught:
        read_log(tmp_path / name)  # "" is the folder itself
    assert str(tmp_path / name) in str(caught.value)


def test_an_empty_file_is_an_empty_log(path):
    path.touch()
    assert read_log(path) == Log()


@pytest.mark.parametrize("incomplete", [b"{", b'{"event": "eva', json.dumps(EVALUATIONS[0]).encode(), b'{"\xc3'])
def test_a_last_line_without_newline_is_ignored(path, incomplete):
    write(path, RUN, *UPDATES)
    path.write_bytes(path.read_bytes() + incomplete)
    assert read_log(path) == Log(run=RUN, updates=UPDATES)


@pytest.mark.parametrize(
    "line",
    [
        *(b"hello", b"", b"{", b"[1]", b"null", b"3", b'"event"', b'{"a": 1}', b"\xff\xfe", b"\x00", b"[" * 100_000),
        *(b'{"event": "checkout", "basket": 3}', b'{"event": ["update"]}', b'{"event": null}'),
        *(b'{"event": "sample", "iteration": 5}', b'{"event": "sample", "iteration": 5, "text": ["One"]}'),
        b'{"event": "run", "recipe": {"train": {"max_iters": -1}}}',
    ],
)
def test_a_line_of_another_format_is_an_error_with_its_number(path, line):
    write(path, RUN, UPDATES[0])
    path.write_bytes(path.read_bytes() + line + b"\n" + json.dumps(UPDATES[1]).encode() + b"\n")
    with pytest.raises(StoryLLMError, match=r"line 3\b") as caught:
        read_log(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["1", None, True, [1], 1.5, float("nan"), 1e300, -(10**30)])
def test_an_entry_with_an_invalid_number_is_an_error(path, value):
    write(path, RUN, {**UPDATES[0], "iteration": value})
    with pytest.raises(StoryLLMError, match="line 2"):
        read_log(path)


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("change", "number"),
    [
        pytest.param(lambda lines: lines[1:], 1, id="first line deleted"),
        pytest.param(lambda lines: [*lines[:2], *lines[3:]], 3, id="line deleted"),
        pytest.param(lambda lines: [*lines[:3], *lines[2:]], 4, id="line repeated"),
        pytest.param(lambda lines: [*lines, lines[-1]], 6, id="last line repeated"),
        pytest.param(lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], 2, id="lines swapped"),
        pytest.param(lambda lines: [lines[0].replace(b"0.5", b"0.6"), *lines[1:]], 1, id="digit changed"),
        pytest.param(lambda lines: [lines[0].replace(b"crc32", b"crc31"), *lines[1:]], 2, id="checksum disabled"),
    ],
)
def test_a_change_is_noticed_at_its_line(path, change, number):
    with LogWriter(path).open(0) as log:
        for entry in UPDATES:
            log.write(entry)
    path.write_bytes(b"".join(change(lines_of(path))))
    with pytest.raises(StoryLLMError, match=rf"line {number} is corrupted, out of order"):
        read_log(path)


def test_a_log_of_an_earlier_version_is_read_and_continued(path):
    """Its checksums are of single lines."""
    lines = [json.dumps(entry).encode() for entry in UPDATES]
    path.write_bytes(b"".join(b'%s, "crc32": %d}\n' % (line[:-1], zlib.crc32(line)) for line in lines[:3]))
    assert read_log(path).updates == UPDATES[:3]
    with LogWriter(path).open(path.stat().st_size) as log:
        log.write(UPDATES[3])
        log.write(UPDATES[4])
    assert read_log(path).updates == UPDATES
    path.write_bytes(b"".join(lines_of(path)[1:]))
    with pytest.raises(StoryLLMError, match="line 3"):  # the first line with a checksum of those before it
        read_log(path)


# Writing


def test_written_entries_are_read_back(path):
    with LogWriter(path).open(0) as log:
        for entry in (RUN, EVALUATIONS[0], *UPDATES):
            log.write(entry)
        assert log.sync() == path.stat().st_size
    read = read_log(path)
    assert (read.run["note"], read.updates, read.evaluations) == (RUN["note"], UPDATES, EVALUATIONS[:1])
    assert all(json.loads(line) for line in path.read_bytes().splitlines())  # plain JSON, checksums included


def test_an_entry_is_in_the_file_as_soon_as_it_is_written(path):
    with LogWriter(path).open(0) as log:
        log.write(UPDATES[0])
        assert read_log(path).updates == UPDATES[:1]


def test_opening_truncates_to_the_given_size(path):
    with LogWriter(path).open(0) as log:
        for entry in UPDATES[:3]:
            log.write(entry)
        size = log.sync()
        log.write(UPDATES[3])
    with LogWriter(path).open(size) as log:
        log.write(UPDATES[4])
    assert read_log(path).updates == [*UPDATES[:3], UPDATES[4]]
    assert read_log(path, size).updates == UPDATES[:3]
    content = path.read_bytes()
    with LogWriter(path).open(len(content) + 10_000):
        assert path.read_bytes() == content  # never extended


def test_warnings_are_issued_and_logged_after_the_next_entry(path):
    writer = LogWriter(path)
    with pytest.warns(UserWarning, match="before the file is open"):
        writer.warn("before the file is open")
    assert writer.sync() == 0
    with writer.open(0) as log:
        log.write({**RUN, "iteration": 3})
        with pytest.warns(UserWarning, match="later"):
            log.warn("later")
        log.write({**UPDATES[0], "iteration": 4})
        log.write({**UPDATES[0], "iteration": 5})
    warnings = [(entry["iteration"], entry["message"]) for entry in read_log(path).warnings]
    assert warnings == [(3, "before the file is open"), (4, "later")]


def test_a_log_that_cannot_be_written_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "log.jsonl"):
        with pytest.raises(StoryLLMError, match="cannot write"):
            LogWriter(path).open(0)


def test_a_symlink_is_not_followed(tmp_path, path):
    (tmp_path / "other").write_text("keep this")
    path.symlink_to(tmp_path / "other")
    with pytest.raises(StoryLLMError, match="cannot write"):
        LogWriter(path).open(0)
    assert (tmp_path / "other").read_text() == "keep this"


def test_the_environment_describes_versions_and_revision():
    environment = describe_environment()
    assert set(environment["versions"]) == {"python", "torch", "tiktoken", "tokenizers", "numpy"}
    checkout = Path(storyllm.__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        assert environment["git_revision"] is None
        return
    git = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    assert environment["git_revision"] == subprocess.check_output(git, text=True).strip()
