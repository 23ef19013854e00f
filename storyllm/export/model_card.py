"""The model card (README.md) of an exported model."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from ..config import Recipe
from ..data.stories import TINYSTORIES
from ..importing import ModelFile
from ..training.log import Log, read_log
from ..training.run_folder import LOG

LICENSES = {TINYSTORIES: "CDLA-Sharing-1.0"}  # of data sets on the Hub

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
- storyllm
{datasets}---

# {name}

A small GPT with GPT-2's architecture that writes stories, trained with StoryLLM.

| | |
|---|---|
{facts}

## Usage

```python
from transformers import pipeline

generate = pipeline("text-generation", "{name}")
print(generate("Once upon a time", do_sample=True, temperature=0.8, top_p=0.95)[0]["generated_text"])
```

A story ends with the token `<|endoftext|>`. Prompt and story have at most {block_size:,} tokens.
"""


def model_card(loaded: ModelFile, source: str | Path, name: str) -> str:
    """The model card of `loaded`, which was read from `source`, under the name `name`.

    Losses and counts come from the checkpoint and from the `log.jsonl` next to it, if there is one. Local files that
    the model was trained on are named without their folders.
    """
    config = loaded.model.config
    facts = {
        "parameters": f"{loaded.model.num_parameters():,}",
        "layers, heads, width": f"{config.n_layer}, {config.n_head}, {config.n_embd:,}",
        "context": f"{config.block_size:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens (byte-level BPE{', GPT-2' * (loaded.tokenizer.name == 'gpt2')})",
    }
    if not loaded.contents:
        facts["training"] = "unknown (converted from another program's format)"
        return _card(facts, name, config.block_size)
    recipe = Recipe.from_dict(loaded.contents["recipe"])
    data, train = recipe.data, recipe.train
    log = _log_of(source)
    stories = log.run.get("data", {}).get("train", {}).get("stories")
    hub_name = data.source if _is_hub_name(data.source) else ""
    shown = hub_name or Path(data.source).name
    facts["data"] = f"`{shown}`" + (f", {stories:,} stories" if isinstance(stories, int) else "")
    facts["license of the data"] = LICENSES.get(hub_name, "see the data set" if hub_name else "unknown")
    if data.source == "synthetic":
        facts["license of the data"] = "none: written by StoryLLM's own generator"
    if loaded.contents.get("init_from"):
        facts["fine-tuned from"] = f"`{Path(loaded.contents['init_from']['name']).name}`"
    iteration = loaded.contents.get("iteration", loaded.contents.get("state", {}).get("iteration"))
    if isinstance(iteration, int):
        facts["iterations"] = f"{iteration:,} of {train.max_iters:,}"
        facts["tokens"] = (
            f"{iteration * train.batch_size * config.block_size:,} ({train.batch_size} windows an iteration)"
        )
        facts |= _losses(log, iteration)
    values = recipe.to_dict()
    values["data"]["source"] = shown
    details = f"\n## Recipe\n\n```json\n{json.dumps(values, indent=2)}\n```\n"
    return _card(facts, name, config.block_size, hub_name) + details


def _card(facts: dict[str, str], name: str, block_size: int, dataset: str = "") -> str:
    """The filled-in template."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    datasets = f"datasets:\n- {dataset}\n" if dataset else ""
    return CARD.format(name=name, facts=rows, datasets=datasets, block_size=block_size)


def _losses(log: Log, iteration: int) -> dict[str, str]:
    """The losses of the log's evaluation at that iteration, if it has one."""
    for entry in log.evaluations:
        if entry["iteration"] == iteration:
            return {
                "training loss": f"{entry['train_loss']:.4f} nats per token",
                "validation loss": f"{entry['val_loss']:.4f} nats per token",
                "bits per byte": f"{entry['val_bits_per_byte']:.4f}",
            }
    return {}


def _log_of(source: str | Path) -> Log:
    """The log of the run that wrote a checkpoint; an empty one if it is not there."""
    path = Path(source)
    path = (path if path.is_dir() else path.parent) / LOG
    return read_log(path) if path.is_file() else Log()


def _is_hub_name(source: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)) and not os.path.exists(source)
