"""A trained model as one HTML file that generates stories in a browser, without a network.

The file contains the weights, the vocabulary and what is in the folder `page`: the engine, which runs in a worker, and
the HTML, CSS and script of the page.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import importlib.resources
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import Recipe, StoryLLMError, missing_extra, shown
from ..data.tokenizer import tokenizer_to_dict
from ..files import atomic_write
from ..importing import load_model, model_file
from ..model.quantization import to_int8
from ..storyteller import Storyteller
from ..training.log import read_log
from ..training.run_folder import LOG

if TYPE_CHECKING:
    from IPython.display import HTML

MAX_EVALUATIONS = 100  # points of the loss curves
FLOAT16_MAX = 65504


def export_page(
    storyteller: Storyteller | str | Path, path: str | Path, weights: str = "int8", overwrite: bool = False
) -> Path:
    """Writes a model as one HTML file that runs in a browser without a network; returns the path of the file.

    `storyteller` is a Storyteller, or anything that `storyllm.load` accepts. Only a checkpoint has a recipe for the
    page to show, and losses, if the log of the run is in the same folder. `weights` is "int8", with a scale for each
    row of a matrix, or "float16", which is exact to 3 digits and twice as large. Raises StoryLLMError if the file
    exists, unless `overwrite`, and if the weights are not finite or not float32.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise StoryLLMError(f"{path} exists; use another path, or pass overwrite=True (--overwrite) to replace it")
    page = _page(storyteller, weights)
    with atomic_write(path) as file:
        file.write(page.encode())
    return path


def playground(storyteller: Storyteller | str | Path, weights: str = "int8", height: int = 900) -> HTML:
    """The page of `export_page` as the output of a notebook cell, `height` pixels high.

    The notebook file then contains the model. Raises StoryLLMError as `export_page`, or if IPython is not installed.
    """
    try:
        from IPython.display import HTML
    except ImportError as error:
        raise missing_extra("playground", "IPython", "notebook") from error
    if type(height) is not int or height < 1:
        raise StoryLLMError(f"height is {shown(height)}, must be a positive integer (pixels)")
    page = html.escape(_page(storyteller, weights))
    # The sandbox keeps the page's script away from the notebook. Jupyter warns if the output begins with <iframe.
    attributes = f'sandbox="allow-scripts allow-forms" style="width: 100%; height: {height}px; border: 0"'
    return HTML(f'<div><iframe title="StoryLLM" {attributes} srcdoc="{page}"></iframe></div>')


def _page(source: Storyteller | str | Path, weights: str) -> str:
    """The HTML of the page."""
    storyteller, info = _described(source)
    info["weights"] = weights
    parts = {file.name: file.read_text(encoding="utf-8") for file in _folder().iterdir() if file.is_file()}
    style, script = parts["page.css"], parts["page.js"]
    values = {
        "POLICY": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; worker-src blob:; "
        "base-uri 'none'; form-action 'none'",
        "STYLE": style,
        # Everything that comes from the checkpoint is in here, as base64: no text in it can change the page.
        "MODEL": base64.b64encode(pack_model(storyteller, weights, info)).decode(),
        "WORKER": parts["engine.js"] + parts["load.js"] + parts["worker.js"],
        "SCRIPT": script,
    }
    page = parts["page.html"]
    for name, value in values.items():
        page = page.replace(f"<!--{name}-->", value)
    return page


def _folder() -> Any:
    return importlib.resources.files("storyllm") / "export" / "page"


def _hash(text: str) -> str:
    """The source expression of a content security policy that allows exactly this inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _described(source: Storyteller | str | Path) -> tuple[Storyteller, dict[str, Any]]:
    """The storyteller, and what the page says about it: size, recipe and evaluations."""
    recipe, evaluations = None, []
    if isinstance(source, Storyteller):
        storyteller = source
    elif isinstance(source, (str, Path)):
        loaded = load_model(source)
        storyteller = Storyteller(loaded.model, loaded.tokenizer)
        if loaded.contents:  # of a checkpoint of StoryLLM
            recipe = Recipe.from_dict(loaded.contents["recipe"])
            evaluations = _evaluations(model_file(source).parent / LOG, recipe)
    else:
        raise StoryLLMError(f"got {type(source).__name__}, expected a Storyteller or the path of a checkpoint")
    model = storyteller.model
    return storyteller, {
        "parameters": model.num_parameters(),
        "recipe": recipe.to_dict() if recipe else Recipe(model=model.config).to_dict() | {"data": {}, "train": {}},
        "evaluations": evaluations,
    }


def _evaluations(path: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """The evaluations of the run that trained the model, at most MAX_EVALUATIONS of them, the last included.

    Empty if there is no log, or if it belongs to another model.
    """
    if not path.is_file():
        return []
    log = read_log(path)
    if log.run.get("recipe", {}).get("model") != recipe.to_dict()["model"]:
        return []
    step = -(-len(log.evaluations) // MAX_EVALUATIONS) or 1
    kept = log.evaluations[::-1][::step][::-1]
    names = ("iteration", "train_loss", "val_loss", "val_bits_per_byte")
    return [{name: evaluation[name] for name in names} for evaluation in kept]


def pack_model(storyteller: Storyteller, weights: str, info: dict[str, Any]) -> bytes:
    """The weights, the vocabulary and `info` in one compressed file, as `loadModel` in page/load.js reads it.

    Compressed with gzip: the length of the header (4 bytes, little-endian), the header in JSON, the arrays. Each array
    begins at a multiple of 4 bytes; the header holds its offset from the end of the header. Raises StoryLLMError if the
    weights cannot be stored in this format.
    """
    if weights not in ("int8", "float16"):
        raise StoryLLMError(f"weights is {shown(weights)}, must be 'int8' or 'float16'")
    state = storyteller.model.state_dict()
    arrays, tensors = bytearray(), {}

    def append(tensor: Tensor, dtype: str) -> int:
        offset = len(arrays)
        data = tensor.cpu().numpy().astype(dtype).tobytes()
        arrays.extend(data + bytes(-len(data) % 4))
        return offset

    for name, tensor in state.items():
        if name == "lm_head.weight":  # tied to the token embedding
            continue
        if tensor.dtype != torch.float32:
            raise StoryLLMError(f"{name} is {tensor.dtype}, must be float32; load the model with weights='float32'")
        largest = tensor.abs().max().item()
        if not largest < float("inf"):
            raise StoryLLMError(f"{name} contains NaN or infinity; export another checkpoint")
        entry: dict[str, Any] = {"shape": list(tensor.shape), "dtype": weights if tensor.ndim == 2 else "float32"}
        if entry["dtype"] == "int8":
            rounded, scale = to_int8(tensor)
            entry |= {"scale": append(scale, "<f4"), "offset": append(rounded, "i1")}
        elif entry["dtype"] == "float16":
            if largest > FLOAT16_MAX:
                raise StoryLLMError(f"{name} contains {largest:.0f}, float16 ends at {FLOAT16_MAX}; use weights 'int8'")
            entry["offset"] = append(tensor, "<f2")
        else:
            entry["offset"] = append(tensor, "<f4")
        tensors[name] = entry
    config = storyteller.model.config
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "activation")
    header = {
        "config": {name: getattr(config, name) for name in names},
        "vocabulary": tokenizer_to_dict(storyteller.tokenizer)["tokens"],
        "info": info,
        "tensors": tensors,
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    return gzip.compress(struct.pack("<I", len(text)) + text + arrays, mtime=0)
