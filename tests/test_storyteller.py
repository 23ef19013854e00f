"""The storyteller: text in, text out."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import tiktoken
import torch
from helpers import TINY

from storyllm import GPT, StoryLLMError, Storyteller, load, load_tokenizer, wrap

CONTEXT = TINY.model.block_size
LONG_PROMPT = "One day Ben went to the meadow and found a kite and a drum and a snail."


class ScriptedGPT(GPT):
    """Predicts the ids of `script`, one after the other, whatever the input."""

    script: list[int]

    def next_logits(self, idx, cache=None):
        logits = torch.full((len(idx), self.config.vocab_size), -50.0)
        logits[:, self.script.pop(0)] = 50.0
        return logits


@pytest.fixture
def tokenizer(tiny_data) -> tiktoken.Encoding:
    return load_tokenizer(tiny_data)


@pytest.fixture
def storyteller(tokenizer) -> Storyteller:
    torch.manual_seed(0)
    model = GPT(TINY.model)
    for parameter in model.transformer["h"].parameters():  # with its initial weights a model repeats the last token
        parameter.data.mul_(8)
    return Storyteller(model, tokenizer)


@pytest.fixture
def scripted(tokenizer):
    """Creates a storyteller that generates these tokens, given as ids or bytes."""

    def create(*tokens: int | bytes) -> Storyteller:
        model = ScriptedGPT(TINY.model)
        model.script = [t if isinstance(t, int) else tokenizer.encode_single_token(t) for t in tokens]
        return Storyteller(model, tokenizer)

    return create


def test_a_story_begins_with_its_prompt(storyteller):
    story = storyteller.generate("One day", max_new_tokens=20, seed=0)
    assert story.startswith("One day") and len(story) > len("One day")


def test_a_seed_repeats_a_story(storyteller):
    first, again, other = (storyteller.generate("One day", max_new_tokens=30, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_without_a_seed_stories_differ(storyteller):
    torch.manual_seed(0)
    first = storyteller.generate("One day", max_new_tokens=30)
    torch.manual_seed(0)  # not even the global seed repeats it
    assert storyteller.generate("One day", max_new_tokens=30) != first


@pytest.mark.parametrize("seed", [None, 1])
def test_generation_does_not_use_the_global_generator(storyteller, seed):
    before = torch.get_rng_state()
    storyteller.generate("One day", max_new_tokens=5, seed=seed)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("prompt", ["One day", ""])
def test_stream_yields_the_prompt_and_then_the_story_in_pieces(storyteller, prompt):
    pieces = list(storyteller.stream(prompt, max_new_tokens=40, seed=3))
    assert len(pieces) > 10 and all(pieces)
    assert not prompt or pieces[0] == prompt
    assert "".join(pieces) == storyteller.generate(prompt, max_new_tokens=40, seed=3)


def test_stream_yields_each_piece_before_the_next_token_is_computed(scripted):
    storyteller = scripted(b"a", b"b", b"c")
    stream = storyteller.stream("x", max_new_tokens=3)
    assert [next(stream), next(stream)] == ["x", "a"]
    assert len(storyteller.model.script) == 2


def test_a_story_ends_at_the_end_of_text_token(scripted, tokenizer):
    storyteller = scripted(b"a", b"b", tokenizer.eot_token, b"c")
    assert storyteller.generate("One day ", max_new_tokens=10) == "One day ab"


@pytest.mark.parametrize("max_new_tokens", [0, 1, 7])
def test_a_story_ends_after_max_new_tokens(scripted, max_new_tokens):
    storyteller = scripted(*[b"a"] * 10)
    assert storyteller.generate("One day ", max_new_tokens=max_new_tokens) == "One day " + "a" * max_new_tokens


def test_a_truncated_story_warns(scripted, tokenizer):
    with pytest.warns(UserWarning, match=r"the story did not end within max_new_tokens \(2\)") as caught:
        scripted(b"a", b"b", b"c").generate("One day", max_new_tokens=2)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="2 of 2 stories"):
        scripted(b"a", b"b", b"c").generate(["One", "One"], max_new_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scripted(b"a", tokenizer.eot_token).generate("One day", max_new_tokens=2)


def test_a_character_of_several_tokens_is_streamed_when_complete(scripted):
    tokens = [bytes([byte]) for byte in "🐌é".encode()]
    assert list(scripted(*tokens).stream("x", max_new_tokens=len(tokens))) == ["x", "🐌", "é"]


@pytest.mark.parametrize("end", ["max_new_tokens", "end of text"])
def test_an_incomplete_character_at_the_end_is_replaced(scripted, tokenizer, end):
    tokens = [bytes([byte]) for byte in "🐌".encode()[:2]]
    storyteller = scripted(*tokens, tokenizer.eot_token)
    assert storyteller.generate("x", max_new_tokens=2 if end == "max_new_tokens" else 3) == "x\N{REPLACEMENT CHARACTER}"


def test_temperature_zero_generates_the_most_likely_tokens(storyteller, tokenizer):
    prompt = tokenizer.encode_ordinary("One day")
    expected = storyteller.model.generate(torch.tensor([prompt]), 25, temperature=0.0)[0].tolist()
    assert tokenizer.eot_token not in expected
    assert storyteller.generate("One day", max_new_tokens=25, temperature=0.0) == tokenizer.decode(expected)


def test_an_empty_prompt_starts_from_the_end_of_text_token(storyteller, tokenizer):
    ids = storyteller.model.generate(torch.tensor([[tokenizer.eot_token]]), 10, temperature=0.0)[0, 1:].tolist()
    assert tokenizer.eot_token not in ids
    assert storyteller.generate(max_new_tokens=10, temperature=0.0) == tokenizer.decode(ids)


def test_end_of_text_in_a_prompt_is_ordinary_text(storyteller, tokenizer):
    prompt = "a<|endoftext|>b"
    expected = storyteller.model.generate(torch.tensor([tokenizer.encode_ordinary(prompt)]), 5, temperature=0.0)
    assert storyteller.generate(prompt, max_new_tokens=5, temperature=0.0) == tokenizer.decode(expected[0].tolist())


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_a_batch_of_prompts_gives_the_same_stories_as_single_prompts(storyteller):
    prompts = ["One day", "", "Ben found a kite in the old barn", LONG_PROMPT, "A"]
    options = {"max_new_tokens": 25, "temperature": 0.0}
    assert storyteller.generate(prompts, **options) == [storyteller.generate(prompt, **options) for prompt in prompts]


def test_stories_of_a_batch_are_sampled_independently(storyteller):
    assert len(set(storyteller.generate(["One day"] * 3, max_new_tokens=30, seed=0))) == 3


def test_stories_of_a_batch_end_independently(scripted, tokenizer):
    # "One day " is 3 tokens longer than "O": its first 3 tokens are not predictions.
    longer = len(tokenizer.encode_ordinary("One day ")) - len(tokenizer.encode_ordinary("O"))
    script = [b"a"] * longer + [b"b", tokenizer.eot_token, b"c"]
    assert scripted(*script).generate(["O", "One day "], max_new_tokens=20) == ["O" + "a" * longer + "b", "One day b"]


def test_one_prompt_gives_a_string_and_a_list_gives_a_list(storyteller):
    assert storyteller.generate([]) == []
    single = storyteller.generate("One", max_new_tokens=3, seed=0)
    assert storyteller.generate(["One"], max_new_tokens=3, seed=0) == [single]
    assert storyteller.generate(("One",), max_new_tokens=3, seed=0) == [single]


def test_a_prompt_longer_than_the_context_warns_and_its_end_is_used(storyteller, tokenizer):
    ids = tokenizer.encode_ordinary(LONG_PROMPT)
    assert len(ids) > CONTEXT
    with pytest.warns(UserWarning, match=rf"prompt.*{len(ids)} tokens.*{CONTEXT}"):
        story = storyteller.generate(LONG_PROMPT, max_new_tokens=20, temperature=0.0)
    expected = storyteller.model.generate(torch.tensor([ids[-CONTEXT:]]), 20, temperature=0.0)[0, CONTEXT:].tolist()
    assert story == LONG_PROMPT + tokenizer.decode(expected)


def test_a_story_longer_than_the_context_does_not_warn(storyteller):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*did not end within")
        storyteller.generate("One day", max_new_tokens=2 * CONTEXT)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_new_tokens", value) for value in (-1, 2.5, None)),
        *(("temperature", -1.0), ("top_k", 0), ("top_p", 1.5)),
        *(("seed", value) for value in (-1, 1.5, "1", 2**63, np.float64(1.5), np.True_)),
    ],
)
def test_an_invalid_argument_is_rejected_before_the_first_piece(storyteller, field, value):
    with pytest.raises(StoryLLMError, match=rf"{field} .*{value}"):
        storyteller.generate("One day", **{field: value})
    with pytest.raises(StoryLLMError, match=field):
        next(storyteller.stream("One day", **{field: value}))


@pytest.mark.parametrize("field", ["max_new_tokens", "temperature", "top_k", "seed"])
def test_an_integer_that_python_refuses_to_format_is_rejected_in_one_line(storyteller, field):
    with pytest.raises(StoryLLMError, match=f"{field} is an integer of 16610 bits"):
        storyteller.generate("One day", **{field: -(10**5000)})


def test_numpy_numbers_are_accepted(storyteller):
    options = {"max_new_tokens": 9, "temperature": 0.5, "top_k": 20, "top_p": 0.75, "seed": 3}
    of_numpy = {
        name: np.int8(value) if isinstance(value, int) else np.float32(value) for name, value in options.items()
    }
    assert storyteller.generate(["One day", LONG_PROMPT[:30]], **of_numpy) == storyteller.generate(
        ["One day", LONG_PROMPT[:30]], **options
    )


def test_a_story_of_any_length_may_be_requested(scripted, tokenizer):
    assert scripted(b"a", b"b", tokenizer.eot_token).generate("x", max_new_tokens=10**30) == "xab"


@pytest.mark.parametrize("prompt", [None, 5, b"One", [5], ["One", None]])
def test_a_prompt_that_is_not_text_is_rejected(storyteller, prompt):
    with pytest.raises(StoryLLMError, match=r"prompt.*string"):
        storyteller.generate(prompt)


@pytest.mark.parametrize("rules", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}])
def test_a_model_with_nan_weights_is_rejected(storyteller, rules):
    with torch.no_grad():
        storyteller.model.transformer["ln_f"].weight.fill_(math.nan)
    with pytest.raises(StoryLLMError, match="finite"):
        storyteller.generate("Once", **rules)


@pytest.mark.parametrize("text", ["", "A", "One day Zoë 🐌", LONG_PROMPT, LONG_PROMPT * 3])
def test_the_score_of_a_text_is_the_log_probability_of_each_token(storyteller, tokenizer, text):
    storyteller.model.train()  # dropout must have no effect
    score = storyteller.score(text)
    assert storyteller.model.training
    assert score.ids == tokenizer.encode_ordinary(text)
    assert b"".join(map(tokenizer.decode_single_token_bytes, score.ids)).decode() == text
    assert len(score.tokens) == len(score.log_probs) == len(score.ids)
    stream, expected = [tokenizer.eot_token, *score.ids], []
    for start in range(0, len(score.ids), CONTEXT):
        window = torch.tensor(stream[start : start + CONTEXT + 1])
        log_probs = storyteller.model.eval()(window[None, :-1])[0][0].log_softmax(-1)
        expected += log_probs[range(len(window) - 1), window[1:]].tolist()
    assert score.log_probs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("text", [None, 5, b"One", ["One"]])
def test_the_score_of_what_is_not_text_is_rejected(storyteller, text):
    with pytest.raises(StoryLLMError, match=f"text is {type(text).__name__}, must be a string"):
        storyteller.score(text)


def test_a_tokenizer_of_another_size_is_rejected(storyteller):
    other = tiktoken.Encoding(
        "bytes",
        pat_str=".",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    with pytest.raises(StoryLLMError, match=r"257.*300"):
        Storyteller(storyteller.model, other)


@pytest.mark.parametrize(
    ("pieces", "wrapped"),
    [
        (["Once upon a time"], "Once upon\na time"),
        (["On", "ce ", "up", "on a", " time"], "Once upon\na time"),
        (["a  b\n\n", "\nthe tall tree\n"], "a  b\n\n\nthe tall\ntree\n"),
        (["incomprehensible it"], "incomprehensible\nit"),
        (["0123456789 "], "0123456789 "),
        ([], ""),
    ],
)
def test_lines_are_broken_at_words(pieces, wrapped):
    assert "".join(wrap(pieces, width=10)) == wrapped


def test_text_without_spaces_is_shown_when_it_fills_a_line():
    pieces = iter("日本語" * 4)
    assert next(wrap(pieces, width=5)) == "日本語日本"
    assert "".join(wrap("日本語" * 4, width=5)) == "日本語" * 4


def test_each_word_is_shown_when_it_is_complete():
    pieces = iter(["One ", "day", " a"])
    words = wrap(pieces, width=80)
    assert next(words) == "One"
    assert next(pieces) == "day"


def test_load_gives_the_storyteller_of_a_run(tiny_run):
    storyteller = load(tiny_run / "best_model_params.pt", device="cpu")
    assert not storyteller.model.training
    assert storyteller.generate("One day", max_new_tokens=3, seed=0).startswith("One day")
    assert load(str(tiny_run / "last.pt")).model.config == storyteller.model.config


def test_load_rejects_a_device_that_is_not_available(tiny_run):
    with pytest.raises(StoryLLMError, match="'gpu'"):
        load(tiny_run / "best_model_params.pt", device="gpu")
