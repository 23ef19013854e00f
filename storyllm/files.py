"""Files that are whole or not there at all, and folders that one process at a time works in."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows has other locks
    fcntl = None  # type: ignore[assignment]

from .config import StoryLLMError

# What to do about an error of the operating system.
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room, or take another disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "take another folder, or change its permissions"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "close other programs' files, or allow more (ulimit -n)"),
}

# What a filesystem without them, such as a mounted Drive, answers to a call for fsync or a lock.
NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.ENOTTY, errno.EBADF)


def cannot(deed: str, path: Path | str, error: OSError) -> StoryLLMError:
    """What to raise where the operating system does not let us read or write `path`."""
    advice = ADVICE.get(error.errno or 0, "check the disk, or take another folder")
    return StoryLLMError(f"{path} cannot be {deed} ({error.strerror or error}): {advice}")


@contextmanager
def atomic_write(path: Path, keep: int = 0) -> Iterator[IO[bytes]]:
    """A binary file that takes the name `path` only when the block ends well; until then the old one stays.

    The bytes are on the disk (fsync) before the name changes, so a cut of power leaves the old file or the new one.
    With `keep`, so many of the old ones stay under the names of `earlier`. Raises StoryLLMError where the file cannot
    be written, as on a full disk.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # what a killed process left; or a link, which would lead elsewhere
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            sync(file.fileno())
        for number in range(keep, 0, -1):
            with suppress(FileNotFoundError):
                os.replace(earlier(path, number - 1), earlier(path, number))
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise cannot("written", path, error) from error
        raise


def earlier(path: Path, number: int) -> Path:
    """The name of the `number`-th file before `path`: last.pt, last.1.pt, last.2.pt, ..."""
    return path.with_name(f"{path.stem}.{number}{path.suffix}") if number else path


def sync(descriptor: int) -> None:
    """Waits until an open file is on the disk; warns where the filesystem cannot tell."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        warnings.warn(
            "this disk cannot say when a file is safe: a cut of power may cost what was saved last", stacklevel=2
        )


def _sync_folder(folder: Path) -> None:
    """Has the names in a folder on the disk, too, where the system knows how."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes `folder` if need be, and keeps every other process that asks for it out until the block ends.

    The lock is on the folder itself and goes with the process, however that ends. Raises StoryLLMError if another has
    it. Warns where the filesystem has no locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot("made", folder, error) from error
    descriptor = None
    try:
        try:
            if fcntl is None:
                raise OSError(errno.ENOTSUP, "no locks")
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoryLLMError(
                f"{folder} is in use by another process: wait for it, stop it, or take another folder"
            ) from error
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise cannot("opened", folder, error) from error
            warnings.warn(f"{folder} cannot be locked here: see to it that nothing else works in it", stacklevel=3)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a dictionary as indented JSON, atomically, with a checksum of all the rest in it."""
    checked = {**values, "checksum": _checksum(values)}
    with atomic_write(path) as file:
        file.write((json.dumps(checked, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary that `write_json` wrote. Raises StoryLLMError if it is missing, damaged, or something else."""
    try:
        values = json.loads(Path(path).read_bytes())
        if not isinstance(values, dict) or values.pop("checksum", None) != _checksum(values):
            raise ValueError("another checksum")
    except OSError as error:
        raise cannot("read", path, error) from error
    except (ValueError, RecursionError) as error:
        raise StoryLLMError(f"{path} is damaged or not StoryLLM's: prepare the data again") from error
    return values


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
