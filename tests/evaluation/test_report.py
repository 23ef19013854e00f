"""`judge` from models to files, and the report in a browser."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch
from helpers import TINY, random_stories, stories_in, write_stories

import storyllm
from storyllm import GPT, DataConfig, StoryLLMError, Storyteller, judge
from storyllm.evaluation.comparison import FLOOR, METRICS
from storyllm.evaluation.protocol import REAL
from storyllm.evaluation.reference import rouge_l

REFERENCE = {"bleu", "chrf", "rouge_2", "rouge_l"}
LIKELIHOOD = {"bits_per_byte", "loss", "perplexity"}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "stories.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_metric_has_a_value_for_the_models_it_is_defined_for(judged):
    report, _ = judged
    assert report.models == ["trained", "untrained", REAL]
    assert list(report.estimates) == list(METRICS)
    for name, estimates in report.estimates.items():
        of_models = [] if name in LIKELIHOOD | REFERENCE else [REAL]
        assert set(estimates) == {"trained", "untrained", *of_models, *([FLOOR] if name in REFERENCE else [])}
        for estimate in estimates.values():
            assert math.isnan(estimate.low) or estimate.low <= estimate.value <= estimate.high, name


def test_the_likelihood_is_that_of_evaluate(judged, tiny_data, tiny_run):
    report, _ = judged
    expected = storyllm.evaluate(storyllm.load(tiny_run / "best_model_params.pt", "cpu"), tiny_data / "validation.bin")
    assert report.estimates["loss"]["trained"].value == pytest.approx(expected.loss, rel=1e-5)
    assert report.estimates["perplexity"]["trained"].value == pytest.approx(expected.perplexity, rel=1e-5)
    assert report.estimates["bits_per_byte"]["trained"].value == pytest.approx(expected.bits_per_byte, rel=1e-5)
    losses = report.loss_by_position["trained"]
    assert len(losses) == TINY.model.block_size
    assert sum(losses) / len(losses) == pytest.approx(expected.loss, rel=0.01)  # all windows but the last are complete


def test_training_is_a_claimed_difference_and_the_real_stories_are_the_reference(judged):
    report, _ = judged
    found = {(d.metric, d.a, d.b): d.estimate for d in report.differences}
    assert found["bits_per_byte", "trained", "untrained"].high < 0
    assert ("rouge_2", "trained", FLOOR) in found and ("distinct_1", "trained", REAL) in found
    assert ("rouge_2", "trained", REAL) not in found
    assert report.estimates["unknown_words"][REAL].value < report.estimates["unknown_words"]["untrained"].value
    assert report.estimates["ended"][REAL].value == 1


def test_all_models_complete_the_same_beginnings_of_held_out_stories(judged, tiny_data):
    report, _ = judged
    held_out = stories_in(tiny_data / "validation.bin", storyllm.load_tokenizer(tiny_data))
    for number in range(4):
        group = [story for story in report.stories if story.number == number]
        assert [story.model for story in group] == report.models
        assert len({story.beginning for story in group}) == 1
        assert group[-1].beginning + group[-1].completion in held_out
        assert all(len(story.compared.split()) <= len(group[-1].completion.split()) for story in group)


def test_others_can_recompute_the_numbers_from_the_stories(judged, tiny_run):
    report, folder = judged
    lines = lines_of(folder)
    assert [line["id"] for line in lines] == [story.id for story in report.stories]
    trained, real = ([line for line in lines if line["model"] == model] for model in ("trained", REAL))
    scores = [rouge_l(a["compared"], b["compared"]) for a, b in zip(trained, real, strict=True)]
    assert report.estimates["rouge_l"]["trained"].value == pytest.approx(sum(scores) / len(scores))
    line = trained[2]
    sampling = {key: line["settings"][key] for key in ("temperature", "top_k", "top_p", "max_new_tokens")}
    storyteller = storyllm.load(tiny_run / "best_model_params.pt", "cpu")
    assert (
        storyteller.generate(line["beginning"], seed=line["seed"], **sampling) == line["beginning"] + line["completion"]
    )


def test_the_json_has_the_report_and_no_nan(judged):
    report, folder = judged

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    values = json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert values["settings"] == dataclasses.asdict(report.settings)
    assert values["models"] == report.models
    assert values["estimates"]["chrf"]["trained"] == pytest.approx(vars(report.estimates["chrf"]["trained"]))
    assert len(values["differences"]) == len(report.differences)
    assert values["metrics"]["rouge_2"]["percent"] is True
    assert "BLEU" in values["signatures"]


def test_the_nearest_story_is_a_training_story(judged, tiny_data):
    report, _ = judged
    training = stories_in(tiny_data / "train.bin", storyllm.load_tokenizer(tiny_data))
    for nearest, copies in zip(report.nearest, report.copies, strict=True):
        assert nearest in training if copies.rouge_2 else nearest == ""  # a story may share no bigram with any
    assert sum(copies.rouge_2 > 0 for copies in report.copies) > 6


def test_the_same_arguments_give_the_same_report(judged, tiny_data, tiny_run):
    report, _ = judged
    again = judge(
        {"trained": tiny_run / "best_model_params.pt"}, tiny_data, beginnings=4, max_new_tokens=60, device="cpu"
    )
    for name, estimates in again.estimates.items():
        assert vars(estimates["trained"]) == pytest.approx(vars(report.estimates[name]["trained"]), nan_ok=True), name


def test_a_model_with_another_tokenizer_is_compared_in_bits_per_byte(judged, tiny_data, tmp_path):
    write_stories(tmp_path / "stories.txt", random_stories(200))
    storyllm.prepare(DataConfig(source=str(tmp_path / "stories.txt"), tokenizer="bpe:280"), tmp_path / "data")
    tokenizer = storyllm.load_tokenizer(tmp_path / "data")
    torch.manual_seed(0)
    models = {
        size: Storyteller(GPT(dataclasses.replace(TINY.model, vocab_size=tokenizer.n_vocab)), tokenizer)
        for tokenizer, size in ((tokenizer, "small"), (storyllm.load_tokenizer(tiny_data), "large"))
    }
    report = judge(models, tiny_data, beginnings=2, max_new_tokens=5, device="cpu")
    assert {"loss", "perplexity"}.isdisjoint(difference.metric for difference in report.differences)
    assert "bits_per_byte" in {difference.metric for difference in report.differences}
    text = "".join(stories_in(tiny_data / "validation.bin", storyllm.load_tokenizer(tiny_data)))
    tokens = len(tokenizer.encode_ordinary(text))
    loss, bits_per_byte = (report.estimates[name]["small"].value for name in ("loss", "bits_per_byte"))
    assert bits_per_byte == pytest.approx(loss * tokens / math.log(2) / len(text.encode()), rel=0.02)


def test_the_table_has_a_row_for_each_metric(judged):
    report, _ = judged
    header, *rows = str(report).splitlines()
    assert header.split("  ") and all(name in header for name in (*report.models, FLOOR))
    assert [row.split("  ")[0] for row in rows] == [metric.label for metric in METRICS.values()]


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ({}, "at least one"),
        (["a.pt"], "must be {name: checkpoint}"),
        ({REAL: "a.pt"}, REAL),
        ({"a": "missing.pt"}, r"missing\.pt"),
    ],
)
def test_invalid_models_are_rejected(judged, models, words, tiny_data):
    with pytest.raises(StoryLLMError, match=words):
        judge(models, tiny_data, beginnings=2)


def test_a_report_is_only_replaced_on_request(judged, tiny_data, tiny_run, tmp_path):
    _, folder = judged
    shutil.copytree(folder, tmp_path / "report")
    models = {"again": tiny_run / "best_model_params.pt"}
    with pytest.raises(StoryLLMError, match=r"already has a report.*--overwrite"):
        judge(models, tiny_data, tmp_path / "report", beginnings=2)
    assert lines_of(tmp_path / "report") == lines_of(folder)
    judge(models, tiny_data, tmp_path / "report", beginnings=2, max_new_tokens=2, overwrite=True)
    assert {line["model"] for line in lines_of(tmp_path / "report")} == {"again", REAL}


# In a browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_shows_every_metric(judged, open_page, width, scheme):
    report, folder = judged
    page = open_page(folder / "report.html", width, color_scheme=scheme)
    page.locator("#differences summary").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cards = page.locator(".card h3").all_inner_texts()
    shown = [metric.label for name, metric in METRICS.items() if not name.startswith("copied_")]
    assert sorted(cards) == sorted([*shown, "loss by position", "copied k-grams"])
    card = page.locator(".card", has=page.locator("h3", has_text="ROUGE-L"))
    assert card.locator(".name").all_inner_texts() == ["trained", "untrained", FLOOR]
    assert card.locator(".number").first.inner_text() == METRICS["rouge_l"].shown(
        report.estimates["rouge_l"]["trained"].value
    )


def test_the_page_shows_stories_as_text(judged, open_page, tmp_path):
    """A story with HTML in it changes nothing."""
    _, folder = judged
    html = (folder / "report.html").read_text(encoding="utf-8")
    attack = "</script><img src=x onerror=alert(1)>"
    line = lines_of(folder)[0]
    assert json.dumps(line["completion"], ensure_ascii=False).replace("<", "\\u003c") in html
    changed = html.replace(
        json.dumps(line["completion"], ensure_ascii=False).replace("<", "\\u003c"),
        json.dumps(attack).replace("<", "\\u003c"),
    )
    (tmp_path / "report.html").write_text(changed, encoding="utf-8")
    page = open_page(tmp_path / "report.html")
    page.locator("#stories summary").first.click()
    assert page.locator("img").count() == 0
    assert page.locator("#stories article").count() == 3


def test_the_page_claims_what_the_report_claims(judged, open_page):
    report, folder = judged
    page = open_page(folder / "report.html")
    claims = sum(difference.estimate.excludes_zero for difference in report.differences)
    assert page.locator("#differences tr.claim").count() == claims > 0
