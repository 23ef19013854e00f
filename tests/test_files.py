"""A file is whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storyllm.files import atomic_write, sha256, write_json


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
        assert not path.exists()
        sizes_at_sync.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_write(path) as file:
        file.write(b"abc")
    assert sizes_at_sync == [3]


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
    assert json.loads(raw) == value
    assert raw.endswith(b"\n")
    assert "Zoë".encode() in raw


def test_write_json_of_what_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_bytes()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("size", [0, 1, 300_000])
def test_sha256(tmp_path: Path, size: int) -> None:
    data = bytes(i % 251 for i in range(size))
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_sha256_of_nothing_is_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    assert sha256(tmp_path / "a") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
