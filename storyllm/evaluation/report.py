"""`judge`: compares the stories of models, and writes the result as a page, as JSON and as a list of stories."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..config import StoryLLMError, plain_number, shown
from ..data.prepare import ProgressBar
from ..data.stories import SPLITS
from ..data.token_file import Dataset, open_dataset
from ..data.tokenizer import tokenizer_hash
from ..files import atomic_write, lock_folder
from ..storyteller import DEFAULT_MAX_NEW_TOKENS, Storyteller, load
from .comparison import (
    FLOOR,
    METRICS,
    NATS_METRICS,
    StoryReport,
    differences,
    likelihood_statistics,
    reference_statistics,
    story_statistics,
)
from .consistency import GENDERS
from .likelihood import StoryLosses, story_losses
from .novelty import Copies, CopySearch, story_chunks
from .pages import fill_template, to_json
from .protocol import REAL, Settings, Story, choose_beginnings, complete, first_words, real_stories, story_texts
from .reference import SacreBLEU
from .statistics import Statistic
from .vocabulary import words

PAGE, DATA, STORIES = "report.html", "report.json", "stories.jsonl"


def judge(
    models: Mapping[str, str | Path | Storyteller],
    data: str | Path = "data",
    out: str | Path | None = None,
    beginnings: int = 50,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> StoryReport:
    """Compares the stories of models, given as {name: checkpoint or Storyteller}, with each other and with real ones.

    `data` is the folder of the training data. Each model completes the same `beginnings` of stories of its validation
    split. With `out`, writes report.html, report.json and stories.jsonl to that folder. Raises StoryLLMError if an
    argument is invalid, if sacrebleu is not installed, or if `out` has a report and `overwrite` is not set.
    """
    beginnings, seed = plain_number(beginnings), plain_number(seed)
    settings = Settings(beginnings, temperature, top_k, top_p, max_new_tokens, seed)
    if not isinstance(models, Mapping) or not models or {REAL, FLOOR} & set(models):
        raise StoryLLMError(
            f"models is {shown(models)}, must be {{name: checkpoint}}, at least one and not named {REAL!r} or {FLOOR!r}"
        )
    if out is not None and (Path(out) / DATA).exists() and not overwrite:
        raise StoryLLMError(f"{out} already has a report; use another folder, or replace it (--overwrite)")
    dataset, sacrebleu = open_dataset(data), SacreBLEU()
    for split in SPLITS:
        dataset[split].check_ids()
    texts = story_texts(dataset.validation, dataset.tokenizer)
    chosen = choose_beginnings(texts, beginnings, seed)
    # A missing model or a folder that cannot be created is an error now, not after minutes of work.
    storytellers = {n: model if isinstance(model, Storyteller) else load(model, device) for n, model in models.items()}
    if out is not None:
        with lock_folder(Path(out)):
            pass
    stories: list[Story] = []
    statistics: dict[str, dict[str, Statistic]] = {}
    loss_by_position, tokenizers = {}, set()
    for name, storyteller in storytellers.items():
        tokenizers.add(tokenizer_hash(storyteller.tokenizer))
        numbered = enumerate(ProgressBar(chosen, f"{name}: stories", mininterval=0.5, file=sys.stdout))
        stories += [complete(storyteller, name, number, beginning, settings) for number, beginning in numbered]
        losses = _validation_losses(dataset, texts, storyteller, name)
        text_bytes = np.array([len(text.encode()) for text in texts])
        statistics[name] = likelihood_statistics(losses.nats, losses.tokens, text_bytes, seed)
        loss_by_position[name] = losses.by_position.tolist()
    stories += real_stories(chosen)

    copies, nearest, frequencies = _search(dataset, [story.compared for story in stories])
    known_names = frozenset(GENDERS) if dataset.train.info.source == "synthetic" else None
    endings = [beginning.ending for beginning in chosen]
    for name in ProgressBar([*models, REAL], "text metrics", file=sys.stdout):
        which = [i for i, story in enumerate(stories) if story.model == name]
        its_stories, its_copies = [stories[i] for i in which], [copies[i] for i in which]
        found = story_statistics(its_stories, its_copies, frequencies, known_names, sacrebleu, seed)
        if name != REAL:
            found |= reference_statistics([story.compared for story in its_stories], endings, sacrebleu, seed)
        statistics[name] = statistics.get(name, {}) | found
    statistics[FLOOR] = reference_statistics(_other_endings(endings, seed), endings, sacrebleu, seed)
    report = StoryReport(
        settings=settings,
        data=dataset.train.info,
        models=[*models, REAL],
        estimates={
            metric: {name: found[metric].estimate() for name, found in statistics.items() if metric in found}
            for metric in METRICS
        },
        differences=differences(statistics, [m for m in METRICS if len(tokenizers) == 1 or m not in NATS_METRICS]),
        stories=stories,
        copies=copies,
        nearest=nearest,
        loss_by_position=loss_by_position,
        signatures=sacrebleu.signatures,
    )
    if out is not None:
        _write(report, Path(out))
    return report


def _validation_losses(dataset: Dataset, texts: Sequence[str], storyteller: Storyteller, name: str) -> StoryLosses:
    """The losses of the validation stories, in the tokens of the model."""
    tokenizer, ids = storyteller.tokenizer, dataset.validation.ids
    if tokenizer_hash(tokenizer) != dataset.validation.info.tokenizer_hash:
        ids = np.array([i for text in texts for i in (*tokenizer.encode_ordinary(text), tokenizer.eot_token)])
    with ProgressBar(total=len(ids) - 1, desc=f"{name}: validation tokens", mininterval=0.5, file=sys.stdout) as bar:
        return story_losses(storyteller, ids, bar.update)


def _search(dataset: Dataset, texts: Sequence[str]) -> tuple[list[Copies], list[str], Counter[str]]:
    """Reads the training set once: what of each text is in it, the nearest story of each, and the words' frequencies.

    All texts are compared in the tokens of the data, whatever the tokenizers of the models are.
    """
    tokenizer, ids = dataset.tokenizer, dataset.train.ids
    newline = tokenizer.encode_ordinary("\n")[0]
    search = CopySearch([tokenizer.encode_ordinary(text) for text in texts], tokenizer.eot_token)
    frequencies: Counter[str] = Counter()
    with ProgressBar(total=len(ids), desc="training tokens", mininterval=0.5, file=sys.stdout) as bar:
        for position, chunk in story_chunks(ids, tokenizer.eot_token):
            search.read(chunk, position)
            frequencies.update(words(tokenizer.decode(np.where(chunk == tokenizer.eot_token, newline, chunk).tolist())))
            bar.update(len(chunk))
    copies = search.results()
    return copies, [tokenizer.decode(ids[slice(*copy.nearest)].tolist()) for copy in copies], frequencies


def _other_endings(endings: Sequence[str], seed: int) -> list[str]:
    """For each ending a random other one, cut to its number of words."""
    order = np.random.default_rng(seed).permutation(len(endings))
    other = dict(zip(order, np.roll(order, 1), strict=True))
    return [first_words(endings[other[i]], len(ending.split())) for i, ending in enumerate(endings)]


def _write(report: StoryReport, out: Path) -> None:
    stories = [
        {**vars(story), **vars(copies), "nearest_story": nearest, "settings": report.settings}
        for story, copies, nearest in zip(report.stories, report.copies, report.nearest, strict=True)
    ]
    results = {name: value for name, value in vars(report).items() if name not in ("stories", "copies", "nearest")}
    results["metrics"] = METRICS
    contents = {
        STORIES: "".join(f"{to_json(story)}\n" for story in stories),
        DATA: to_json(results, indent=2) + "\n",
        PAGE: fill_template(PAGE, {**results, "stories": stories}),
    }
    for name, text in contents.items():
        with atomic_write(out / name) as file:
            file.write(text.encode("utf-8", "surrogatepass"))
