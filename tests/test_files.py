"""A file is whole or not there at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from storyllm import StoryLLMError
from storyllm.files import atomic_write, earlier, locked, read_json, sha256, write_json


def test_the_name_holds_the_old_file_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new" * 100_000)
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" * 100_000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_the_old_file_stays_when_the_block_raises(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:  # noqa: PT012
        file.write(b"half of the n")
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_when_there_was_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "a.bin") as file:  # noqa: PT012
        file.write(b"x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_parents_are_made(tmp_path: Path) -> None:
    path = tmp_path / "one" / "two" / "a.bin"
    with atomic_write(path) as file:
        file.write(b"x")
    assert path.read_bytes() == b"x"


def test_an_empty_block_makes_an_empty_file(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_bytes() == b""


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    with atomic_write(str(tmp_path / "a")) as file:  # type: ignore[arg-type]
        file.write(b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_the_bytes_are_on_the_disk_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    sizes_at_sync: list[int] = []

    def fsync(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):  # the folder's turn comes when the name has changed
            assert not path.exists()
            sizes_at_sync.append(os.fstat(descriptor).st_size)
        else:
            assert path.exists()
            sizes_at_sync.append(-1)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_write(path) as file:
        file.write(b"abc")
    assert sizes_at_sync == [3, -1]


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    code = (
        "import os, signal, sys\nfrom storyllm.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write(b'long' * 100_000); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # The module alone: what the package imports besides takes seconds.
    code = "import importlib.util, types, sys; sys.modules['storyllm'] = types.ModuleType('storyllm')\n" + (
        f"sys.modules['storyllm'].__path__ = [{str(Path(sys.modules['storyllm'].__path__[0]))!r}]\n" + code
    )
    ended = subprocess.run([sys.executable, "-c", code, str(path)], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert path.read_bytes() == b"old"
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]  # what the killed one left is gone


def test_write_json_reads_back(tmp_path: Path) -> None:
    value = {"name": "Zoë \U0001f600 \u2028", "list": [1, 2.5, None, True], "nested": {"a": {}}}
    write_json(tmp_path / "a.json", value)
    raw = (tmp_path / "a.json").read_bytes()
    assert read_json(tmp_path / "a.json") == value
    assert {**json.loads(raw), "checksum": 0} == {**value, "checksum": 0}
    assert raw.endswith(b"\n")
    assert "Zoë".encode() in raw


def test_write_json_of_what_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_every_bit_of_a_json_counts(tmp_path: Path) -> None:
    """What is read after one bit has changed is what was written, or nothing."""
    value = {"tokens": 4096, "source": "stories", "request": {"seed": 0, "share": 0.01}}
    path = tmp_path / "a.json"
    write_json(path, value)
    raw = path.read_bytes()
    refused = 0
    for place in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert read_json(path) == value
        except StoryLLMError:
            refused += 1
    assert refused > 7 * len(raw)  # line ends and spaces between may change


@pytest.mark.parametrize("size", [0, 1, 300_000])
def test_sha256(tmp_path: Path, size: int) -> None:
    data = bytes(i % 251 for i in range(size))
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_sha256_of_nothing_is_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    assert sha256(tmp_path / "a") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_earlier_files_stay_under_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    for number in range(5):
        with atomic_write(path, keep=2) as file:
            file.write(b"%d" % number)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        "last.pt": b"4",
        "last.1.pt": b"3",
        "last.2.pt": b"2",
    }
    assert earlier(path, 0) == path


def test_a_link_in_the_temporary_files_place_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (tmp_path / "a.bin.part").symlink_to(tmp_path / "elsewhere")
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"new")
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"
    assert (tmp_path / "a.bin").read_bytes() == b"new"


def test_a_locked_folder_is_for_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with locked(folder):
        with pytest.raises(StoryLLMError, match="run is in use by another process: wait for it"), locked(folder):
            pass
        with locked(tmp_path / "other"):
            pass
    with locked(folder):
        pass
    assert list(folder.iterdir()) == []  # nothing is left behind


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_where_there_are_no_locks_and_no_fsync_it_works_and_says_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def not_here(*_: object) -> None:
        raise OSError(code, "not supported")

    monkeypatch.setattr(fcntl, "flock", not_here)
    monkeypatch.setattr(os, "fsync", not_here)
    with pytest.warns(UserWarning, match="cannot be locked here: see to it that nothing else"), locked(tmp_path):
        pass
    with pytest.warns(UserWarning, match="a cut of power may cost what was saved last"):
        write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_a_disk_that_fails_is_an_error_not_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    write_json(tmp_path / "a.json", {"a": 1})
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StoryLLMError, match=r"a\.json cannot be written \(Input/output error\)"):
        write_json(tmp_path / "a.json", {"a": 2})
    assert read_json(tmp_path / "a.json") == {"a": 1}
