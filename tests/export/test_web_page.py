"""A model as one HTML file: the file, and its engine in Node against the package."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, model_in, random_stories, rounded_to_float16
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import storyllm
from storyllm import GPT, StoryLLMError, Storyteller, export_page, next_token_probs, playground
from storyllm.data.tokenizer import gpt2_tokenizer
from storyllm.data.windows import sequential_windows

PROMPTS = [story[: 5 + 3 * i] for i, story in enumerate(random_stories(20, seed=1))]

LOGITS = "return input.map((ids) => Array.from(new engine.Story(model, ids).read()))"
ENCODE = "return input.map((text) => tokenizer.encode(text))"
GREEDY = """
return input.map((prompt) => {
  const story = new engine.Story(model, tokenizer.encode(prompt)), decode = tokenizer.decoder();
  let text = prompt;
  for (let i = 0; i < 40; i++) {
    const { id } = story.next({ temperature: 0 }, () => 0);
    text += decode(id, i === 39 || id === tokenizer.eotToken);
    if (id === tokenizer.eotToken) break;
  }
  return text;
})
"""


# The engine


def test_float16_logits_are_those_of_python(in_node, pages, storyteller):
    rows = [storyteller.tokenizer.encode_ordinary(prompt)[-16:] for prompt in PROMPTS]
    logits = in_node(pages["float16"], LOGITS, rows)
    for ids, row in zip(rows, logits, strict=True):
        with torch.no_grad():
            expected = storyteller.model.next_logits(torch.tensor([ids]))[0]
            exact = rounded_to_float16(storyteller).model.next_logits(torch.tensor([ids]))[0]
        assert torch.tensor(row) == pytest.approx(expected, abs=2e-2)
        assert torch.tensor(row) == pytest.approx(exact, abs=1e-4)


def test_the_tanh_approximation_of_gelu_is_that_of_python(in_node, storyteller, tmp_path):
    config = dataclasses.replace(storyteller.model.config, activation="gelu_tanh")
    model = GPT(config)
    state = storyteller.model.state_dict()  # larger weights, so that the two activations differ
    model.load_state_dict({name: 5 * w if "c_fc" in name else w for name, w in state.items()})
    other = Storyteller(model.eval(), storyteller.tokenizer)
    page = export_page(other, tmp_path / "page.html", weights="float16")
    ids = other.tokenizer.encode_ordinary("Once upon a time")
    with torch.no_grad():
        expected = rounded_to_float16(other).model.next_logits(torch.tensor([ids]))[0]
    assert torch.tensor(in_node(page, LOGITS, [ids])[0]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_greedy_stories_are_those_of_python_also_beyond_the_context(in_node, pages, storyteller):
    expected = [
        rounded_to_float16(storyteller).generate(prompt, max_new_tokens=40, temperature=0) for prompt in PROMPTS
    ]
    assert in_node(pages["float16"], GREEDY, PROMPTS) == expected
    assert any(len(storyteller.tokenizer.encode_ordinary(story)) > 2 * TINY.model.block_size for story in expected)


def test_int8_weights_hardly_change_the_loss(in_node, pages, storyteller, tiny_data):
    ids = storyllm.open_token_file(tiny_data / "validation.bin").ids
    windows = list(sequential_windows(ids, TINY.model.block_size, 1))[:200]
    code = """
    let nats = 0, count = 0;
    for (const { x, y } of input) {
      const story = new engine.Story(model, x);
      story.read();
      y.forEach((id, t) => { nats += engine.surprisal(model.logits(story.states[t]), id); count++; });
    }
    return nats / count;
    """
    loss = in_node(pages["int8"], code, [{"x": x[0].tolist(), "y": y[0].tolist()} for x, y in windows])
    with torch.no_grad():
        logits = [storyteller.model(torch.from_numpy(x))[0][0] for x, _ in windows]
    expected = F.cross_entropy(torch.cat(logits), torch.from_numpy(np.concatenate([y[0] for _, y in windows]))).item()
    assert 0 < abs(loss - expected) < 0.01


def test_a_model_without_biases_and_with_an_odd_width(in_node, storyteller, tmp_path):
    config = dataclasses.replace(TINY.model, n_embd=21, n_head=3, bias=False, dropout=0.0)
    torch.manual_seed(0)
    odd = Storyteller(GPT(config).eval(), storyteller.tokenizer)
    for parameter in odd.model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    page = export_page(odd, tmp_path / "odd.html", weights="float16")
    ids = torch.arange(100, 112)
    with torch.no_grad():
        expected = rounded_to_float16(odd).model.next_logits(ids[None])[0]
    (logits,) = in_node(page, LOGITS, [ids.tolist()])
    assert torch.tensor(logits) == pytest.approx(expected, abs=1e-3)


ASSIGNED = st.characters(exclude_categories=["Cs", "Cn"])  # characters that were added later differ between programs
WORDS = st.sampled_from(
    ["'s", "don't", "I'LL", " the", "  ", "\n\n", " \t ", "\x85", "\ufeff", "\u2028", "3rd", "aaaa", "é"]
)
TEXTS = st.lists(st.text(ASSIGNED) | WORDS).map("".join)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_any_text_has_the_ids_of_a_trained_vocabulary(in_node, pages, storyteller, text):
    assert in_node(pages["int8"], ENCODE, [text]) == [storyteller.tokenizer.encode_ordinary(text)]


@pytest.fixture(scope="module")
def gpt2_page(tmp_path_factory):
    """A page with GPT-2's vocabulary."""
    model = GPT(storyllm.GPTConfig(vocab_size=50257, block_size=8, n_layer=1, n_head=1, n_embd=4)).eval()
    return export_page(Storyteller(model, gpt2_tokenizer()), tmp_path_factory.mktemp("gpt2") / "page.html")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_any_text_has_the_ids_of_gpt2(gpt2_cache, in_node, request, text):
    page = request.getfixturevalue("gpt2_page")
    assert in_node(page, ENCODE, [text]) == [gpt2_tokenizer().encode_ordinary(text)]


def test_long_words_have_the_same_ids(in_node, pages, storyteller):
    texts = [
        "".join(random_stories(40, seed=2)).replace(" ", "").replace(".", ""),
        "ab" * 20_000,
        " " * 5_000 + "x",
        "-" * 999,
    ]
    expected = [storyteller.tokenizer.encode_ordinary(text) for text in texts]
    assert in_node(pages["int8"], ENCODE, texts) == expected


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    logits=st.lists(st.integers(-8, 8).map(lambda n: n / 2), min_size=1, max_size=40),  # with ties
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.none() | st.integers(1, 50),
    top_p=st.none() | st.sampled_from([1e-9, 0.137, 0.523, 0.911, 1.0]),
)
def test_probabilities_are_those_of_next_token_probs(in_node, pages, logits, temperature, top_k, top_p):
    code = "return Array.from(engine.nextTokenProbs(Float64Array.from(input.logits), input))"
    options = {"logits": logits, "temperature": temperature, "topK": top_k, "topP": top_p}
    expected = next_token_probs(torch.tensor(logits), temperature, top_k, top_p)
    # Of tied tokens any may be kept, so only their probabilities are compared.
    assert sorted(in_node(pages["int8"], code, options)) == pytest.approx(sorted(expected.tolist()), abs=1e-5)


def test_greedy_sampling_selects_one_token(in_node, pages):
    code = "return Array.from(engine.nextTokenProbs(Float64Array.of(1, 3, 3, 2), {temperature: 0}))"
    assert in_node(pages["int8"], code) == [0, 1, 0, 0]


def test_samples_follow_the_distribution_and_depend_on_the_seed(in_node, pages):
    code = """
    const random = engine.randomNumbers(input), counts = [0, 0, 0, 0];
    for (let i = 0; i < 20000; i++) counts[engine.sample([0.5, 0, 0.2, 0.3], random())]++;
    return counts;
    """
    counts = {seed: in_node(pages["int8"], code, seed) for seed in (0, 1, 2**32 - 1)}
    assert in_node(pages["int8"], code, 1) == counts[1]
    assert len({tuple(row) for row in counts.values()}) == 3
    for row in counts.values():
        assert row[1] == 0
        assert np.array(row) / 20_000 == pytest.approx([0.5, 0, 0.2, 0.3], abs=0.015)  # 4 standard deviations


@pytest.mark.parametrize(
    "options", ["{temperature: -1}", "{temperature: NaN}", "{topK: 0}", "{topK: 1.5}", "{topP: 0}", "{topP: 1.1}"]
)
def test_invalid_sampling_parameters_are_rejected(in_node, pages, options):
    code = f"""
    try {{ engine.nextTokenProbs(Float64Array.of(1, 2), {options}); }} catch (error) {{ return error.message; }}
    """
    assert ", must be" in in_node(pages["int8"], code)


# The file


def test_the_page_is_one_file_that_forbids_all_requests(pages):
    page = pages["int8"].read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    without_namespace = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|\bsrc=|\bhref=|@import|url\(", without_namespace)


def test_the_file_of_a_page_is_deterministic_and_smaller_with_int8(pages, tiny_run, tmp_path):
    again = export_page(str(tiny_run / "best_model_params.pt"), str(tmp_path / "new" / "again.html"))
    assert again.read_bytes() == pages["int8"].read_bytes()
    assert len(model_in(pages["int8"])) < len(model_in(pages["float16"]))


def test_the_page_of_a_checkpoint_has_its_recipe_and_losses(in_node, pages, tiny_run):
    info = in_node(pages["int8"], "return info")
    assert info["recipe"]["train"]["max_iters"] == TINY.train.max_iters
    evaluations = storyllm.read_log(tiny_run / "log.jsonl").evaluations
    assert [e["val_loss"] for e in info["evaluations"]] == [e["val_loss"] for e in evaluations]
    assert info["parameters"] == storyllm.load(tiny_run / "best_model_params.pt", "cpu").model.num_parameters()


def test_the_page_of_a_storyteller_has_only_the_shape_of_the_model(in_node, storyteller, tmp_path):
    info = in_node(export_page(storyteller, tmp_path / "page.html"), "return info")
    assert info["recipe"]["model"]["n_layer"] == TINY.model.n_layer
    assert info["recipe"]["data"] == info["recipe"]["train"] == {}
    assert info["evaluations"] == []


def test_an_existing_file_is_kept_unless_overwrite(storyteller, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("mine")
    with pytest.raises(StoryLLMError, match=r"page\.html exists; use another path"):
        export_page(storyteller, path)
    assert path.read_text() == "mine"
    export_page(storyteller, path, overwrite=True)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("value", "weights", "message"),
    [
        (float("nan"), "int8", "contains NaN or infinity"),
        (float("inf"), "float16", "contains NaN or infinity"),
        (1e6, "float16", "float16 ends at 65504; use weights 'int8'"),
        (1.0, "int4", "weights is 'int4', must be 'int8' or 'float16'"),
    ],
)
def test_weights_that_cannot_be_stored_are_rejected(value, weights, message, tiny_run, tmp_path):
    storyteller = storyllm.load(tiny_run / "best_model_params.pt", "cpu")
    storyteller.model.transformer["wte"].weight.data[3, 3] = value
    with pytest.raises(StoryLLMError, match=message):
        export_page(storyteller, tmp_path / "page.html", weights=weights)
    assert not list(tmp_path.iterdir())


def test_converted_weights_and_other_objects_are_rejected(tiny_run, tmp_path):
    with pytest.raises(StoryLLMError, match=r"is torch\.int8, must be float32; load the model with weights='float32'"):
        export_page(storyllm.load(tiny_run / "best_model_params.pt", "cpu", "int8"), tmp_path / "page.html")
    with pytest.raises(StoryLLMError, match="got dict, expected a Storyteller or the path of a checkpoint"):
        export_page({}, tmp_path / "page.html")
    with pytest.raises(StoryLLMError, match="not found"):
        export_page(tmp_path / "missing.pt", tmp_path / "page.html")


def test_a_playground_shows_the_page_in_a_notebook(storyteller):
    output = playground(storyteller, height=500).data
    assert 'sandbox="allow-scripts allow-forms"' in output and "height: 500px" in output
    assert output.count("<iframe") == 1 and "<script" not in output
    with pytest.raises(StoryLLMError, match="height is 0, must be a positive integer"):
        playground(storyteller, height=0)


def test_a_missing_ipython_is_reported_in_one_line(tiny_run):
    code = f"""
import sys
sys.modules["IPython"] = sys.modules["IPython.display"] = None
import storyllm
try:
    storyllm.playground({json.dumps(str(tiny_run / "best_model_params.pt"))})
except storyllm.StoryLLMError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == 'playground needs the package IPython; run: pip install "storyllm[notebook]"\n', done.stderr
