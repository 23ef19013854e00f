"""Pages that need nothing but one file: an HTML template of this folder with its data as JSON in it."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib.resources import files
from typing import Any


def fill_template(name: str, data: Any) -> str:
    """The template `name` with `data`. The page's script writes all of it as text, so no story is taken for HTML."""
    template = files(__package__).joinpath(name).read_text(encoding="utf-8")
    return template.replace("{{data}}", to_json(data).replace("<", "\\u003c"))  # a story may contain </script>


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON: dataclasses as objects, NaN and infinity as null."""
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
