"""The model card (README.md) of an exported model."""

from __future__ import annotations

import json
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


def model_card(loaded: ModelFile, checkpoint: str | Path, name: str) -> str:
    """The model card of `loaded`, which was read from `checkpoint`, under the name `name`.

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
    log, source_name = _log_of(checkpoint), recipe.data.source
    info = log.run.get("data", {}).get("train", {})
    # The fingerprint of a data set on the Hub is its name, that of local files is not.
    on_hub = source_name in LICENSES or info.get("request", {}).get("fingerprint", "").split(" ")[0] == source_name
    license_of_data = LICENSES.get(source_name, "see the data set" if on_hub else "unknown")
    if source_name == "synthetic":
        license_of_data = "none: written by StoryLLM's own generator"
    source_name = source_name if on_hub else Path(source_name).name or "local files"
    facts["data"] = f"`{source_name}`" + (f", {info['stories']:,} stories" if info else "")
    facts["license of the data"] = license_of_data
    if isinstance(initial := loaded.contents.get("init_from"), dict):
        initial_name = str(initial.get("name"))  # a path if it has a checksum, otherwise a name on the Hub
        facts["fine-tuned from"] = f"`{Path(initial_name).name if initial.get('sha256') else initial_name}`"
    state = loaded.contents.get("state")  # of a last.pt
    iteration = (state if isinstance(state, dict) else loaded.contents).get("iteration")
    if isinstance(iteration, int):
        facts["iterations"] = f"{iteration:,} of {recipe.train.max_iters:,}"
        facts["tokens"] = f"{iteration * recipe.train.batch_size * config.block_size:,}"
        facts |= _losses(log, iteration)
    recipe = recipe.override({"data.source": source_name})
    details = f"\n## Recipe\n\n```json\n{json.dumps(recipe.to_dict(), indent=2)}\n```\n"
    return _card(facts, name, config.block_size, source_name if on_hub else "") + details


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


def _log_of(checkpoint: str | Path) -> Log:
    """The log of the run that wrote a checkpoint; an empty one if it is not there."""
    path = Path(checkpoint)
    path = (path if path.is_dir() else path.parent) / LOG
    return read_log(path) if path.is_file() else Log()
