"""Rating sheets, filled in with a browser, and what the ratings say."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from storyllm import StoryLLMError, rating_report, write_rating_sheets
from storyllm.evaluation.protocol import REAL
from storyllm.evaluation.ratings import AGE_GROUPS, CRITERIA


@pytest.fixture
def report(tmp_path):
    """A folder with the stories of two models and the real ones for five beginnings."""
    lines = [
        {
            "id": f"{model}{number}",
            "model": model,
            "number": number,
            "beginning": f"Beginning {number}",
            "completion": f" by <b>{model[::-1]}</b> & co.",
        }
        for model in ("good", "bad", REAL)
        for number in range(5)
    ]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def stories_of(sheet):
    return json.loads(re.search(r'type="application/json">(.*?)</script>', sheet.read_text("utf-8"), re.DOTALL)[1])[
        "stories"
    ]


def ratings_file(report, rater, scores, name=None, age="C"):
    """A file as a page saves it: `scores` is {story id: score} for all criteria."""
    ratings = [{"story": story, "comment": "", "age": age, **dict.fromkeys(CRITERIA, s)} for story, s in scores.items()]
    path = report / f"{name or rater}.json"
    path.write_text(json.dumps({"rater": rater, "ratings": ratings}))
    return path


def scores_of(good, bad, real):
    """The same scores for all beginnings, and one more for each second one."""
    levels = {"good": good, "bad": bad, REAL: real}
    return {f"{model}{number}": level + number % 2 for model, level in levels.items() for number in range(5)}


def test_sheets_are_blind_and_in_another_order_for_each_rater(report):
    paths = write_rating_sheets(report, beginnings=3, raters=2, seed=1)
    assert [path.name for path in paths] == ["rater-1.html", "rater-2.html"]
    first, second = map(stories_of, paths)
    assert first != second
    assert sorted(first, key=str) == sorted(second, key=str)
    assert {story["id"] for story in first} == {f"{m}{n}" for m in ("good", "bad", REAL) for n in range(3)}
    assert all(set(story) == {"id", "beginning", "completion"} for story in first)
    assert write_rating_sheets(report, beginnings=3, raters=2, seed=1) == paths and stories_of(paths[0]) == first


@pytest.mark.parametrize(
    ("options", "words"), [({"beginnings": 6}, "rated is 6.*1 to 5"), ({"raters": 0}, "raters is 0")]
)
def test_impossible_sheets_are_rejected(report, options, words):
    with pytest.raises(StoryLLMError, match=words):
        write_rating_sheets(report, **{"beginnings": 2, **options})


def test_sheets_need_a_report(tmp_path):
    with pytest.raises(StoryLLMError, match=r"stories\.jsonl not found; run `storyllm judge` first"):
        write_rating_sheets(tmp_path)


def test_means_and_differences_by_hand(report):
    files = [ratings_file(report, "a", scores_of(7, 2, 8)), ratings_file(report, "b", scores_of(5, 2, 8), age="E")]
    result = rating_report(files, report)
    assert (result.raters, result.stories) == (2, 15)
    plot = result.means["plot"]
    assert {model: mean.value for model, mean in plot.items()} == pytest.approx({"good": 6.4, "bad": 2.4, REAL: 8.4})
    assert all(mean.low <= mean.value <= mean.high for mean in plot.values())
    assert result.to_real["plot"]["good"].value == pytest.approx(-2)
    # The parity of a beginning adds the same to all models, so only the raters' disagreement varies the difference.
    assert (result.to_real["plot"]["good"].low, result.to_real["plot"]["good"].high) == pytest.approx((-3, -1))
    assert result.to_real["plot"]["bad"].low == pytest.approx(-6)
    assert result.means["age group"]["good"].value == pytest.approx(3)  # C and E
    assert 0 < result.alpha["plot"] < 1
    text = str(result)
    assert "raters: 2, stories: 15" in text and "-2.00 to the real stories" in text


def test_raters_who_agree_have_alpha_1_and_a_single_rater_has_none(report):
    files = [ratings_file(report, rater, scores_of(7, 2, 8)) for rater in "ab"]
    assert rating_report(files, report).alpha["grammar"] == 1
    assert math.isnan(rating_report(files[:1], report).alpha["grammar"])
    assert "alpha -" in str(rating_report(files[:1], report))


@pytest.mark.parametrize("scores", [[{"good0": 4}, {"good0": 6}], [{"good0": 4, "good1": 6}]])
def test_both_raters_and_beginnings_are_resampled(report, scores):
    """Of two scores, 4 and 6, a quarter of the resamples has only one."""
    files = [ratings_file(report, f"rater-{i}", given) for i, given in enumerate(scores)]
    mean = rating_report(files, report).means["plot"]["good"]
    assert (mean.value, mean.low, mean.high) == (5, 4, 6)


def test_unrated_stories_are_left_out(report):
    result = rating_report([ratings_file(report, "a", {"good0": 4, f"{REAL}0": 6})], report)
    assert result.means["plot"]["good"].value == 4
    assert math.isnan(result.means["plot"]["bad"].value)


def changed(report, **values):
    """A file with a rating that has other values."""
    rating = {"story": "good0", "comment": "", "age": "C", **dict.fromkeys(CRITERIA, 5), **values}
    path = report / "changed.json"
    path.write_text(json.dumps({"rater": "a", "ratings": [{k: v for k, v in rating.items() if v is not None}]}))
    return path


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"story": "unknown"}, "'unknown', which is not in stories.jsonl"),
        ({"plot": 11}, "plot 11, must be an integer from 0 to 10"),
        ({"plot": -1}, "plot -1"),
        ({"grammar": 5.5}, r"grammar 5\.5"),
        ({"grammar": True}, "grammar True"),
        ({"plot": None}, "was not saved by a rating sheet"),
        ({"age": "G"}, "age group 'G', must be one of A, B, C, D, E, F"),
        ({"age": ["A"]}, "was not saved by a rating sheet"),
    ],
)
def test_invalid_ratings_are_rejected_in_one_line(report, values, words):
    with pytest.raises(StoryLLMError, match=words) as caught:
        rating_report([changed(report, **values)], report)
    assert "changed.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"rater": "a", "ratings": [3]}', b"\xff", b"[" * 100_000])
def test_files_that_no_sheet_saved_are_rejected(report, content):
    (report / "other.json").write_bytes(content)
    with pytest.raises(StoryLLMError, match=r"other\.json was not saved by a rating sheet"):
        rating_report([report / "other.json"], report)


def test_a_second_rating_of_a_story_by_one_rater_is_rejected(report):
    files = [ratings_file(report, "a", {"good0": 4}, name) for name in ("one", "two")]
    with pytest.raises(StoryLLMError, match=r"two\.json rates the story good0 again as 'a'"):
        rating_report(files, report)


def test_missing_and_empty_files_are_rejected(report):
    with pytest.raises(StoryLLMError, match=r"none\.json"):
        rating_report([report / "none.json"], report)
    with pytest.raises(StoryLLMError, match="no story is rated"):
        rating_report([ratings_file(report, "a", {})], report)


@pytest.mark.parametrize("content", ["", '{"id": 1}\n', "[]\n", "no json\n", '{"id": "a", "number": "0"}\n'])
def test_a_corrupted_report_is_rejected(report, content):
    (report / "stories.jsonl").write_text(content)
    with pytest.raises(StoryLLMError, match="was not written by `storyllm judge`"):
        rating_report([ratings_file(report, "a", {})], report)


# In a browser


def saved(page, path):
    with page.expect_download() as download:
        page.locator("#save").click()
    assert download.value.suggested_filename == "rater-1.json"
    download.value.save_as(path)
    return path


@pytest.mark.parametrize("width", [390, 1280])
def test_a_sheet_is_filled_in_with_the_mouse_and_read_back(report, open_page, tmp_path, width):
    (sheet, *_) = write_rating_sheets(report, beginnings=2)
    page, given = open_page(sheet, width), {}
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for number, story in enumerate(stories_of(sheet)):
        assert page.locator("#story").inner_text() == story["beginning"] + story["completion"]
        assert page.locator("#next").is_disabled()
        given[story["id"]] = number % 11
        for criterion in CRITERIA:
            page.locator(f"input[name={criterion}][value='{number % 11}'] + span").click()
        page.locator("input[name=age][value=D] + span").click()
        page.locator("#comment").fill(f"comment {number}")
        if number < 5:
            page.locator("#next").click()
    path = saved(page, tmp_path / "filled.json")
    assert [item["comment"] for item in json.loads(path.read_bytes())["ratings"]] == [f"comment {n}" for n in range(6)]
    result = rating_report([path], report)
    assert result.stories == 6
    assert any(re.fullmatch(r"(good|bad|real stories), beginning [12], rater-1: comment 4", c) for c in result.comments)
    for model in ("good", "bad", REAL):
        expected = np.mean([given[f"{model}{number}"] for number in range(2)])
        assert result.means["plot"][model].value == pytest.approx(expected)
        assert result.means["age group"][model].value == list(AGE_GROUPS).index("D")


def test_a_sheet_is_filled_in_with_the_keyboard(report, open_page, tmp_path):
    (sheet, *_) = write_rating_sheets(report, beginnings=1)
    page = open_page(sheet)
    page.locator("input[name=grammar]").first.focus()
    for score in ("10", "0", "7"):  # three stories
        for _ in CRITERIA:
            page.keyboard.type(score)
            page.keyboard.press("Enter")
        page.keyboard.type("b")
        page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "save"
    ratings = json.loads(saved(page, tmp_path / "filled.json").read_bytes())["ratings"]
    assert [[item[criterion] for criterion in CRITERIA] for item in ratings] == [[10] * 4, [0] * 4, [7] * 4]
    assert {item["age"] for item in ratings} == {"B"}


def test_answers_are_kept_when_the_page_is_closed(report, open_page, tmp_path):
    (sheet, *_) = write_rating_sheets(report, beginnings=1)
    page = open_page(sheet)
    for criterion in CRITERIA:
        page.locator(f"input[name={criterion}][value='4'] + span").click()
    page.locator("input[name=age][value=A] + span").click()
    page.locator("#next").click()
    page.wait_for_function("document.title === 'Story 2 of 3'")
    page.close()
    again = open_page(sheet, context=page.context)
    for _ in range(100):  # Chromium passes what a page has stored on to others with a delay
        if again.title() == "Story 2 of 3":
            break
        again.wait_for_timeout(100)
        again.reload()
    assert again.title() == "Story 2 of 3"
    assert again.locator("#save").inner_text() == "Save 1 of 3 ratings as a file"
    again.locator("#back").click()
    assert again.locator("input[name=plot]:checked").input_value() == "4"
