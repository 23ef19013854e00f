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

    A file belongs to a split if its name contains "train", or "valid", "val" or "dev". Unless both kinds exist, each
    split gets every file. Raises StoryLLMError if there are none, if one is unreadable, or if the same stories might be
    in several files: files of several formats, or several versions of both splits.
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
    _check_files(source, files)
    train = [p for p in files if re.search(r"train", p.stem, re.IGNORECASE)]
    validation = [p for p in files if re.search(r"valid|(^|[-_.])(val|dev)([-_.]|$)", p.stem, re.IGNORECASE)]
    if train and validation and not set(train) & set(validation):
        _check_one_version(source, train, validation)
    else:
        train = validation = files
    used = {*train, *validation}
    return {"train": train, "validation": validation, "skipped": [p for p in found if p not in used]}


def is_saved_dataset(path: Path) -> bool:
    """True if `save_to_disk` of the `datasets` library wrote the folder."""
    return any(os.path.isfile(path / name) for name in ("dataset_dict.json", "state.json"))


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


def _check_one_version(source: str, train: list[Path], validation: list[Path]) -> None:
    """Raises StoryLLMError for several pairs of files, such as "V1-train", "V1-valid", "V2-train" and "V2-valid"."""
    versions = {re.split("train", path.stem, flags=re.IGNORECASE)[0] for path in train}
    versions &= {re.split("val|dev", path.stem, flags=re.IGNORECASE)[0] for path in validation}
    if len(versions) > 1:
        names = ", ".join(f"{version}*" for version in sorted(versions))
        raise StoryLLMError(
            f"{source} has train and validation files of several versions ({names[:300]}), must have one; pass a "
            "folder with one of them"
        )
