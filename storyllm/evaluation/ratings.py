"""Ratings by people: a page with stories for each rater, and what their ratings say about the models.

The rubric is that of the TinyStories paper (Eldan and Li 2023). Raters do not see which model wrote a story, or that a
story is a real one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import StoryLLMError, shown
from ..files import atomic_write, os_error
from .pages import fill_template
from .protocol import REAL
from .report import STORIES
from .statistics import RESAMPLES, Estimate, Statistic, krippendorff_alpha

CRITERIA = ("grammar", "creativity", "consistency", "plot")  # from 0 to 10
AGE_GROUPS = {"A": "3 or under", "B": "4-5", "C": "6-7", "D": "8-9", "E": "10-12", "F": "13-16"}


@dataclass(frozen=True)
class Rating:
    """What one rater gave one story."""

    rater: str
    story: str  # its id
    scores: dict[str, float]  # a score from 0 to 10 for each of CRITERIA; "age group" from 0 (A) to 5 (F)
    comment: str


@dataclass(frozen=True)
class RatingReport:
    """The result of `rating_report`. A criterion is one of CRITERIA, or "age group"."""

    raters: int
    stories: int
    means: dict[str, dict[str, Estimate]]  # criterion -> model -> mean with its interval
    to_real: dict[str, dict[str, Estimate]]  # criterion -> model -> difference to the real stories
    alpha: dict[str, float]  # criterion -> Krippendorff's alpha; NaN with a single rater
    comments: list[str]  # with model, beginning and rater

    def __str__(self) -> str:
        lines = [
            f"raters: {self.raters}, stories: {self.stories}; means with 95% intervals, an age group is 0 (A) to 5 (F)"
        ]
        for criterion, means in self.means.items():
            alpha = self.alpha[criterion]
            lines.append(f"{criterion} (Krippendorff's alpha {'-' if np.isnan(alpha) else f'{alpha:.2f}'})")
            for model, mean in means.items():
                line = f"  {model:24} {mean.value:5.2f} ({mean.low:.2f} to {mean.high:.2f})"
                if model != REAL:
                    gap = self.to_real[criterion][model]
                    claim = "" if gap.excludes_zero else ", not a clear difference"
                    line += f"  {gap.value:+.2f} to the real stories ({gap.low:+.2f} to {gap.high:+.2f}{claim})"
                lines.append(line)
        return "\n".join([*lines, *self.comments])


def write_rating_sheets(report: str | Path, beginnings: int = 10, raters: int = 3, seed: int = 0) -> list[Path]:
    """Writes a page for each rater, rater-1.html and so on, to the folder of a report. Returns their paths.

    All raters get the same stories, each in another random order: those of the first `beginnings` beginnings, by every
    model and the real ones. Raises StoryLLMError if the folder has no stories, or too few.
    """
    stories = _read_stories(Path(report))
    available = 1 + max(story["number"] for story in stories)
    if not 1 <= beginnings <= available:
        raise StoryLLMError(f"rated is {beginnings}, must be from 1 to {available}, the beginnings of {report}")
    if raters < 1:
        raise StoryLLMError(f"raters is {raters}, must be at least 1")
    chosen = [story for story in stories if story["number"] < beginnings]
    blind = [{key: story[key] for key in ("id", "beginning", "completion")} for story in chosen]
    paths = []
    for rater in range(1, raters + 1):
        order = random.Random(f"{seed}/{rater}").sample(blind, len(blind))
        paths.append(Path(report) / f"rater-{rater}.html")
        page = {"rater": f"rater-{rater}", "criteria": CRITERIA, "ages": AGE_GROUPS, "stories": order}
        with atomic_write(paths[-1]) as file:
            file.write(fill_template("sheet.html", page).encode("utf-8", "surrogatepass"))
    return paths


def read_ratings(paths: Sequence[str | Path], stories: set[str]) -> list[Rating]:
    """The ratings in the files that the pages saved.

    Raises StoryLLMError, naming the file, if one cannot be read or was not saved by a page, if a story is not in
    `stories`, a set of ids, if a value is out of range, or if a rater rated a story twice.
    """
    ratings: dict[tuple[str, str], Rating] = {}
    for path in paths:
        for rating in _ratings_in(Path(path)):
            if rating.story not in stories:
                raise StoryLLMError(f"{path} rates the story {shown(rating.story)}, which is not in {STORIES}")
            if (rating.rater, rating.story) in ratings:
                raise StoryLLMError(
                    f"{path} rates the story {rating.story} again as {shown(rating.rater)}; pass each file once"
                )
            ratings[rating.rater, rating.story] = rating
    return list(ratings.values())


def rating_report(paths: Sequence[str | Path], report: str | Path, seed: int = 0) -> RatingReport:
    """What the ratings in these files say about the models of a report, given as its folder.

    Intervals are bootstraps over raters and beginnings: each resample draws both with replacement. Raises StoryLLMError
    as `read_ratings`, and if no story is rated.
    """
    stories = {story["id"]: story for story in _read_stories(Path(report))}
    ratings = read_ratings(paths, set(stories))
    if not ratings:
        raise StoryLLMError(f"no story is rated in {', '.join(map(str, paths))}; rate at least one")
    raters = sorted({rating.rater for rating in ratings})
    numbers = sorted({stories[rating.story]["number"] for rating in ratings})
    models = list(dict.fromkeys(story["model"] for story in stories.values()))
    means, to_real, alpha = {}, {}, {}
    for criterion in (*CRITERIA, "age group"):
        scores = np.full((len(raters), len(numbers), len(models)), np.nan)
        for rating in ratings:
            story = stories[rating.story]
            place = raters.index(rating.rater), numbers.index(story["number"]), models.index(story["model"])
            scores[place] = rating.scores[criterion]
        found = dict(zip(models, _means(scores, seed), strict=True))
        means[criterion] = {model: mean.estimate() for model, mean in found.items()}
        to_real[criterion] = {m: mean.minus(found[REAL]).estimate() for m, mean in found.items() if m != REAL}
        alpha[criterion] = krippendorff_alpha(scores.reshape(len(raters), -1))
    comments = [
        f"{stories[r.story]['model']}, beginning {stories[r.story]['number'] + 1}, {r.rater}: {r.comment}"
        for r in ratings
        if r.comment
    ]
    return RatingReport(len(raters), len({rating.story for rating in ratings}), means, to_real, alpha, comments)


def _means(scores: np.ndarray, seed: int) -> list[Statistic]:
    """The mean score of each model, from (raters, beginnings, models) with NaN where there is none."""
    rng, (raters, beginnings, _) = np.random.default_rng(seed), scores.shape
    draws = [(rng.integers(raters, size=raters), rng.integers(beginnings, size=beginnings)) for _ in range(RESAMPLES)]
    replicates = np.stack([_mean(scores[np.ix_(*draw)]) for draw in draws])
    return [Statistic(float(value), column) for value, column in zip(_mean(scores), replicates.T, strict=True)]


def _mean(scores: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.nansum(scores, (0, 1)) / np.isfinite(scores).sum((0, 1))  # NaN, without a warning, if none is rated


def _read_stories(report: Path) -> list[dict[str, Any]]:
    path = report / STORIES
    if not path.is_file():
        raise StoryLLMError(f"{path} not found; run `storyllm judge` first, or pass its folder as --out")
    try:
        stories = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not stories or not all(type(story["number"]) is int for story in stories):
            raise ValueError("no stories, or one without a number")
        return [{key: story[key] for key in ("id", "model", "number", "beginning", "completion")} for story in stories]
    except OSError as error:
        raise os_error("read", path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoryLLMError(f"{path} was not written by `storyllm judge`; run it again") from error


def _ratings_in(path: Path) -> list[Rating]:
    try:
        contents = json.loads(path.read_bytes())
        return [
            Rating(str(contents["rater"]), str(item["story"]), _scores(item, path), str(item.get("comment", "")))
            for item in contents["ratings"]
        ]
    except OSError as error:
        raise os_error("read", path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoryLLMError(f"{path} was not saved by a rating sheet; pass the .json files of the raters") from error


def _scores(item: dict[str, Any], path: Path) -> dict[str, float]:
    scores = {}
    for criterion in CRITERIA:
        score = item[criterion]
        if type(score) is not int or not 0 <= score <= 10:
            raise StoryLLMError(f"{path} has {criterion} {shown(score)}, must be an integer from 0 to 10")
        scores[criterion] = float(score)
    if item["age"] not in AGE_GROUPS:
        raise StoryLLMError(f"{path} has the age group {shown(item['age'])}, must be one of {', '.join(AGE_GROUPS)}")
    return {**scores, "age group": float(list(AGE_GROUPS).index(item["age"]))}
