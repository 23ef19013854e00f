"""Atomic writes, checksums, and folder locks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from .config import StoryLLMError

# What the user can do about an operating system error.
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space, or use another disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "use another folder, or change its permissions"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "close some files, or raise the limit (ulimit -n)"),
}

# Errors that mean a filesystem does not support fsync or locks, such as a mounted Google Drive.
NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.ENOTTY, errno.EBADF)


def os_error(action: str, path: Path | str, error: OSError) -> StoryLLMError:
    """The StoryLLMError for an operating system error: `action` is a verb such as "read" or "write"."""
    advice = ADVICE.get(error.errno or 0, "check the disk, or use another folder")
    return StoryLLMError(f"cannot {action} {path} ({error.strerror or error}); {advice}")


@contextmanager
def atomic_write(path: Path, keep: int = 0) -> Iterator[IO[bytes]]:
    """A binary file that replaces `path` when the block ends without an exception.

    The data is flushed to disk (fsync) before the file is renamed, so after a crash or power loss `path` is either the
    old or the new file. `keep` previous versions are kept under the names of `earlier_version`. Raises StoryLLMError if
    the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # left by a killed process, or a symlink that points elsewhere
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            fsync(file.fileno())
        for number in range(keep, 0, -1):
            with suppress(FileNotFoundError):
                os.replace(earlier_version(path, number - 1), earlier_version(path, number))
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise os_error("write", path, error) from error
        raise


@contextmanager
def atomic_folder(folder: Path, replace: Collection[str] = ()) -> Iterator[Path]:
    """An empty folder that becomes `folder` when the block ends without an exception.

    An existing `folder` is replaced if it is empty or has no other files than those named in `replace`. Otherwise, and
    if a file cannot be written, raises StoryLLMError.
    """
    folder = Path(os.path.abspath(folder))  # has a name, even if it is "."
    part, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    try:
        if folder.exists() and (others := {path.name for path in folder.iterdir()} - set(replace)):
            advice = "" if replace else ", or pass overwrite=True (--overwrite) to replace an earlier export"
            raise StoryLLMError(f"{folder} already has files ({min(others)}); use another folder{advice}")
        for left_over in (part, old):  # by a killed process
            shutil.rmtree(left_over, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        for path in part.iterdir():
            with open(path, "r+b") as file:
                fsync(file.fileno())
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
        _fsync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise os_error("write", folder, error) from error
        raise


def earlier_version(path: Path, number: int) -> Path:
    """The path of the `number`-th version before the current one: last.pt, last.1.pt, last.2.pt, ..."""
    return path.with_name(f"{path.stem}.{number}{path.suffix}") if number else path


def fsync(descriptor: int) -> None:
    """Flushes an open file to disk. Warns if the filesystem does not support it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        warnings.warn("this filesystem does not support fsync: a power loss may cost the last save", stacklevel=2)


def _fsync_folder(folder: Path) -> None:
    """Flushes the names of the files in a folder to disk, where the operating system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Creates `folder` if necessary and holds an exclusive lock on it. The lock ends with the process.

    Raises StoryLLMError if another process holds the lock. Warns if the filesystem does not support locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise os_error("create", folder, error) from error
    descriptor = None
    try:
        try:
            if fcntl is None:
                raise OSError(errno.ENOTSUP, "no locks")
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoryLLMError(
                f"{folder} is in use by another process; wait for it, stop it, or use another folder"
            ) from error
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise os_error("open", folder, error) from error
            warnings.warn(f"{folder} cannot be locked here: make sure that no other process uses it", stacklevel=3)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a dictionary as indented JSON, atomically, with a checksum of its other entries."""
    checked = {**values, "checksum": _checksum(values)}
    with atomic_write(path) as file:
        file.write((json.dumps(checked, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary written by `write_json`. Raises StoryLLMError if the file cannot be read or is corrupted."""
    try:
        values = json.loads(Path(path).read_bytes())
        if not isinstance(values, dict) or values.pop("checksum", None) != _checksum(values):
            raise ValueError("checksum mismatch")
    except OSError as error:
        raise os_error("read", path, error) from error
    except (ValueError, RecursionError) as error:
        raise StoryLLMError(f"{path} is corrupted or was not written by StoryLLM; prepare the data again") from error
    return values


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
