"""Copies of a run's state in a second place, such as a mounted Google Drive.

A mounted Drive is not a local disk: files arrive late or empty, and replaced files fill its trash. So a run trains on
the local disk, and its state is copied from time to time. Each copy is a folder of its own, which counts only if it has
a manifest, written last, whose checksums match the files.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ..config import StoryLLMError
from ..files import fsync, os_error, read_json, sha256, write_json

MANIFEST = "manifest.json"

Position = tuple[int, int]  # how far a state is: iteration, and bytes of the log


@dataclass(frozen=True)
class Copy:
    """The manifest of a copy."""

    run: str  # identifies the run: the checksum of the first line of its log
    iteration: int
    log_bytes: int
    checksums: dict[str, str]  # SHA-256 of each file

    @property
    def position(self) -> Position:
        """How far the state is."""
        return self.iteration, self.log_bytes


class Mirror:
    """The copies of the run in `folder`, in a subfolder of `mirror_dir` with the same name.

    `files` are the names of the files of a state: the log first, and last the file without which there is no state.
    `warn` gets the message of the first copy that fails. Raises StoryLLMError if `mirror_dir` cannot be a mirror.
    """

    def __init__(
        self, mirror_dir: str, minutes: float, folder: Path, files: tuple[str, ...], warn: Callable[[str], None]
    ) -> None:
        self.folder = folder
        self.path = Path(mirror_dir) / folder.resolve().name
        self.minutes = minutes
        self.files = files
        self.warn = warn
        self._warned = False
        self._copied: Position | None = None
        self._latest: Path | None = None  # the copy that was restored or made last
        self._last_attempt = time.monotonic()
        parent = Path(mirror_dir).absolute().parent
        if not os.path.isdir(parent):
            raise StoryLLMError(
                f"mirror_dir is {mirror_dir}, but the folder {parent} does not exist; mount or create it"
            )
        if self.path.resolve() == folder.resolve():
            raise StoryLLMError(f"mirror_dir is {mirror_dir}, where the run itself is; use a folder on another disk")

    def restore(self, local: Position | None) -> Path | None:
        """Copies the newest complete copy to the run's folder if it is ahead of `local`; returns its path.

        `local` is the position of the state in the run's folder, None if it has none. A copy that is not complete is
        skipped with a warning. Raises StoryLLMError if the mirror is that of another run, or if it has copies, none
        of them is complete, and there is no local state either: a new run would replace what may still arrive.
        """
        try:
            copies = self._copies()
        except OSError as error:
            if local is None:
                raise os_error("read", self.path, error) from error
            self.warn(f"cannot read {self.path} ({error.strerror}); resuming from {self.folder}")
            return None
        self._check_run(copies)
        incomplete = [path for path in self._folders() if path not in copies]
        for path, copy in sorted(copies.items(), key=lambda item: item[1].position, reverse=True):
            if local is not None and copy.position <= local:
                break
            try:
                self._fetch(path, copy)
                self._latest = path
                return path
            except OSError as error:
                self.warn(f"the copy {path} is not complete ({error.strerror or error}); looking for an earlier one")
                incomplete.append(path)
        if incomplete and local is None:
            raise StoryLLMError(
                f"{self.path} has copies of a run, but none of them is complete ({len(incomplete)} in all); wait until "
                "their files have arrived, or move them away to start a new run"
            )
        return None

    def copy_if_due(self, position: Position) -> None:
        """Copies the state in the run's folder, which is at `position`, every `minutes`."""
        if time.monotonic() - self._last_attempt >= 60 * self.minutes:
            self.copy(position)

    def copy(self, position: Position) -> None:
        """Copies the state in the run's folder, which is at `position`, unless it was copied already.

        Training waits while the files are copied and read back. A failure is a warning, once.
        """
        if position == self._copied or position[1] == 0:  # nothing is in the log yet
            return
        try:
            self._copy(position)
            self._copied = position
        except (OSError, StoryLLMError) as error:
            if not self._warned:
                reason = error.strerror or error if isinstance(error, OSError) else error
                self.warn(f"cannot copy the run to {self.path} ({reason}); training continues without a new copy")
            self._warned = True
        self._last_attempt = time.monotonic()

    def _copy(self, position: Position) -> None:
        """Makes a complete copy, and deletes all but this one and the previous one.

        Raises OSError or StoryLLMError if that fails.
        """
        copies = self._copies()
        self._check_run(copies)
        self.path.parent.mkdir(exist_ok=True)
        self.path.mkdir(exist_ok=True)
        target = Path(tempfile.mkdtemp(prefix=f"{position[0]}-", dir=self.path))
        try:
            names = [name for name in self.files if (self.folder / name).exists()]
            checksums = {name: _copy_file(self.folder / name, target / name) for name in names}
            for name, checksum in checksums.items():
                if sha256(target / name) != checksum:
                    raise OSError(f"{name} is corrupted when read back")
            copy = Copy(self._run_id(), *position, checksums)
            write_json(target / MANIFEST, asdict(copy))
        except BaseException:
            self._delete(target)
            raise
        previous = self._latest or max(copies, key=lambda path: copies[path].position, default=None)
        self._latest = target
        for path in self._folders():
            if path not in (target, previous):
                self._delete(path)

    def _fetch(self, path: Path, copy: Copy) -> None:
        """Copies the files of a copy to the run's folder. Raises OSError, and changes nothing, if it is incomplete."""
        parts = {name: self.folder / f"{name}.part" for name in self.files if name in copy.checksums}
        try:
            for name, part in parts.items():
                part.unlink(missing_ok=True)
                if _copy_file(path / name, part) != copy.checksums[name]:
                    raise OSError(f"{name} does not match its checksum")
            for name, part in parts.items():
                os.replace(part, self.folder / name)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)

    def _folders(self) -> list[Path]:
        """The folders of all copies, complete or not."""
        try:
            return [path for path in self.path.iterdir() if re.match("[0-9]+-", path.name) and path.is_dir()]
        except FileNotFoundError:
            return []

    def _copies(self) -> dict[Path, Copy]:
        """The copies with an intact manifest."""
        copies = {}
        for path in self._folders():
            with suppress(StoryLLMError, TypeError):
                copies[path] = Copy(**read_json(path / MANIFEST))
        return copies

    def _check_run(self, copies: dict[Path, Copy]) -> None:
        """Raises StoryLLMError if the run's folder has files, and a copy is not of that run."""
        has_files = any((self.folder / name).exists() for name in self.files)
        if has_files and any(copy.run != self._run_id() for copy in copies.values()):
            raise StoryLLMError(
                f"{self.path} has copies of another run than {self.folder}; use another mirror_dir, or another "
                "checkpoint folder"
            )

    def _run_id(self) -> str:
        """The checksum of the first line of the run's log, which has the time at which it began; "" without a log."""
        try:
            with open(self.folder / self.files[0], "rb") as log:
                return hashlib.sha256(log.readline()).hexdigest()
        except FileNotFoundError:
            return ""

    def _delete(self, path: Path) -> None:
        """Deletes the folder of a copy, as far as possible: the manifest first."""
        for name in (MANIFEST, f"{MANIFEST}.part", *self.files):
            with suppress(OSError):
                os.truncate(path / name, 0)  # a Drive moves deleted files to its trash, where they take space
                (path / name).unlink()
        with suppress(OSError):
            path.rmdir()


def _copy_file(source: Path, target: Path) -> str:
    """Copies a file and flushes it to disk. Returns the SHA-256 of what was read."""
    digest = hashlib.sha256()
    with open(source, "rb") as reader, open(target, "xb") as writer:
        while chunk := reader.read(1 << 20):
            digest.update(chunk)
            writer.write(chunk)
        writer.flush()
        fsync(writer.fileno())
    return digest.hexdigest()
