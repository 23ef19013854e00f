"""Atomic writes, checksums and folder locks."""

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
from helpers import environment, folder_contents

from storyllm import StoryLLMError
from storyllm.files import atomic_write, earlier_version, lock_folder, read_json, sha256, write_json


def test_the_old_file_is_kept_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new" * 100_000)
        file.flush()
        assert path.read_bytes() == b"old"
    assert folder_contents(tmp_path) == {"a.bin": b"new" * 100_000}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [{}, {"a.bin": b"old"}])
def test_an_exception_leaves_the_folder_as_it_was(tmp_path: Path, error: type[BaseException], before: dict) -> None:
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(error), atomic_write(tmp_path / "a.bin") as file:  # noqa: PT012
        file.write(b"half of the n")
        raise error
    assert folder_contents(tmp_path) == before


def test_missing_folders_are_created(tmp_path: Path) -> None:
    path = tmp_path / "one" / "two" / "a.bin"
    with atomic_write(path) as file:
        file.write(b"x")
    assert path.read_bytes() == b"x"


def test_an_empty_block_writes_an_empty_file(tmp_path: Path) -> None:
    with atomic_write(str(tmp_path / "a")):  # type: ignore[arg-type]  # a string works, too
        pass
    assert folder_contents(tmp_path) == {"a": b""}


def test_data_is_flushed_before_the_rename_and_the_name_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flushed = tmp_path / "a.bin", []

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        is_file = stat.S_ISREG(status.st_mode)
        flushed.append(("file" if is_file else "folder", status.st_size if is_file else None, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_write(path) as file:
        file.write(b"abc")
    assert flushed == [("file", 3, False), ("folder", None, True)]


def test_earlier_versions_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    for number in range(5):
        with atomic_write(path, keep=2) as file:
            file.write(b"%d" % number)
    assert folder_contents(tmp_path) == {"last.pt": b"4", "last.1.pt": b"3", "last.2.pt": b"2"}
    assert [earlier_version(path, number).name for number in range(3)] == ["last.pt", "last.1.pt", "last.2.pt"]


def test_a_symlink_in_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (tmp_path / "a.bin.part").symlink_to(tmp_path / "elsewhere")
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"new")
    assert folder_contents(tmp_path) == {"elsewhere": b"precious", "a.bin": b"new"}


def test_only_one_process_may_lock_a_folder_and_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"old")
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom storyllm.files import atomic_write, lock_folder\n"
        "folder = Path(sys.argv[1])\n"
        "with lock_folder(folder), atomic_write(folder / 'a.bin') as file:\n"
        "    file.write(b'long' * 100_000)\n    file.flush()\n    print('ready', flush=True)\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            with pytest.raises(StoryLLMError, match=r"run is in use"), lock_folder(folder):
                pass
            with lock_folder(tmp_path / "other"):
                pass
        finally:
            process.send_signal(signal.SIGKILL)
    with lock_folder(folder):
        assert (folder / "a.bin").read_bytes() == b"old"
        with atomic_write(folder / "a.bin") as file:
            file.write(b"new")
    assert folder_contents(folder) == {"a.bin": b"new"}  # neither a lock nor a temporary file is left


def test_a_folder_can_be_locked_again_after_release_but_not_twice(tmp_path: Path) -> None:
    for _ in range(2):
        with lock_folder(tmp_path), pytest.raises(StoryLLMError, match="in use"), lock_folder(tmp_path):
            pass


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoryLLMError, match="file/run"), lock_folder(tmp_path / "file" / "run"):
        pass
    with pytest.raises(StoryLLMError, match=r"file/a\.json"):
        write_json(tmp_path / "file" / "a.json", {})


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_filesystem_without_locks_and_fsync_works_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def not_supported(*_: object) -> None:
        raise OSError(code, "not supported")

    monkeypatch.setattr(fcntl, "flock", not_supported)
    monkeypatch.setattr(os, "fsync", not_supported)
    with pytest.warns(UserWarning, match="cannot be locked"), lock_folder(tmp_path):
        pass
    with pytest.warns(UserWarning, match="fsync"):
        write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.EIO, "disk"), (errno.ENOSPC, "space"), (errno.EDQUOT, "space"), (errno.EROFS, "folder")]
)
def test_a_failing_disk_is_an_error_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    write_json(tmp_path / "a.json", {"a": 1})
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoryLLMError, match=rf"a\.json.*{os.strerror(code)}.*{advice}"):
        write_json(tmp_path / "a.json", {"a": 2})
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize(
    "value", [{}, {"name": "Zoë \U0001f600 \u2028", "list": [1, 2.5, None, True], "nested": {"a": {}}}, {"a": "\ud800"}]
)
def test_read_json_returns_what_write_json_wrote(tmp_path: Path, value: dict) -> None:
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_written_json_is_readable_for_people_and_other_programs(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "Zoë", "tokens": 5})
    raw = (tmp_path / "a.json").read_bytes()
    assert set(json.loads(raw)) == {"name", "tokens", "checksum"}
    assert "Zoë".encode() in raw and raw.count(b"\n") > 3 and raw.endswith(b"\n")


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    before = folder_contents(tmp_path)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert folder_contents(tmp_path) == before


def test_every_flipped_bit_of_a_json_is_detected_or_harmless(tmp_path: Path) -> None:
    value = {"tokens": 4096, "source": "stories", "request": {"seed": 0, "fraction": 0.01}}
    path = tmp_path / "a.json"
    write_json(path, value)
    raw, detected = path.read_bytes(), 0
    for position in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            assert read_json(path) == value
        except StoryLLMError:
            detected += 1
    assert detected > 7 * len(raw)  # the others change white space


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1}', b"\xff", b"[" * 100_000, b'{"checksum": null}'])
def test_other_json_is_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(StoryLLMError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_a_missing_json_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(StoryLLMError, match=r"none\.json"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("size", [0, 1, 300_000])
def test_sha256_is_that_of_hashlib(tmp_path: Path, size: int) -> None:
    data = bytes(i % 251 for i in range(size))
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()
