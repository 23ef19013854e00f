"""The metrics of a report: their values for the stories of one model, and the paired differences between models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np

from ..data.token_file import TokenFileInfo
from .consistency import new_names, pronoun_agreement
from .diversity import compression_ratio, distinct_n, repeated_ngrams
from .novelty import MAX_K, Copies
from .protocol import Settings, Story
from .reference import SacreBLEU, rouge_l, rouge_n
from .statistics import Estimate, Statistic, bootstrap, jackknife
from .vocabulary import common_words, readability_counts, readability_grade, whole_sentences, word_counts


@dataclass(frozen=True)
class Metric:
    """How the page shows a metric."""

    section: str
    label: str
    decimals: int
    note: str
    percent: bool = False  # the value is from 0 to 1

    def shown(self, value: float) -> str:
        """A value as text."""
        return f"{100 * value:,.{self.decimals}f}%" if self.percent else f"{value:,.{self.decimals}f}"


LIKELIHOOD, REFERENCE, DIVERSITY = "Likelihood", "Against the real ending", "Diversity"
NOVELTY, VOCABULARY, CONSISTENCY = "Novelty", "Vocabulary level", "Consistency"
METRICS = {
    "bits_per_byte": Metric(LIKELIHOOD, "bits per byte", 3, "of the validation file; compares all models"),
    "loss": Metric(LIKELIHOOD, "loss", 3, "nats per token; compares models with the same tokenizer"),
    "perplexity": Metric(LIKELIHOOD, "perplexity", 2, "exp(loss)"),
    "bleu": Metric(REFERENCE, "BLEU", 1, "1- to 4-grams of words in common, over all stories"),
    "chrf": Metric(REFERENCE, "chrF", 1, "1- to 6-grams of characters in common, mean over stories"),
    "rouge_2": Metric(REFERENCE, "ROUGE-2", 1, "bigrams of words in common (F1)", True),
    "rouge_l": Metric(REFERENCE, "ROUGE-L", 1, "longest common subsequence of words (F1)", True),
    "distinct_1": Metric(DIVERSITY, "distinct-1", 3, "different words over their expected number"),
    "distinct_2": Metric(DIVERSITY, "distinct-2", 3, "different bigrams over their expected number"),
    "distinct_3": Metric(DIVERSITY, "distinct-3", 3, "different trigrams over their expected number"),
    "self_bleu": Metric(DIVERSITY, "self-BLEU", 1, "of each story against the others; high if the stories are alike"),
    "compression_ratio": Metric(DIVERSITY, "compression ratio", 2, "of all stories by gzip; high if they repeat much"),
    "repetition": Metric(DIVERSITY, "repeated 4-grams", 1, "of words, within a story", True),
    "ended": Metric(DIVERSITY, "stories that end", 1, "with an end-of-text token, before max_new_tokens", True),
    "words": Metric(DIVERSITY, "words", 1, "of a completion, before it is cut"),
    **{f"copied_{k}": Metric(NOVELTY, f"copied {k}-grams", 1, "of tokens", True) for k in range(1, MAX_K + 1)},
    "longest_copy": Metric(NOVELTY, "longest copied span", 1, "tokens, mean over stories"),
    "nearest": Metric(NOVELTY, "nearest training story", 1, "share of the story's bigrams that it has", True),
    "common_words": Metric(VOCABULARY, "common words", 1, "among the 1,000 most frequent of the training set", True),
    "unknown_words": Metric(VOCABULARY, "unknown words", 2, "that are not in the training set", True),
    "sentence_words": Metric(VOCABULARY, "words per sentence", 1, "of whole sentences"),
    "readability": Metric(VOCABULARY, "readability grade", 1, "Automated Readability Index of whole sentences"),
    "names": Metric(CONSISTENCY, "only introduced names", 1, "stories without a name that nobody introduced", True),
    "pronouns": Metric(CONSISTENCY, "pronouns that agree", 1, "with a character whose gender is known", True),
}
FLOOR = "random ending"  # of another story: what the reference metrics give to an ending that is unrelated
NATS_METRICS = ("loss", "perplexity")  # differences between models with different tokenizers mean nothing


@dataclass(frozen=True)
class Difference:
    """A paired difference: the metric of `a` minus that of `b`."""

    metric: str
    a: str
    b: str
    estimate: Estimate


@dataclass(frozen=True)
class StoryReport:
    """The result of `judge`."""

    settings: Settings
    data: TokenFileInfo  # of the training split
    models: list[str]  # and, last, REAL
    estimates: dict[str, dict[str, Estimate]]  # metric -> model -> value with its interval; also for FLOOR
    differences: list[Difference]  # between each two of the models, REAL and FLOOR
    stories: list[Story]
    copies: list[Copies]  # of each story: what of it is in the training set
    nearest: list[str]  # the training story that is nearest to each story
    loss_by_position: dict[str, list[float]]  # model -> nats per token after 1, 2, ... tokens of context
    signatures: dict[str, str]  # of sacrebleu's metrics

    def __str__(self) -> str:
        """A table of the values, without intervals."""
        names = [*self.models, FLOOR]
        lines = [[""], *([metric.label] for metric in METRICS.values())]
        for name in names:
            lines[0].append(name)
            for line, (key, metric) in zip(lines[1:], METRICS.items(), strict=True):
                estimate = self.estimates[key].get(name)
                line.append("" if estimate is None else metric.shown(estimate.value))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
        )


def likelihood_statistics(
    nats: np.ndarray, tokens: np.ndarray, text_bytes: np.ndarray, seed: int
) -> dict[str, Statistic]:
    """Loss, perplexity and bits per byte, from the (stories,) totals of each story of the validation file."""
    loss = bootstrap(np.stack([nats, tokens], 1), seed=seed)
    return {
        "bits_per_byte": bootstrap(np.stack([nats / np.log(2), text_bytes], 1), seed=seed),
        "loss": loss,
        "perplexity": loss.map(lambda nats_per_token: np.exp(np.minimum(nats_per_token, 700))),
    }


def reference_statistics(
    completions: Sequence[str], endings: Sequence[str], sacrebleu: SacreBLEU, seed: int
) -> dict[str, Statistic]:
    """The metrics that compare completions with the real endings."""
    pairs = list(zip(completions, endings, strict=True))

    def mean(score: Callable[[str, str], float]) -> Statistic:
        return bootstrap(np.array([(score(*pair), 1) for pair in pairs]), seed=seed)

    return {
        "bleu": bootstrap(np.array([sacrebleu.bleu_counts(*pair) for pair in pairs]), sacrebleu.bleu, seed),
        "chrf": mean(sacrebleu.chrf),
        "rouge_2": mean(lambda completion, ending: rouge_n(completion, ending, 2)),
        "rouge_l": mean(rouge_l),
    }


def story_statistics(
    stories: Sequence[Story],
    copies: Sequence[Copies],
    frequencies: Counter[str],
    known_names: frozenset[str] | None,
    sacrebleu: SacreBLEU,
    seed: int,
) -> dict[str, Statistic]:
    """The metrics of one model's stories alone.

    `frequencies` are those of the training set's words; `known_names` all names that its stories use, or None.
    """
    texts, common = [story.compared for story in stories], common_words(frequencies)
    in_vocabulary = [word_counts(text, frequencies, common) for text in texts]
    readable = [readability_counts(whole_sentences(text)) for text in texts]
    pairs: dict[str, list[tuple[float, float]]] = {  # what each story adds to the two sums of a ratio
        # The bootstrap resamples the texts that are compared, not those that they are compared with.
        "self_bleu": [(score, 1) for score in sacrebleu.self_bleu(texts)],
        "repetition": [repeated_ngrams(text) for text in texts],
        "ended": [(story.ended, 1) for story in stories],
        "words": [(len(story.completion.split()), 1) for story in stories],
        "longest_copy": [(copy.longest, 1) for copy in copies],
        "nearest": [(copy.rouge_2, 1) for copy in copies],
        "common_words": [(among_common, total) for among_common, _, total in in_vocabulary],
        "unknown_words": [(unknown, total) for _, unknown, total in in_vocabulary],
        "sentence_words": [(total, sentences) for _, total, sentences in readable],
        "names": [(not new_names(story.beginning, story.compared, known_names), 1) for story in stories],
        "pronouns": [pronoun_agreement(story.beginning, story.compared) for story in stories],
    }
    pairs |= {f"copied_{k}": [(copy.found[k - 1], copy.total[k - 1]) for copy in copies] for k in range(1, MAX_K + 1)}
    statistics = {name: bootstrap(np.array(values, float), seed=seed) for name, values in pairs.items()}
    statistics["readability"] = bootstrap(np.array(readable), lambda sums: readability_grade(*sums), seed)
    statistics["compression_ratio"] = jackknife(texts, compression_ratio)
    for n in (1, 2, 3):
        statistics[f"distinct_{n}"] = jackknife(
            texts, partial(distinct_n, n=n, vocabulary_size=max(1, len(frequencies)))
        )
    return statistics


def differences(statistics: Mapping[str, Mapping[str, Statistic]], metrics: Sequence[str]) -> list[Difference]:
    """The paired differences in `metrics` between each two models of {model: {metric: statistic}}."""
    return [
        Difference(metric, a, b, statistics[a][metric].minus(statistics[b][metric]).estimate())
        for a, b in combinations(statistics, 2)
        for metric in metrics
        if metric in statistics[a] and metric in statistics[b]
    ]
