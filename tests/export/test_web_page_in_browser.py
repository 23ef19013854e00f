"""An exported page in headless Chromium."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from helpers import TINY, rounded_to_float16

from storyllm import GPT, DataConfig, Recipe, Storyteller, export_page, playground
from storyllm.checkpoint import model_contents, save_checkpoint
from storyllm.data.tokenizer import tokenizer_of

SECONDS = 60  # a machine may be busy
HOSTILE = (
    "</script><script>window.attacked = true</script><img src=x onerror='window.attacked = true'>\u202e\u2066\x07\x00"
)


@pytest.fixture(scope="module")
def endless(storyteller):
    """The model of `pages`, except that it never ends a story: the length of a story does not depend on luck."""
    model = GPT(storyteller.model.config).eval()
    model.load_state_dict(storyteller.model.state_dict())
    embedding, norm = model.transformer["wte"].weight.data, model.transformer["ln_f"]
    norm.weight.data[0], norm.bias.data[0] = 0, 10
    embedding[:, 0] = 0
    embedding[storyteller.tokenizer.eot_token, 0] = -10  # its logit is lower by 100
    return Storyteller(model, storyteller.tokenizer)


@pytest.fixture(scope="module")
def endless_page(endless, tmp_path_factory):
    return export_page(endless, tmp_path_factory.mktemp("endless") / "page.html")


@pytest.fixture
def open_page(browser, endless_page):
    """A function that opens a page from a file:// address. At the end, it has made no request and logged no error."""
    contexts, problems = [], []

    def note(request):
        if not request.url.startswith(("file:", "blob:")):
            problems.append(request.url)

    def open_page(path=endless_page, **options):
        context = browser.new_context(**options)
        context.set_default_timeout(1_000 * SECONDS)
        contexts.append(context)
        page = context.new_page()
        page.on("request", note)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector("#generate:enabled")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def generate(page, length=30, **values):
    """Generates a story of `length` new tokens and returns its text."""
    for name, value in {"length": length, **values}.items():
        page.fill(f"#{name}", str(value))
    page.click("#generate")
    finished(page)
    return story(page)


def finished(page):
    """Waits for the end of a story, when the page has also drawn its attention and selected its last token."""
    page.wait_for_selector("#status:has-text('new tokens')")


def story(page):
    return page.text_content("#story")


def selected(page):
    return page.text_content(".token[aria-selected='true']")


def captions(page, text):
    """Waits until the caption of the candidates contains a text; returns the percentages of the candidates."""
    page.wait_for_selector(f"#candidates-caption:has-text('{text}')")
    return page.locator("#candidates .value").all_text_contents()


def test_the_same_seed_gives_the_same_story(open_page):
    page = open_page()
    first = generate(page, prompt="One day", seed=7)
    assert first.startswith("One day")
    assert page.locator(".token").count() > 30
    assert generate(page, seed=8) != first
    assert generate(page, seed=7) == first
    page.click("#new-seed")
    assert page.input_value("#seed") != "7"


# Presses Escape in the page itself: a click from outside may arrive after thousands of tokens.
STOP_AFTER_20_TOKENS = """() => new Promise((resolve) => {
  const observer = new MutationObserver(() => {
    if (document.querySelectorAll(".token").length < 20) return;
    observer.disconnect();
    resolve(document.querySelector("#generate").textContent);
    document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
  });
  observer.observe(document.querySelector("#story"), { childList: true });
  document.querySelector("#generate").click();
})"""


def test_a_story_can_be_stopped_and_continued(open_page):
    page = open_page()
    page.evaluate("document.getElementById('length').max = 10 ** 9")  # a story that does not end by itself
    page.fill("#length", "1000000000")
    assert page.evaluate(STOP_AFTER_20_TOKENS) == "Stop"
    page.wait_for_selector("#status:has-text('Stopped after')")
    assert page.text_content("#generate") == "Generate"
    stopped = story(page)
    page.fill("#length", "5")
    page.click("#continue")
    page.wait_for_selector("#status:has-text('after 5 new')")
    assert story(page).startswith(stopped) and len(story(page)) > len(stopped)


def test_a_continued_story_is_the_longer_story(open_page):
    page = open_page()
    whole = generate(page, length=24, prompt="One day Mia", seed=3)
    assert generate(page, length=12) != whole
    page.click("#continue")
    finished(page)
    assert story(page) == whole


def test_examples_fill_in_the_prompt(open_page):
    page = open_page()
    page.click(".example >> nth=1")
    assert page.input_value("#prompt") == page.text_content(".example >> nth=1")
    page.click(".example[data-prompt]")
    assert page.input_value("#prompt") == ""
    assert generate(page).startswith("start")  # the end-of-text token


def test_candidates_follow_the_selected_token_and_the_settings(open_page):
    page = open_page()
    generate(page, prompt="One day Mia", temperature="1", **{"top-p": "1"})
    tokens = page.locator(".token")
    tokens.nth(12).hover()
    assert selected(page) == tokens.nth(12).text_content()
    assert 10 <= len(captions(page, "surprisal")) <= 11
    page.mouse.move(0, 0)
    tokens.nth(14).focus()
    assert selected(page) == tokens.nth(14).text_content()
    values = page.locator("#candidates .value")
    page.fill("#temperature", "0")
    page.wait_for_selector("#candidates li:nth-child(1) .value:text-is('100.0%')")
    assert set(values.all_text_contents()[1:]) == {"0%"}
    page.fill("#temperature", "1")
    page.wait_for_selector("#candidates li:nth-child(4) .value:not(:text-is('0%'))")
    page.fill("#top-k", "3")
    page.wait_for_selector("#candidates li:nth-child(4) .value:text-is('0%')")
    assert [value != "0%" for value in values.all_text_contents()[:10]] == [True] * 3 + [False] * 7
    assert page.text_content("#top-k-value") == "3"


def test_the_page_works_with_the_keyboard_alone(open_page):
    page = open_page()
    page.fill("#length", "3")
    page.focus("#prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type("One day Tom")
    page.keyboard.press("Control+Enter")
    finished(page)
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.className || document.activeElement.name"
            )
        )
        if "token" in reached[-1]:
            break
    expected = "example temperature top-k top-p length seed new-seed generate continue shading boundaries".split()
    assert {name for name in reached if "token" not in name} == {*expected}
    assert "token" in reached[-1]
    page.keyboard.press("Home")
    captions(page, "Nothing predicts the first token")
    page.keyboard.press("ArrowRight")
    assert selected(page) == page.text_content(".token >> nth=1")
    captions(page, "surprisal")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    assert selected(page) == page.text_content(".token >> nth=-1")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "layer"


def test_attention_is_drawn_and_shades_the_tokens(open_page):
    page = open_page()
    generate(page, length=8, prompt="One day")
    size = page.locator(".token").count()
    assert page.evaluate("document.getElementById('heat-map').width") == size
    page.check("input[value='attention']")
    page.locator(".token").nth(5).hover()
    page.wait_for_selector("#attention-caption:has-text('attends mostly to')")
    strengths = page.evaluate(
        "[...document.querySelectorAll('.token')].map((t) => parseFloat(t.style.getPropertyValue('--strength')))"
    )
    assert max(strengths) == 100 and not any(strengths[6:])
    drawn = "document.getElementById('heat-map').toDataURL()"
    before = page.evaluate(drawn)
    page.select_option("#layer", label="1")
    page.select_option("#head", label="1")
    page.wait_for_selector("#heat-map[aria-label^='Attention of layer 1, head 1']")
    assert page.evaluate(drawn) != before
    page.check("#boundaries")
    assert "inset" in page.evaluate("getComputedStyle(document.querySelector('.token')).boxShadow")


CONTRAST = """() => {
  const parse = (text) => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((c, i) => (c * a + below[i] * (255 - a)) / 255);
  const background = (node) =>
    node ? over(parse(getComputedStyle(node).backgroundColor), background(node.parentElement)) : [255, 255, 255];
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const low = [];
  for (const node of document.querySelectorAll("body *:not(script)")) {
    const hasText = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!hasText || !node.checkVisibility() || node.closest(":disabled")) continue;
    const style = getComputedStyle(node), text = node.closest("svg") ? style.fill : style.color;
    const [a, b] = [luminance(parse(text).slice(0, 3)), luminance(background(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${node.tagName} ${node.className} ${node.textContent.slice(0, 20)} ${ratio.toFixed(2)}`);
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_text_has_enough_contrast_and_fits_the_width(open_page, pages, width, scheme):
    page = open_page(pages["int8"], viewport={"width": width, "height": 800}, color_scheme=scheme)
    generate(page, length=20, temperature=2, **{"top-p": "1"})
    page.click("summary")
    page.evaluate("document.querySelector('.token').style.setProperty('--strength', '100%')")
    for shading in ("surprisal", "attention"):
        page.check(f"input[value='{shading}']")
        page.evaluate("document.querySelectorAll('.token').forEach((t) => t.style.setProperty('--strength', '100%'))")
        assert page.evaluate(CONTRAST) == []
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_the_console_has_the_functions_of_the_model(open_page, pages, storyteller):
    page = open_page(pages["float16"])
    text = "One day Zoë went to the garden.\n"
    ids = page.evaluate("(text) => storyllm.encode(text)", text)
    assert ids == storyteller.tokenizer.encode_ordinary(text)
    logits = page.evaluate("async (ids) => Array.from(await storyllm.logits(ids))", ids[:12])
    with torch.no_grad():
        expected = storyteller.model.next_logits(torch.tensor([ids[:12]]))[0]
    assert torch.tensor(logits) == pytest.approx(expected, abs=2e-2)
    run = "(options) => storyllm.generate('One day', options)"
    greedy = page.evaluate(run, {"maxNewTokens": 12, "temperature": 0})
    assert greedy == rounded_to_float16(storyteller).generate("One day", max_new_tokens=12, temperature=0)
    options = {"maxNewTokens": 12, "temperature": 0.9, "topK": 40, "topP": 0.95, "seed": 5}
    assert page.evaluate(run, options) == page.evaluate(run, options) != greedy
    error = page.evaluate("storyllm.generate('One day', {temperature: -1}).catch((error) => error.message)")
    assert error == "temperature is -1, must be 0 (greedy) or greater"


def test_a_prompt_of_a_megabyte_does_not_freeze_the_page(open_page):
    page = open_page()
    page.fill("#length", "3")
    page.evaluate("document.getElementById('prompt').value = 'one day '.repeat(131072)")
    page.click("#generate")
    page.click("#boundaries")  # while the worker is busy
    finished(page)
    assert page.locator(".token").count() == TINY.model.block_size + 3
    assert "the last 16 tokens" in page.text_content("#prompt-note")


def test_hostile_text_in_prompt_vocabulary_and_recipe_is_only_text(open_page, storyteller, tmp_path):
    tokens = [storyteller.tokenizer.decode_single_token_bytes(i) for i in range(storyteller.tokenizer.eot_token)]
    tokens[280] = HOSTILE.encode()
    tokenizer = tokenizer_of("<b>name</b>", tokens)
    model = GPT(dataclasses.replace(TINY.model, block_size=256)).eval()
    model.transformer["wte"].weight.data[280] *= 50  # make it likely
    recipe = Recipe(model.config, DataConfig(source=HOSTILE, text_column=HOSTILE), TINY.train)
    save_checkpoint(tmp_path / "hostile.pt", model_contents(model, tokenizer, recipe))
    page = open_page(export_page(tmp_path / "hostile.pt", tmp_path / "hostile.html"))
    text = generate(page, prompt=HOSTILE + "One day", temperature="1")
    page.click("summary")
    assert text.startswith("</script><script>") and "\\u202e" in text and "\u202e" not in text
    shown = page.inner_text("body")
    assert not re.search("[\u202e\u2066\x00\x07]", shown)
    assert "onerror" in page.inner_text("#recipe")
    assert page.evaluate("window.attacked") is None
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2  # the engine and the page's own


def test_the_policy_blocks_requests_and_other_scripts(browser, pages):
    page = browser.new_page()
    page.set_default_timeout(1_000 * SECONDS)
    page.goto(pages["int8"].as_uri())
    blocked = """async () => {
      const script = document.createElement("script");
      script.textContent = "window.attacked = true";
      document.body.append(script);
      const fetched = await fetch("https://example.org/").then(() => true, () => false);
      return [fetched, window.attacked ?? false];
    }"""
    assert page.evaluate(blocked) == [False, False]
    page.close()


def test_a_playground_runs_in_a_notebook_output(browser, endless, tmp_path):
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><body>{playground(endless).data}</body>", encoding="utf-8")
    page = browser.new_page()
    page.set_default_timeout(1_000 * SECONDS)
    page.goto(path.as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("#length").fill("20")
    frame.locator("#generate:enabled").click()
    frame.locator("#status:has-text('after 20 new tokens')").wait_for()
    assert frame.locator(".token").count() > 20
    page.close()
