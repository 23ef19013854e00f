"""Numbers that hold: what must be true of whatever comes in, tried on inputs that `hypothesis` makes up."""

import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from conftest import synthetic_stories
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import storyllm
from storyllm import (
    GPT,
    RECIPES,
    DataConfig,
    GPTConfig,
    Recipe,
    StoryLLMError,
    Storyteller,
    TrainConfig,
    evaluate,
    load,
    lr_at,
    next_token_probs,
    open_tokens,
    prepare,
    read_log,
    read_tokenizer,
    sampling,
    train,
    training,
)
from storyllm.checkpoint import load_checkpoint
from storyllm.device import choose_machine
from storyllm.evaluation import bits_per_byte, mean_loss
from storyllm.tokens import random_windows, sequential_windows, shuffled_windows

# Examples where each one prepares data or trains, where it is arithmetic, and in the campaign.
FEW, MANY, PLENTY = 12, 200, 500
short_and_long = pytest.mark.parametrize("examples", [FEW, pytest.param(PLENTY, marks=pytest.mark.campaign)])

LARGEST = float(np.finfo(np.float32).max)


def tries(examples):
    """Settings of so many examples: the same ones in every run, but others each time in the campaign."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=examples < PLENTY,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],  # a busy machine is no failure
    )


# Logits -> probabilities -> the next token

ONE_LOGIT = st.one_of(
    st.integers(-2, 2).map(float),  # ties
    st.floats(-30, 30, width=32),
    st.floats(-LARGEST, LARGEST, width=32),
    st.just(-math.inf),  # a token that is forbidden
)


@st.composite
def many_logits(draw):
    """(rows, V) logits of every kind, each row with at least one that is finite."""
    if draw(st.booleans()):  # as of a model: too many to write one by one
        shape, generator = draw(st.tuples(st.integers(1, 3), st.integers(1, 400))), torch.Generator()
        logits = torch.randn(shape, generator=generator.manual_seed(draw(st.integers(0, 999))))
        logits *= draw(st.sampled_from([0.0, 0.1, 3.0, 20.0]))
        return logits.round() if draw(st.booleans()) else logits
    V = draw(st.integers(1, 12))
    row = st.lists(ONE_LOGIT, min_size=V, max_size=V).filter(lambda row: max(row) > -math.inf)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=3)))


TEMPERATURES = st.one_of(st.sampled_from([0, 0.0, 1, 1.0, 1e-30, 1e30]), st.floats(0.05, 20))
TOP_KS = st.none() | st.integers(1, 14) | st.integers(15, 500)
TOP_PS = st.one_of(st.none(), st.sampled_from([1, 0.5, 0.25, 1e-30, 1 - 1e-9]), st.floats(0.001, 1))


def assert_obeys(row, got, temperature, top_k, top_p):
    """`got` is what the rules leave of the logits `row`: worked out slowly, in double precision."""
    assert min(got) >= 0
    assert math.fsum(got) == pytest.approx(1, abs=1e-5)
    kept = [token for token, probability in enumerate(got) if probability > 0]
    if temperature == 0:
        assert [row[token] for token in kept] == [max(row)]
        return
    weights = [math.exp((logit - max(row)) / temperature) for logit in row]
    likeliest = sorted(weights, reverse=True)[:top_k]
    shares = [weight / math.fsum(likeliest) for weight in likeliest]
    # Of the k tokens, those count that float32 can tell from 0: a logit of -inf keeps a probability of 0 in any case.
    fewest, most = sum(share > 1e-34 for share in shares), sum(share > 1e-47 for share in shares)
    if top_p is not None and top_p < 1:
        # The running sum is rounded, so a set that holds top_p but for 1e-5 may count as either.
        sums = list(itertools.accumulate(shares))
        fewest = 1 + sum(held < top_p - 1e-5 for held in sums[:-1])
        most = min(most, 1 + sum(held < top_p + 1e-5 for held in sums[:-1]))
    assert fewest <= len(kept) <= most
    dropped = [weight for token, weight in enumerate(weights) if token not in kept]
    assert min(weights[token] for token in kept) >= max(dropped, default=0) * (1 - 1e-4)  # the likeliest are kept
    total = math.fsum(weights[token] for token in kept)
    for token in kept:  # in proportion
        assert got[token] == pytest.approx(weights[token] / total, rel=1e-4, abs=1e-9)


@tries(MANY)
@given(many_logits(), TEMPERATURES, TOP_KS, TOP_PS)
def test_probabilities_are_what_the_rules_leave(logits, temperature, top_k, top_p):
    probs = next_token_probs(logits, temperature, top_k, top_p)
    assert (probs.shape, probs.dtype) == (logits.shape, torch.float32)
    for row, got in zip(logits.tolist(), probs.tolist(), strict=True):
        assert_obeys(row, got, temperature, top_k, top_p)


@tries(MANY)
@given(many_logits(), st.floats(0, allow_infinity=False), TOP_KS, st.floats(0, 1, exclude_min=True))
@example(torch.tensor([[0.0, 1.0]]), 1.0, None, 1e-46)  # what float32 does not hold
@example(torch.tensor([[3e38, 0.0]]), 0.5, None, 1.0)
@example(torch.tensor([[-math.inf, 0.0]]), 1e39, None, 1.0)
def test_no_rule_is_too_far_for_probabilities(logits, temperature, top_k, top_p):
    probs = next_token_probs(logits, temperature, top_k, top_p)
    assert (probs >= 0).all()
    assert probs.sum(-1).tolist() == pytest.approx([1] * len(logits), abs=1e-5)
    ids = sampling.draw(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0))
    assert (probs.gather(-1, ids[:, None]) > 0).all()


@tries(MANY)
@given(many_logits(), TOP_KS.filter(bool))
def test_top_k_keeps_exactly_k(logits, top_k):
    logits = logits.clamp(-40, 40)  # so that no probability vanishes
    kept = (next_token_probs(logits, top_k=top_k) > 0).sum(-1)
    assert kept.tolist() == [min(top_k, logits.size(-1))] * len(logits)


@tries(MANY)
@given(st.integers(0, 8), st.data())
def test_top_p_of_equal_shares_keeps_exactly_as_many_as_hold_it(power, data):
    """Shares of 2**-power add up without rounding: here the smallest set is known to the token."""
    V = 2**power
    kept = data.draw(st.integers(1, V))
    less = data.draw(st.sampled_from([0, 1e-3, 0.5, 0.999]))
    probs = next_token_probs(torch.zeros(V), top_p=(kept - less) / V)
    assert (probs > 0).sum() == kept


@tries(MANY)
@given(many_logits(), TEMPERATURES, TOP_KS, TOP_PS)
def test_a_row_does_not_depend_on_the_others(logits, temperature, top_k, top_p):
    together = next_token_probs(logits, temperature, top_k, top_p).sort().values  # which of several equals may differ
    for row, got in zip(logits, together, strict=True):
        alone = next_token_probs(row, temperature, top_k, top_p).sort().values
        torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-9)


@tries(MANY)
@given(many_logits(), TEMPERATURES, TOP_KS, TOP_PS, st.integers(0, 2**63 - 1))
def test_what_has_no_probability_is_never_drawn(logits, temperature, top_k, top_p, seed):
    probs = next_token_probs(logits, temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(10):
        ids = sampling.draw(logits, temperature, top_k, top_p, generator)
        assert (probs.gather(-1, ids[:, None]) > 0).all()
    again = sampling.draw(logits, temperature, top_k, top_p, generator.manual_seed(seed))
    assert again.tolist() == sampling.draw(logits, temperature, top_k, top_p, generator.manual_seed(seed)).tolist()


@tries(MANY)
@given(many_logits(), TEMPERATURES, TOP_KS, TOP_PS, st.sampled_from([0.0, 1 - 2**-24]) | st.floats(0, 1 - 2**-24))
@example(torch.tensor([[-math.inf, 0.0, -math.inf]]), 1.0, None, None, 0.0)
@example(torch.tensor([[-math.inf, 0.0, -math.inf]]), 1.0, None, None, 1 - 2**-24)
def test_nor_by_any_number_that_the_generator_may_give(logits, temperature, top_k, top_p, point):
    probs = next_token_probs(logits, temperature, top_k, top_p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, dtype=torch.float32, **_: torch.full(shape, point, dtype=dtype))
        ids = sampling.draw(logits, temperature, top_k, top_p)
    assert (probs.gather(-1, ids[:, None]) > 0).all()


# Text -> ids -> text

# Any text that UTF-8 can hold, mixed with what is likeliest to go wrong. A million spaces in a row, on which tiktoken
# gives up, are too long for this.
NASTY = [*"\0\r\ufeff \x85\u2028", "<|endoftext|>", "<|endoftext|", "\r\n", "\n\n", "   ", "'ll", "'S"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
TEXTS = st.lists(TEXT | st.sampled_from(NASTY) | st.integers(0, 99).map(lambda n: synthetic_stories(1, n)[0]))
ANY_TEXT = TEXTS.map("".join)


@pytest.fixture
def gpt2(gpt2_cache):
    return storyllm.tokenizer.gpt2_tokenizer()


@pytest.fixture
def bpe(tiny_data):
    return read_tokenizer(tiny_data)


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
def test_any_text_comes_back(name, request):
    tokenizer = request.getfixturevalue(name)

    @tries(MANY)
    @given(ANY_TEXT)
    def comes_back(text):
        ids = tokenizer.encode_ordinary(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.eot_token for token in ids)  # the mark within a text is text

    comes_back()


@pytest.mark.filterwarnings("ignore:the stories give only")
@short_and_long
def test_any_stories_come_back_from_what_prepare_wrote(examples, tmp_path_factory):
    @tries(examples)
    @given(st.lists(ANY_TEXT, min_size=1, max_size=6), st.lists(ANY_TEXT, min_size=1, max_size=3), st.booleans())
    @example([""], [""], True)
    @example(["", "<|endoftext|>", "a<|endoftext|>b", ""], ["<|endoftext|><|endoftext|>"], False)
    @example(["\0", "a\r\nb\r\n", "a \ufeff b", "\ufeff", " \n"], ["\u2028\x85\x1c", "\n"], False)
    def come_back(stories, held_out, ascii_only):
        folder = tmp_path_factory.mktemp("stories")
        for name, texts in (("train", stories), ("valid", held_out)):
            lines = [json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts]
            (folder / f"{name}.jsonl").write_bytes("".join(lines).encode())
        prepare(DataConfig(source=str(folder), tokenizer="bpe:300"), folder / "data")
        tokenizer = read_tokenizer(folder / "data")
        for split, texts in (("train", stories), ("validation", held_out)):
            tokens = open_tokens(folder / "data" / f"{split}.bin")
            ends = np.flatnonzero(tokens.ids == tokenizer.eot_token)
            assert ends[-1] == len(tokens.ids) - 1
            each = np.split(np.asarray(tokens.ids), ends + 1)[:-1]
            assert [tokenizer.decode(ids[:-1].tolist()) for ids in each] == texts
            expected = (len(texts), len(tokens.ids), sum(len(text.encode()) for text in texts))
            assert (tokens.info.stories, tokens.info.tokens, tokens.info.bytes) == expected

    come_back()


# Windows

IDS = st.lists(st.integers(0, 65535), max_size=60).map(lambda ids: np.array(ids, "<u2"))


@tries(MANY)
@given(IDS, st.integers(1, 20), st.integers(0, 40), st.integers(0, 2**63 - 1))
def test_random_windows_are_pieces_of_the_data(ids, block_size, count, seed):
    before = ids.copy()
    if len(ids) <= block_size:
        with pytest.raises(StoryLLMError, match=f"has {len(ids)} tokens, a window of {block_size} needs"):
            random_windows(ids, block_size, count, np.random.default_rng(seed))
        return
    x, y = random_windows(ids, block_size, count, np.random.default_rng(seed))
    assert x.shape == y.shape == (count, block_size)
    assert x.dtype == y.dtype == np.int64
    pieces = {tuple(ids[start : start + block_size + 1].tolist()) for start in range(len(ids) - block_size)}
    assert {(*row, end) for row, end in zip(x.tolist(), y[:, -1].tolist(), strict=True)} <= pieces
    assert (x[:, 1:] == y[:, :-1]).all()  # a target is the token one further on
    again = random_windows(ids, block_size, count, np.random.default_rng(seed))
    assert (x == again[0]).all() and (y == again[1]).all()
    assert (ids == before).all()


@tries(FEW)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**63 - 1))
def test_random_windows_start_anywhere(block_size, starts, seed):
    ids, rng = np.arange(starts + block_size, dtype="<u2"), np.random.default_rng(seed)
    x, y = random_windows(ids, block_size, 50 * starts, rng)
    assert set(x[:, 0].tolist()) == set(range(starts))
    assert y.max() == starts + block_size - 1


@tries(MANY)
@given(st.integers(2, 200), st.integers(1, 20), st.integers(1, 10), st.integers(0, 2**63 - 1))
def test_shuffled_windows_do_not_depend_on_the_batches_they_come_in(tokens, block_size, count, seed):
    assume(tokens > block_size)
    ids, in_epoch = np.arange(tokens, dtype="<u2"), max(1, tokens // block_size - 1)
    batches = [shuffled_windows(ids, block_size, count, (0, seed), i) for i in range(2 * in_epoch // count + 1)]
    x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert (np.hstack([x, y[:, -1:]]) == x[:, :1] + np.arange(block_size + 1)).all()  # pieces of the data
    for first in range(0, 2 * in_epoch, in_epoch):  # in an epoch no token is read twice
        epoch = x[first : first + in_epoch]
        assert len(np.unique(epoch)) == epoch.size
    ones = [shuffled_windows(ids, block_size, 1, (0, seed), i)[0] for i in range(len(x))]
    assert (np.concatenate(ones) == x).all()


@tries(MANY)
@given(IDS, st.integers(1, 20), st.integers(1, 10))
def test_sequential_windows_hold_every_token_once_and_in_order(ids, block_size, count):
    windows = list(sequential_windows(ids, block_size, count))
    assert [token for x, _ in windows for token in x.flatten().tolist()] == ids[:-1].tolist()
    assert [token for _, y in windows for token in y.flatten().tolist()] == ids[1:].tolist()
    for number, (x, y) in enumerate(windows):
        assert x.dtype == y.dtype == np.int64
        rows, columns = x.shape
        assert y.shape == x.shape and rows <= count
        assert columns == block_size or (number == len(windows) - 1 and rows == 1 and columns < block_size)
    sizes = [len(x) for x, _ in windows if x.shape[1] == block_size]
    assert sizes[:-1] == [count] * len(sizes[:-1])  # as many at a time as may be


# The learning rate

RATES = st.floats(1e-12, 1e3) | st.sampled_from([1e-4, 3e-3])


@st.composite
def schedules(draw):
    iterations = st.integers(0, 12) | st.integers(0, 100_000)
    max_iters, warmup_iters = draw(iterations) + 1, draw(iterations)
    return TrainConfig(
        max_iters=max_iters,
        schedule=draw(st.sampled_from(get_args(get_type_hints(TrainConfig)["schedule"]))),
        warmup_iters=warmup_iters,
        decay_share=draw(st.floats(0, 1)),
        learning_rate=draw(RATES),
        min_lr=draw(RATES | st.just(0.0)),
        warmup_start=draw(st.floats(0, 1)),
    )


def steepest(config):
    """The most that the rate may move in an iteration after the warm-up."""
    difference = abs(config.learning_rate - config.min_lr)
    if config.schedule == "flat":
        return difference / max(1, decay_iters(config))
    return math.pi / 2 * difference / (config.max_iters - config.warmup_iters)


def decay_iters(config):
    return min(config.decay_share * config.max_iters, config.max_iters - config.warmup_iters)


def corners(config):
    """Iterations of the schedule where something begins or ends, and those beside them."""
    decay = math.floor(config.max_iters - decay_iters(config))
    ends = (0, config.warmup_iters, (config.warmup_iters + config.max_iters) // 2, decay, config.max_iters)
    return {max(0, end + step) for end in ends for step in (-1, 0, 1)}


@tries(MANY)
@given(schedules(), st.lists(st.integers(0, 100_010)))
def test_the_rate_stays_within_its_bounds(config, iterations):
    ends = [config.learning_rate, config.min_lr]
    if config.warmup_iters:
        ends.append(config.warmup_start * config.learning_rate)
    slack = 1e-12 * max(ends)
    for iteration in corners(config) | set(iterations):
        assert min(ends) - slack <= lr_at(iteration, config) <= max(ends) + slack


@tries(MANY)
@given(schedules(), st.lists(st.integers(0, 100_000)))
def test_the_rate_has_no_jumps(config, iterations):
    """From one iteration to the next it moves no further than the steepest of its part."""
    slack = 1e-12 * max(config.learning_rate, config.min_lr)
    line = (1 - config.warmup_start) * config.learning_rate / max(1, config.warmup_iters)
    for iteration in {i for i in corners(config) | set(iterations) if i < config.max_iters}:
        step = abs(lr_at(iteration + 1, config) - lr_at(iteration, config))
        if iteration >= config.warmup_iters:
            assert step <= steepest(config) * (1 + 1e-6) + slack
        elif iteration + 1 < config.max_iters:  # at max_iters no batch is taken any more
            assert step == pytest.approx(line, rel=1e-6, abs=slack)


@tries(MANY)
@given(schedules(), st.lists(st.integers(0, 100_000)))
def test_the_rate_goes_through_its_corners(config, iterations):
    if config.warmup_iters:
        assert lr_at(0, config) == pytest.approx(config.warmup_start * config.learning_rate)
    if config.warmup_iters < config.max_iters:
        assert {lr_at(config.max_iters + further, config) for further in (0, 1, 1000)} == {config.min_lr}
        falls_from = config.warmup_iters
        if config.schedule == "flat":
            falls_from = math.floor(config.max_iters - decay_iters(config))
        rounding = {"rel": 1e-9, "abs": 1e-12 * max(config.learning_rate, config.min_lr)}
        for iteration in {config.warmup_iters, min(falls_from, config.max_iters - 1)}:
            assert lr_at(iteration, config) == pytest.approx(config.learning_rate, **rounding)
        middle, odd = divmod(falls_from + config.max_iters, 2)
        is_whole = config.schedule == "cosine" or falls_from == config.max_iters - decay_iters(config)
        if not odd and is_whole and falls_from < config.max_iters:
            assert lr_at(middle, config) == pytest.approx((config.learning_rate + config.min_lr) / 2)
    before = dataclasses.asdict(config)
    forwards = {i: lr_at(i, config) for i in sorted(iterations)}
    assert forwards == {i: lr_at(i, config) for i in sorted(iterations, reverse=True)}  # pure
    assert dataclasses.asdict(config) == before


# Recipes

PARTS = {part.name: get_type_hints(Recipe)[part.name] for part in dataclasses.fields(Recipe)}
FIELDS = {f"{part}.{name}": hint for part, config in PARTS.items() for name, hint in get_type_hints(config).items()}
HUGE = st.sampled_from([10**400, -(10**5000)])  # beyond floats; beyond what Python writes out
BY_TYPE = {
    bool: st.booleans(),
    int: st.integers(-3, 64) | st.integers(-(2**70), 2**70) | HUGE,
    float: st.floats(0, 1) | st.floats() | st.integers(-3, 64) | HUGE,
    str: st.text() | st.sampled_from(["builtin", "gpt2", "cpu", "auto"]) | st.integers(0, 70_000).map("bpe:{}".format),
    type(None): st.none(),
}
ODD = [None, True, False, "auto", "a\nb", "a\u2028b", b"gpt2", (), [], {}, [[1], "\n"], np.eye(3), Path("a\nb")]


def values_of(name):
    """Values for a field, good and bad, by its declared type; now and then something that is of none."""
    hint = FIELDS[name]
    options = [hint] if get_origin(hint) is Literal or not get_args(hint) else get_args(hint)
    known = [option for option in options if get_origin(option) is Literal or option in BY_TYPE]
    if len(known) < len(options):
        pytest.fail(f"{name} has the new type {hint}: add a strategy for it to BY_TYPE")
    typed = [st.sampled_from(get_args(o)) if get_origin(o) is Literal else BY_TYPE[o] for o in known]
    return st.one_of(*typed, *typed, st.sampled_from(ODD))


def flat(recipe):
    return {f"{part}.{name}": value for part, values in recipe.to_dict().items() for name, value in values.items()}


def assert_in_one_line(error):
    assert len(str(error).splitlines()) == 1


def assert_overrides(recipe, changes):
    """Whatever is accepted is in effect, and nothing else changes; what is not is refused in a line."""
    before = flat(recipe)
    try:
        after = recipe.override(changes)
    except StoryLLMError as error:
        assert_in_one_line(error)
    else:
        assert flat(after) == {**before, **changes}
        for name, value in changes.items():
            part, field = name.split(".")
            got = getattr(getattr(after, part), field)
            assert got == value and isinstance(got, bool) == isinstance(value, bool)  # True is no number here
        assert Recipe.from_dict(after.to_dict()) == after
        assert Recipe.from_dict(json.loads(json.dumps(after.to_dict()))) == after  # as in the log
    assert flat(recipe) == before


@pytest.mark.parametrize("name", FIELDS)
def test_an_override_is_in_effect_or_refused(name):
    @tries(4 * FEW)
    @given(st.sampled_from(list(RECIPES.values())), values_of(name))
    def holds(recipe, value):
        assert_overrides(recipe, {name: value})

    holds()
    for value in ODD:
        assert_overrides(Recipe(), {name: value})


CHANGES = st.lists(st.sampled_from(list(FIELDS)), max_size=6, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: values_of(name) for name in names})
)


@tries(MANY)
@given(st.sampled_from(list(RECIPES.values())), CHANGES)
def test_several_overrides_are_in_effect_or_refused(recipe, changes):
    assert_overrides(recipe, changes)


@tries(MANY)
@given(st.text() | st.sampled_from(list(FIELDS)).map(lambda name: name[:-1] + "\n"), st.none() | st.text())
def test_a_name_that_does_not_exist_is_refused_in_a_line(name, value):
    assume(name not in FIELDS)
    with pytest.raises(StoryLLMError) as caught:
        Recipe().override({name: value})
    assert_in_one_line(caught.value)


# Runs

# What a run of a moment may have in every field of model and training; on a GPU it would not be the same to the bit.
TINY = {
    "model.vocab_size": st.integers(1, 60_000),  # the data's own counts
    "model.block_size": st.integers(2, 16),
    "model.n_layer": st.integers(1, 2),
    "model.n_head": st.sampled_from([1, 2, 4]),
    "model.n_embd": st.sampled_from([8, 16]),
    "model.dropout": st.sampled_from([0.0, 0.1, 0.5]),
    "model.bias": st.booleans(),
    "model.flash_attention": st.booleans(),
    "model.gradient_checkpointing": st.booleans(),
    "train.max_iters": st.integers(1, 9),
    "train.stop_at": st.none() | st.integers(1, 10),
    "train.batch_size": st.integers(1, 3),
    "train.gradient_accumulation_steps": st.integers(1, 4),
    "train.micro_batch_size": st.just("auto") | st.integers(1, 7),
    "train.windows": st.sampled_from(["random", "shuffled"]),
    "train.optimizer": st.sampled_from(["adamw", "muon"]),
    "train.schedule": st.sampled_from(["cosine", "flat"]),
    "train.learning_rate": st.floats(1e-6, 1e-2),
    "train.min_lr": st.floats(0, 1e-2),
    "train.warmup_iters": st.integers(0, 10),
    "train.warmup_start": st.floats(0, 1),
    "train.decay_share": st.floats(0, 1),
    "train.muon_lr_scale": st.floats(0.1, 2),
    "train.weight_decay": st.floats(0, 1),
    "train.beta1": st.floats(0, 0.9),
    "train.beta2": st.floats(0.9, 0.999),  # near 0 a small gradient after a large one makes a step of any size
    "train.grad_clip": st.floats(0, 1),
    "train.eval_interval": st.integers(1, 10),
    "train.eval_windows": st.integers(1, 5),
    "train.checkpoint_minutes": st.sampled_from([0.0, 2.0]),
    "train.keep_checkpoints": st.integers(0, 2),
    "train.dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
    "train.device": st.just("cpu"),
    "train.compile": st.sampled_from(["auto", False]),  # a compiler takes longer than all of this
    "train.seed": st.integers(0, 2**63 - 1),
}


TINY_RECIPES = st.fixed_dictionaries(TINY).map(lambda changes: Recipe().override(changes))


def test_every_field_of_a_run_has_a_strategy():
    fields = {name for name in FIELDS if not name.startswith("data.")}
    assert set(TINY) == fields, "a field of the recipe is new or gone: add a strategy for it to TINY, and to EFFECT"


def ran(recipe, data, folder):
    """The log of a run, what of its updates and evaluations does not depend on the clock, and its last weights."""
    train(recipe, data, folder)
    log = read_log(folder / "log.jsonl")
    keep = ("iteration", "train_loss", "val_loss", "learning_rate", "grad_norm")
    entries = [[{k: entry[k] for k in keep if k in entry} for entry in part] for part in (log.updates, log.evaluations)]
    return log, entries, load_checkpoint(folder / "last.pt")["model"]


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def expected_parameters(config):
    C = config.n_embd
    vectors = 2 * (2 * C if config.bias else C) + (9 * C if config.bias else 0)  # of a block: two norms, four layers
    norm = 2 * C if config.bias else C
    return (config.vocab_size + config.block_size) * C + config.n_layer * (12 * C**2 + vectors) + norm


@short_and_long
def test_a_run_does_what_its_recipe_says_and_the_log_shows_it(examples, tiny_data, tmp_path_factory):
    @tries(examples)
    @given(TINY_RECIPES)
    def holds(recipe):
        folder = tmp_path_factory.mktemp("run")
        log, (updates, evaluations), _ = ran(recipe, tiny_data, folder)
        model, config = dataclasses.replace(recipe.model, vocab_size=300), recipe.train
        assert log.run["recipe"]["model"] == dataclasses.asdict(model)
        assert log.run["recipe"]["train"] == dataclasses.asdict(config)
        assert log.run["parameters"] == expected_parameters(model)
        chosen, in_update = log.run["micro_batch_size"], config.batch_size * config.gradient_accumulation_steps
        assert chosen in (range(1, in_update + 1) if config.micro_batch_size == "auto" else [config.micro_batch_size])
        for word in ("CPU", "float32" if config.dtype == "auto" else config.dtype, "not compiled"):
            assert word in log.run["device"]
        # Updates are whole, but for one of what is left at the very end; evaluations come when due, and at the end.
        end = min(config.stop_at or config.max_iters, config.max_iters)
        due = list(range(config.gradient_accumulation_steps, end + 1, config.gradient_accumulation_steps))
        due += [config.max_iters] if end == config.max_iters and end not in due else []
        assert [entry["iteration"] for entry in updates] == due
        assert [entry["iteration"] for entry in evaluations] == sorted({*range(0, end, config.eval_interval), end})
        assert [entry["learning_rate"] for entry in updates] == [lr_at(i - 1, config) for i in due]
        assert all(entry["learning_rate"] == lr_at(entry["iteration"], config) for entry in evaluations)
        assert load(folder / "best_model_params.pt").model.config == model
        assert load_checkpoint(folder / "last.pt")["recipe"] == log.run["recipe"]

    holds()


LIVE = Recipe().override(
    {
        **{"model.block_size": 8, "model.n_layer": 1, "model.n_head": 2, "model.n_embd": 8},
        **{"train.max_iters": 6, "train.batch_size": 2, "train.gradient_accumulation_steps": 2, "train.device": "cpu"},
        **{"train.warmup_iters": 3, "train.learning_rate": 1e-2, "train.min_lr": 1e-3, "train.eval_windows": 3},
        **{"train.optimizer": "muon", "train.schedule": "flat", "train.decay_share": 0.4},
    }
)
# What another value does to a run like LIVE: other weights, the same ones, or the same but for rounding.
EFFECT = {
    "model.vocab_size": (1000, "same"),  # the data's own counts
    "model.block_size": (9, "other"),
    "model.n_layer": (2, "other"),
    "model.n_head": (4, "other"),
    "model.n_embd": (16, "other"),
    "model.dropout": (0.2, "other"),
    "model.bias": (False, "other"),
    "model.flash_attention": (False, "rounding"),
    "model.gradient_checkpointing": (True, "rounding"),
    "data.source": ("builtin", "same"),  # the data is there already
    "data.tokenizer": ("bpe:400", "same"),
    "data.text_column": ("story", "same"),
    "data.validation_fraction": (0.5, "same"),
    "data.clean": (True, "same"),
    "data.builtin_stories": (7, "same"),
    "data.builtin_seed": (7, "same"),
    "train.max_iters": (7, "other"),
    "train.stop_at": (4, "other"),
    "train.batch_size": (3, "other"),
    "train.gradient_accumulation_steps": (3, "other"),
    "train.micro_batch_size": (1, "rounding"),
    "train.windows": ("shuffled", "other"),
    "train.optimizer": ("adamw", "other"),
    "train.schedule": ("cosine", "other"),
    "train.decay_share": (0.5, "other"),
    "train.muon_lr_scale": (0.5, "other"),
    "train.learning_rate": (9e-3, "other"),
    "train.min_lr": (2e-3, "other"),
    "train.warmup_iters": (2, "other"),
    "train.warmup_start": (0.5, "other"),
    "train.weight_decay": (0.2, "other"),
    "train.beta1": (0.8, "other"),
    "train.beta2": (0.9, "other"),
    "train.grad_clip": (0.4, "other"),
    "train.eval_interval": (2, "same"),
    "train.eval_windows": (4, "same"),
    "train.checkpoint_minutes": (0.0, "same"),
    "train.keep_checkpoints": (0, "same"),
    "train.dtype": ("bfloat16", "other"),
    "train.device": ("cpu:0", "same"),
    "train.compile": (False, "same"),
    "train.seed": (1, "other"),
}


def test_every_field_has_an_effect():
    assert set(EFFECT) == set(FIELDS), "a field of the recipe is new or gone: say in EFFECT what it does"


@pytest.fixture(scope="module")
def ran_once(tiny_data, tmp_path_factory):
    """`ran`, where several tests look at one run."""
    return functools.cache(lambda recipe: ran(recipe, tiny_data, tmp_path_factory.mktemp("once")))


@pytest.mark.parametrize("name", EFFECT)
def test_a_field_does_what_it_should_and_no_more(name, ran_once):
    value, effect = EFFECT[name]
    before = LIVE.override({"model.dropout": 0.0}) if effect == "rounding" else LIVE  # its draws may go another way
    after = before.override({name: value})
    assert flat(after)[name] != flat(before)[name]
    one, other = ran_once(before), ran_once(after)
    if effect == "rounding":  # at most
        losses = [[entry["train_loss"] for entry in run[1][0]] for run in (one, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    else:
        assert same_bits(one[2], other[2]) == (effect == "same")


def test_every_batch_of_every_seed_draws_for_itself(tiny_data, tmp_path, monkeypatch):
    """The windows of every batch and evaluation; the weights, once; the dropout of every update."""
    windows, seeds, manual_seed = [], [], torch.manual_seed
    monkeypatch.setattr(
        training, "random_windows", lambda *asked: windows.append(random_windows(*asked)) or windows[-1]
    )
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    config = LIVE.train
    for seed in (0, 1, 2**63 - 1):
        train(LIVE.override({"train.seed": seed}), tiny_data, tmp_path / str(seed))
    of_batches = [x.tobytes() for x, _ in windows if len(x) == config.batch_size]
    of_evaluations = [x.tobytes() for x, _ in windows if len(x) == config.eval_windows]
    assert len(of_batches) == len(set(of_batches)) == 3 * config.max_iters
    assert len(of_evaluations) == len(set(of_evaluations)) == 3 * 2
    assert len(seeds) == len(set(seeds)) == 3 * (1 + config.max_iters // config.gradient_accumulation_steps)


@short_and_long
def test_one_seed_gives_one_run_to_the_bit(examples, tiny_data, tmp_path_factory):
    @tries(examples)
    @given(TINY_RECIPES, st.integers(0, 2**63 - 1), st.integers(1, 9))
    def holds(recipe, other_seed, cut):
        folder = tmp_path_factory.mktemp("seeds")
        _, losses, weights = ran(recipe, tiny_data, folder / "one")
        _, losses_again, weights_again = ran(recipe, tiny_data, folder / "again")
        assert losses_again == losses
        assert same_bits(weights_again, weights)
        end = min(recipe.train.stop_at or recipe.train.max_iters, recipe.train.max_iters)
        train(recipe.override({"train.stop_at": min(cut, end)}), tiny_data, folder / "cut")
        _, (updates, _), continued = ran(recipe, tiny_data, folder / "cut")
        assert updates == losses[0]
        assert same_bits(continued, weights)
        if other_seed != recipe.train.seed:
            _, other_losses, others = ran(recipe.override({"train.seed": other_seed}), tiny_data, folder / "other")
            assert other_losses[1][0] != losses[1][0]
            assert not same_bits(others, weights)

    holds()


# Evaluation


@pytest.fixture(scope="module")
def teller(tiny_data):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=300, block_size=16, n_layer=1, n_head=2, n_embd=16))
    return Storyteller(model, read_tokenizer(tiny_data))


@pytest.fixture(scope="module")
def report(teller, tiny_data):
    return evaluate(teller, tiny_data / "validation.bin")


@tries(FEW)
@given(st.integers(1, 200) | st.integers(1, 100_000))
@example(1)
def test_evaluation_is_the_same_however_many_windows_at_once(teller, report, tiny_data, tokens_at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storyllm.evaluation, "CPU_TOKENS", tokens_at_once)
        other = evaluate(teller, tiny_data / "validation.bin")
    assert other.loss == pytest.approx(report.loss, rel=1e-6)
    assert (other.tokens, other.bytes) == (report.tokens, report.bytes)


@tries(FEW)
@given(st.integers(1, 12), st.integers(1, 13), st.integers(0, 999))
def test_a_mean_loss_is_the_same_however_its_windows_are_split(teller, windows, size, seed):
    x, y = torch.randint(300, (2, windows, 16), generator=torch.Generator().manual_seed(seed))
    machine = choose_machine(TrainConfig(device="cpu"), teller.model.config)
    teller.model.eval()
    split = mean_loss(teller.model.loss, zip(x.split(size), y.split(size), strict=True), machine)
    with torch.no_grad():
        each = [teller.model(row[None], targets[None])[1].item() for row, targets in zip(x, y, strict=True)]
    assert split == pytest.approx(math.fsum(each) / windows, rel=1e-6)


@short_and_long
def test_a_runs_evaluation_is_the_same_whatever_its_micro_batches(examples, tiny_data, tmp_path_factory):
    @tries(examples)
    @given(TINY_RECIPES, st.integers(1, 8))
    def holds(recipe, size):
        folder = tmp_path_factory.mktemp("micro")
        recipe = recipe.override({"train.dtype": "float32", "train.stop_at": 1, "train.eval_windows": 7})
        first = []
        for windows_at_once in (1, size):
            changes = {"train.micro_batch_size": windows_at_once}
            _, (_, evaluations), _ = ran(recipe.override(changes), tiny_data, folder / f"{len(first)}")
            first.append([evaluations[0]["train_loss"], evaluations[0]["val_loss"]])
        assert first[1] == pytest.approx(first[0], rel=1e-6)

    holds()


@tries(MANY)
@given(st.floats(0, 1e3), st.integers(1, 10**12), st.integers(1, 10**12))
def test_bits_per_byte_are_all_the_nats_over_all_the_bytes(loss, tokens, text_bytes):
    assert bits_per_byte(loss, tokens, text_bytes) * math.log(2) * text_bytes == pytest.approx(loss * tokens)
    assert bits_per_byte(math.log(256), tokens, tokens) == pytest.approx(8)  # a byte that nothing is known of
    assert bits_per_byte(loss, tokens, 2 * text_bytes) == pytest.approx(bits_per_byte(loss, tokens, text_bytes) / 2)


@tries(FEW)
@given(st.floats(0, 1e4))
@example(0.0)
@example(1e4)
def test_perplexity_and_bits_per_byte_are_those_of_the_loss(teller, tiny_data, confidence):
    """Of a model that is nearly sure of itself or knows nothing, and anything between."""
    gain = teller.model.transformer["ln_f"].weight
    before = gain.detach().clone()
    gain.data *= confidence
    try:
        report = evaluate(teller, tiny_data / "validation.bin")
    finally:
        gain.data.copy_(before)
    info = open_tokens(tiny_data / "validation.bin").info
    assert (report.tokens, report.bytes) == (info.tokens - 1, info.bytes)
    assert report.bits_per_byte == pytest.approx(report.loss * report.tokens / math.log(2) / info.bytes)
    if report.loss < 700:
        assert report.perplexity == math.exp(report.loss)
    else:  # more than a float holds
        assert report.perplexity == math.inf
    if confidence == 0:
        assert report.perplexity == pytest.approx(300)
