"""The storyteller: text in, text out."""

import math
import warnings

import pytest
import tiktoken
import torch

from storyllm import GPT, GPTConfig, StoryLLMError, Storyteller
from storyllm.tokens import read_tokenizer

CONTEXT = 16


@pytest.fixture
def teller(tiny_data):
    tokenizer = read_tokenizer(tiny_data)
    torch.manual_seed(0)
    return Storyteller(GPT(GPTConfig(tokenizer.n_vocab, CONTEXT, n_layer=2, n_head=2, n_embd=32)).eval(), tokenizer)


def always(teller, *tokens):
    """Makes the model say these tokens, in a circle, whatever it is asked."""
    tokens = list(tokens)
    calls = iter(range(1_000_000))

    def next_logits(idx, cache=None):
        logits = torch.full((len(idx), teller.tokenizer.n_vocab), -50.0)
        logits[:, tokens[next(calls) % len(tokens)]] = 50.0
        return logits

    teller.model.next_logits = next_logits


def test_a_story_begins_with_its_prompt_and_goes_on(teller):
    story = teller.tell("One day", max_new_tokens=20, seed=0)
    assert story.startswith("One day")
    assert len(story) > len("One day")


def test_a_seed_repeats_a_story_and_another_tells_another(teller):
    tell = [teller.tell("One day", max_new_tokens=30, seed=seed) for seed in (1, 1, 2)]
    assert tell[0] == tell[1] != tell[2]
    assert teller.tell("One day", max_new_tokens=30) != teller.tell("One day", max_new_tokens=30)


def test_telling_leaves_the_global_generator_alone(teller):
    before = torch.get_rng_state()
    teller.tell("One day", max_new_tokens=5, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_the_stream_is_the_story(teller):
    for prompt in ("One day", ""):
        pieces = list(teller.stream(prompt, max_new_tokens=40, seed=3))
        assert len(pieces) > 10
        assert "".join(pieces) == teller.tell(prompt, max_new_tokens=40, seed=3)


def test_a_story_stops_at_the_end_of_text(teller):
    a, b = teller.tokenizer.encode_ordinary("a")[0], teller.tokenizer.encode_ordinary("b")[0]
    always(teller, a, b, teller.tokenizer.eot_token)
    assert teller.tell("One day ") == "One day ab"


def test_a_story_stops_at_its_greatest_length(teller):
    always(teller, teller.tokenizer.encode_ordinary("a")[0])
    assert teller.tell("One day ", max_new_tokens=7) == "One day aaaaaaa"
    assert teller.tell("One day", max_new_tokens=0) == "One day"


def test_characters_of_several_tokens_come_whole(teller):
    tokens = list("🐌é".encode())
    ids = [teller.tokenizer.encode_single_token(bytes([byte])) for byte in tokens]
    always(teller, *ids)
    assert list(teller.stream("x", max_new_tokens=len(ids))) == ["x", "🐌", "é"]
    always(teller, *ids)
    assert teller.tell("x", max_new_tokens=2) == "x\N{REPLACEMENT CHARACTER}"  # cut in the middle of the snail


def test_the_likeliest_token_at_temperature_zero(teller):
    prompt = teller.tokenizer.encode_ordinary("One day")
    expected = teller.model.generate(torch.tensor([prompt]), 25, temperature=0.0)[0, len(prompt) :].tolist()
    assert teller.tokenizer.eot_token not in expected
    assert teller.tell("One day", max_new_tokens=25, temperature=0.0) == "One day" + teller.tokenizer.decode(expected)


@pytest.mark.filterwarnings("ignore:prompt has")
def test_several_stories_at_once_are_those_told_alone(teller):
    """Prompts of different lengths, one beyond what is left of the context: greedy, so that chance has no part."""
    prompts = ["One day", "", "Ben found a kite in the old barn", "A"]
    together = teller.tell(prompts, max_new_tokens=25, temperature=0.0)
    assert together == [teller.tell(prompt, max_new_tokens=25, temperature=0.0) for prompt in prompts]
    assert teller.tell([]) == []
    several = teller.tell(["One day"] * 3, max_new_tokens=30, seed=0)
    assert len(set(several)) == 3


def test_an_empty_prompt_starts_a_story(teller):
    seen = []
    original = teller.model.next_logits
    teller.model.next_logits = lambda idx, cache=None: seen.append(idx.tolist()) or original(idx, cache)
    teller.tell("", max_new_tokens=1)
    assert seen == [[[teller.tokenizer.eot_token]]]


def test_a_prompt_longer_than_the_context_is_cut_with_a_warning(teller):
    prompt = "One day Ben went to the meadow and found a kite and a drum and a snail."
    length = len(teller.tokenizer.encode_ordinary(prompt))
    assert length > CONTEXT
    with pytest.warns(UserWarning, match=f"prompt has {length} tokens, the context is {CONTEXT}: it is cut"):
        story = teller.tell(prompt, max_new_tokens=5, seed=0)
    assert story.startswith(prompt)
    assert len(story) > len(prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teller.tell("One day", max_new_tokens=2 * CONTEXT)


@pytest.mark.parametrize(
    "arguments", [{"max_new_tokens": -1}, {"max_new_tokens": 2.5}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 1.5}]
)
def test_values_out_of_range_are_refused_by_name(teller, arguments):
    with pytest.raises(StoryLLMError, match=f"^{next(iter(arguments))} is .*expected"):
        teller.tell("One day", **arguments)


def test_a_tokenizer_of_another_size_is_refused(teller):
    other = tiktoken.Encoding(
        "bytes",
        pat_str=".",
        mergeable_ranks={bytes([b]): b for b in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    with pytest.raises(StoryLLMError, match="the model has 300 tokens, the tokenizer 257"):
        Storyteller(teller.model, other)


@pytest.mark.parametrize("prompt", [None, 5, b"One", [5], ["One", None]])
def test_a_prompt_that_is_not_text_is_refused(teller, prompt):
    with pytest.raises(StoryLLMError, match="expected text"):
        teller.tell(prompt)


@pytest.mark.parametrize("seed", [-1, 1.5, "1", 2**63])
def test_a_seed_that_is_none_is_refused(teller, seed):
    with pytest.raises(StoryLLMError, match=r"seed is .*expected a whole number"):
        teller.tell("One", seed=seed)


def test_nothing_is_told_before_the_options_are_checked(teller):
    with pytest.raises(StoryLLMError, match="temperature is -1"):
        next(teller.stream("One day", temperature=-1.0))


@pytest.mark.parametrize("rules", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}])
def test_weights_that_are_not_numbers_are_refused_in_one_line(teller, rules):
    with torch.no_grad():
        teller.model.transformer["ln_f"].weight.fill_(math.nan)
    with pytest.raises(StoryLLMError, match="gives no probabilities"):
        teller.tell("Once", **rules)
