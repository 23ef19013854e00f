"""The files of a local source, and the split that each belongs to."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..config import StoryLLMError
from ..files import os_error
from .formats import SUFFIXES, file_format

METADATA = ("dataset_info.json", "dataset_infos.json")  # written by the `datasets` library, not stories


def source_files(source: str) -> dict[str, list[Path]]:
    """The files of each split under "train" and "validation", and under "skipped" the others in the folder.

    A file belongs to a split if its name, or else its subfolder, contains "train" or "valid", or "val" or "dev" as a
    word. Unless both kinds exist, each split gets every file. Raises StoryLLMError if there are none, if one is
    unreadable, or if the same stories might be in several files: files of several formats, or several versions of both
    splits.
    """
    path = Path(source)
    if is_saved_dataset(path):
        tables = sorted(path.rglob("*.arrow"))
        return {"train": tables, "validation": tables, "skipped": []}
    found = _files_in(path) if path.is_dir() else [path]
    files = [p for p in found if file_format(p) and p.name not in METADATA]
    if not files and path.is_dir():
        raise StoryLLMError(f"{source} contains no {', '.join(SUFFIXES)} files; pass another folder or file")
    if not files:
        raise StoryLLMError(
            f"{source} has the suffix {path.suffix!r}, must be one of {', '.join(SUFFIXES)}; convert the file"
        )
    splits = {p: _split_in_name(p.stem) or _split_in_name(p.relative_to(path).parent.as_posix()) for p in files}
    train, validation = ([p for p in files if splits[p] == split] for split in ("train", "validation"))
    if not train or not validation:
        train = validation = files
    used = sorted({*train, *validation})
    _check_files(source, used)
    if train != validation:
        _check_one_version(path, train, validation)
    return {"train": train, "validation": validation, "skipped": [p for p in found if p not in used]}


def is_saved_dataset(path: Path) -> bool:
    """True if `save_to_disk` of the `datasets` library wrote the folder."""
    return any(os.path.isfile(path / name) for name in ("dataset_dict.json", "state.json"))


def _split_in_name(name: str) -> str | None:
    """The split that a name contains, or None if it contains none or both."""
    in_train = re.search(r"train", name, re.IGNORECASE)
    in_validation = re.search(r"valid|(^|[-_./])(val|dev)([-_./]|$)", name, re.IGNORECASE)
    if bool(in_train) == bool(in_validation):
        return None
    return "train" if in_train else "validation"


def _files_in(folder: Path) -> list[Path]:
    """The files in a folder and its subfolders, sorted, without hidden ones (such as Jupyter's checkpoints)."""
    files: list[Path] = []
    visited: set[str] = set()

    def fail(error: OSError) -> None:
        raise os_error("read", error.filename or folder, error) from error

    for parent, subfolders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # links can lead to a folder twice, or in a circle
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _check_files(source: str, files: list[Path]) -> None:
    """Raises StoryLLMError unless all files are regular and have the same format."""
    for path in files:
        if not os.path.isfile(path):
            raise StoryLLMError(f"{path} is not a regular file, or cannot be read; remove it, or pass another source")
    formats = sorted({str(file_format(path)) for path in files})
    if len(formats) > 1:
        raise StoryLLMError(
            f"{source} has files of several formats ({', '.join(formats)}), must have one, as they may hold the same "
            "stories; pass one file, or a folder with one format"
        )


def _check_one_version(folder: Path, train: list[Path], validation: list[Path]) -> None:
    """Raises StoryLLMError for several pairs of files, such as "V1-train", "V1-valid", "V2-train" and "V2-valid"."""

    def prefixes(paths: list[Path], split: str) -> set[str]:
        return {re.split(split, p.relative_to(folder).as_posix(), flags=re.IGNORECASE)[0] for p in paths}

    versions = prefixes(train, "train") & prefixes(validation, "val|dev")
    if len(versions) > 1:
        names = ", ".join(f"{version}*" for version in sorted(versions))
        raise StoryLLMError(
            f"{folder} has train and validation files of several versions ({names[:300]}), must have one; pass a "
            "folder with one of them"
        )
