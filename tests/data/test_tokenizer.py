"""Both vocabularies encode any text losslessly, and a trained one agrees with the `tokenizers` library."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from helpers import random_stories, run_in_subprocess
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storyllm import DataConfig, StoryLLMError, read_stories
from storyllm.data.stories import check_whitespace
from storyllm.data.tokenizer import (
    END_OF_TEXT,
    gpt2_tokenizer,
    tokenizer_from_dict,
    tokenizer_hash,
    tokenizer_to_dict,
    train_bpe,
)

DIFFICULT_TEXTS = [
    "",
    " ",
    "\n",
    "\0",
    "\r\n\r\n \r\r\n",
    "\t\x0b\x0c\x1c\x1d\x1e\x1f\x7f\x80\x85\x9f",
    "  two spaces at both ends  ",
    "Once upon a time, there was a cat.\n\nIt said: “Hello!” — don't   you'll I'VE we're",
    END_OF_TEXT,
    f"a{END_OF_TEXT}b {END_OF_TEXT}\n{END_OF_TEXT}{END_OF_TEXT}",
    "<|endoftext|",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 \U0001f600",
    "e\u0301 \u00e9 " + "a" + "\u0301\u0323" * 20,
    "שלום עולם مرحبا بالعالم \u202eabc\u202c \u200f\u200e",
    "日本語のお話 中文故事 한국어 ไทย हिन्दी",
    "\ufeff at the start and \ufeff within, \ufffd \ufffe \uffff \U0010ffff",
    "\u2028\u2029\u00a0\u1680\u180e\u2003\u200b\u202f\u205f\u2060\u3000",
    "Ã©â€œ mojibake â€™",
    "1234567890 ٣٤٥ ½ Ⅷ ⁵ 1,000.50",
    "a" * 1_550,
    " " * 5_000 + "x" + "\n" * 5_000,
    "!?" * 3_000,
    "Zoë" * 2_000,
]
BYTES = [bytes([byte]) for byte in range(256)]


def random_texts(number: int, seed: int = 0) -> list[str]:
    """Texts of up to 60 characters from all of Unicode, with many characters that are difficult to tokenize."""
    rng = random.Random(seed)
    difficult = " \n\r\t\0\x1c\x85\u00a0'.,!19aeéß\u0301\u200d\u202e\ufeff\u3000אب😀"

    def character() -> str:
        kind = rng.random()
        if kind < 0.35:
            return rng.choice(difficult)
        code = rng.randrange(0x110000) if kind < 0.6 else rng.randrange(0x250)
        return "?" if 0xD800 <= code < 0xE000 else chr(code)

    return ["".join(character() for _ in range(rng.randrange(60))) for _ in range(number)]


@pytest.fixture(scope="module")
def bpe() -> tiktoken.Encoding:
    return train_bpe(random_stories(150), 400)


@pytest.fixture
def gpt2(gpt2_cache: Path) -> tiktoken.Encoding:
    return gpt2_tokenizer()


@pytest.fixture(params=["bpe", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> tiktoken.Encoding:
    return request.getfixturevalue(request.param)


def tokens_of(tokenizer: tiktoken.Encoding) -> list[bytes]:
    return [tokenizer.decode_single_token_bytes(token) for token in range(tokenizer.eot_token)]


def vocabulary(tokens: list[bytes]) -> dict[str, Any]:
    return {"name": "custom", "tokens": " ".join(base64.b64encode(token).decode() for token in tokens)}


# Encoding


def assert_lossless(tokenizer: tiktoken.Encoding, text: str) -> None:
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode_bytes(ids) == text.encode(), repr(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.eot_token for token in ids)  # END_OF_TEXT in a text is ordinary text


def test_encoding_is_lossless(tokenizer: tiktoken.Encoding) -> None:
    for text in DIFFICULT_TEXTS + random_texts(300):
        assert_lossless(tokenizer, text)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # a tokenizer has no state
)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(DIFFICULT_TEXTS[:11])).map("".join))
def test_encoding_of_any_text_is_lossless(tokenizer: tiktoken.Encoding, text: str) -> None:
    assert_lossless(tokenizer, text)


def test_end_of_text_is_the_last_token(tokenizer: tiktoken.Encoding) -> None:
    assert tokenizer.eot_token == tokenizer.n_vocab - 1 < 2**16
    assert tokenizer.decode([tokenizer.eot_token]) == END_OF_TEXT
    assert len(set(tokens_of(tokenizer))) == tokenizer.n_vocab - 1


def test_gpt2_ids(gpt2: tiktoken.Encoding) -> None:
    """The expected ids are those of GPT-2's own encoder."""
    assert (gpt2.n_vocab, gpt2.eot_token) == (50257, 50256)
    assert gpt2.encode_ordinary("Hello world") == [15496, 995]
    assert gpt2.encode_ordinary("Once upon a time") == [7454, 2402, 257, 640]


# Training


@pytest.mark.parametrize("vocab_size", [257, 258, 300, 400])
def test_trained_vocabulary_has_exactly_the_requested_size(vocab_size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = train_bpe(random_stories(100), vocab_size)
    assert tokenizer.n_vocab == vocab_size
    assert tokenizer.name == f"bpe:{vocab_size}"


def test_tokens_are_the_bytes_and_then_merges_of_earlier_tokens(bpe: tiktoken.Encoding) -> None:
    tokens = tokens_of(bpe)
    assert tokens[:256] == BYTES
    for rank, token in enumerate(tokens[256:], 256):
        earlier = set(tokens[:rank])
        assert any(token[:i] in earlier and token[i:] in earlier for i in range(1, len(token))), token


def test_smaller_vocabulary_is_a_prefix_of_a_larger_one(bpe: tiktoken.Encoding) -> None:
    assert tokens_of(train_bpe(random_stories(150), 300)) == tokens_of(bpe)[:299]


def test_trained_vocabulary_compresses(bpe: tiktoken.Encoding) -> None:
    text = "\n".join(random_stories(10, seed=9))
    assert len(bpe.encode_ordinary(text)) < len(text.encode()) / 2


def test_tokens_do_not_span_words() -> None:
    tokenizer = train_bpe(["of the cat of the cat"] * 100, 262)
    assert all(b" " not in token[1:] for token in tokens_of(tokenizer))


def test_training_is_deterministic_and_accepts_an_iterator() -> None:
    stories = random_stories(100, seed=3) + random_texts(100, seed=3)
    assert tokens_of(train_bpe(stories, 400)) == tokens_of(train_bpe(iter(stories), 400))


def print_vocabulary_hash() -> None:
    print(tokenizer_hash(train_bpe(random_stories(100, seed=4), 400)))


def test_training_does_not_depend_on_the_process_or_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")  # the threads of `tokenizers`
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    printed = run_in_subprocess(print_vocabulary_hash, cwd=tmp_path, timeout=100)
    assert printed.strip() == tokenizer_hash(train_bpe(random_stories(100, seed=4), 400))


@pytest.mark.parametrize("stories", [[], [""], ["a"], ["ab " * 50]])
def test_too_few_stories_give_a_smaller_vocabulary_and_a_warning(stories: list[str]) -> None:
    with pytest.warns(UserWarning, match="1000") as caught:
        tokenizer = train_bpe(stories, 1000)
    assert len(caught) == 1
    assert str(tokenizer.n_vocab) in str(caught[0].message)
    assert 257 <= tokenizer.n_vocab < 300
    assert_lossless(tokenizer, "Zoë 😀")


def test_error_in_the_stories_is_raised() -> None:
    def stories() -> Iterator[str]:
        yield "a story"
        raise StoryLLMError("line 7 is not UTF-8")

    with pytest.raises(StoryLLMError, match="line 7"):
        train_bpe(stories(), 300)


@pytest.mark.parametrize("nth_story", [0, 1_000])
def test_training_can_be_interrupted(nth_story: int) -> None:
    read = 0

    def stories() -> Iterator[str]:
        nonlocal read
        for read in range(3_000_000):
            if read == nth_story:
                os.kill(os.getpid(), signal.SIGINT)
            yield "a story"

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored in a background job
    try:
        with pytest.raises(KeyboardInterrupt):
            train_bpe(stories(), 300)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert read < 2_900_000


# Agreement with `tokenizers`, which encodes by merges where tiktoken encodes by ranks.


def tokenizers_library(stories: list[str], vocab_size: int) -> Callable[[str], list[bytes]]:
    """A function from a text to the bytes of its tokens, by a tokenizer that the library trains and runs itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(stories, trainer)

    # The library's character for each byte, according to the library. Every byte of UTF-8 occurs in one of these.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte_of: dict[str, int] = {}
    for code in [*range(0x800), *range(0x800, 0x10000, 0x40), *range(0x10000, 0x110000, 0x1000)]:
        if not 0xD800 <= code < 0xE000:
            ((characters, _),) = byte_level.pre_tokenize_str(chr(code))
            byte_of.update(zip(characters, chr(code).encode(), strict=True))
    return lambda text: [bytes(byte_of[c] for c in token) for token in bpe.encode(text).tokens]


def assert_agreement(tokenizer: tiktoken.Encoding, library: Callable[[str], list[bytes]], texts: list[str]) -> None:
    for text in texts:
        assert tokenizer.decode_tokens_bytes(tokenizer.encode_ordinary(text)) == library(text), repr(text)


def test_agreement_with_the_tokenizers_library(bpe: tiktoken.Encoding) -> None:
    library = tokenizers_library(random_stories(150), 400)
    assert_agreement(bpe, library, random_stories(60, seed=77) + DIFFICULT_TEXTS + random_texts(300, seed=2))


def test_agreement_with_the_tokenizers_library_on_repetitions() -> None:
    """Merges that overlap themselves are where the two algorithms could differ."""
    stories = ["aaaa aaaaaaa hahaha hahahahaha nooooo noooooooooo!!!!!!!!", "oh ooooh ohohohoh ......... -------"] * 30
    words = [unit * number for unit in ("a", "ha", "o", "oh", "!", ".", "-", "aha") for number in range(1, 30)]
    assert_agreement(train_bpe(stories, 290), tokenizers_library(stories, 290), words)


def test_agreement_with_the_tokenizers_library_on_real_stories(sample_stories: Path) -> None:
    data = DataConfig(source=str(sample_stories))
    train, validation = (list(islice(read_stories(data, split), 400)) for split in ("train", "validation"))
    tokenizer = train_bpe(train, 2_000)
    assert tokenizer.n_vocab == 2_000
    assert_agreement(tokenizer, tokenizers_library(train, 2_000), validation)


# Dictionaries


def test_dictionary_round_trip(tokenizer: tiktoken.Encoding) -> None:
    copy = tokenizer_from_dict(json.loads(json.dumps(tokenizer_to_dict(tokenizer))))
    assert (copy.name, copy.n_vocab, copy.eot_token) == (tokenizer.name, tokenizer.n_vocab, tokenizer.eot_token)
    assert tokenizer_to_dict(copy) == tokenizer_to_dict(tokenizer)
    assert tokenizer_hash(copy) == tokenizer_hash(tokenizer)
    for text in DIFFICULT_TEXTS + random_texts(300, seed=5) + random_stories(20, seed=5):
        assert copy.encode_ordinary(text) == tokenizer.encode_ordinary(text), repr(text)


def test_hash_identifies_the_tokens_in_order(bpe: tiktoken.Encoding) -> None:
    tokens = tokens_of(bpe)
    others = [tokens[:-1], [*tokens[:-2], tokens[-1], tokens[-2]], [*tokens[:-1], b"other"]]
    hashes = [tokenizer_hash(tokenizer_from_dict(vocabulary(other))) for other in (tokens, *others)]
    assert len(set(hashes)) == 4
    assert hashes[0] == tokenizer_hash(bpe)  # although the name differs


@pytest.mark.parametrize(
    "values",
    [
        *(None, [], "gpt2", {}, {"name": "x"}, {"tokens": vocabulary(BYTES)["tokens"]}),
        *({"name": "x", "tokens": tokens} for tokens in (None, 3, "", "AA==", "not base64!", "é", ["AA=="])),
        vocabulary(BYTES[:-1]),
        vocabulary([*BYTES, b"ab", b"ab"]),
        vocabulary([*BYTES, b""]),
        {"name": "x", "tokens": vocabulary(BYTES)["tokens"].replace(" ", ",")},
        vocabulary([*BYTES, *(f"{i:05}".encode() for i in range(65_536 - 256))]),  # one id too many for 16 bits
    ],
    ids=lambda values: repr(values)[-30:],
)
def test_invalid_dictionary_is_refused(values: Any) -> None:
    with pytest.raises(StoryLLMError) as caught:
        tokenizer_from_dict(values)
    assert "\n" not in str(caught.value)


def test_largest_vocabulary_fits_16_bits() -> None:
    tokenizer = tokenizer_from_dict(vocabulary([*BYTES, *(f"{i:05}".encode() for i in range(65_535 - 256))]))
    assert tokenizer.eot_token == 65_535


# Whitespace that tiktoken cannot encode


@pytest.mark.parametrize("whitespace", [" ", "\n", "\u3000"])
def test_too_much_consecutive_whitespace_is_refused(tokenizer: tiktoken.Encoding, whitespace: str) -> None:
    allowed = ("x" + whitespace * 500_000) * 2
    check_whitespace(allowed, "the prompt")
    assert tokenizer.decode(tokenizer.encode_ordinary(allowed)) == allowed
    with pytest.raises(StoryLLMError, match="the prompt has 500,001"):
        check_whitespace("x" + whitespace * 500_001 + "x", "the prompt")


# GPT-2's vocabulary without network access


def assert_explains_alternatives(message: str) -> None:
    assert "\n" not in message
    assert "TIKTOKEN_CACHE_DIR" in message
    assert "bpe:" in message


@pytest.mark.parametrize("error", [OSError("no route\nto host"), RuntimeError("max retries"), ValueError("x")])
def test_failed_download_of_gpt2_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def get_encoding(name: str) -> tiktoken.Encoding:
        assert name == "gpt2"
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(StoryLLMError) as caught:
        gpt2_tokenizer()
    assert_explains_alternatives(str(caught.value))


def print_gpt2_error() -> None:
    try:
        gpt2_tokenizer()
    except StoryLLMError as error:
        print(error)


def test_gpt2_without_cache_or_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens on this port
    assert_explains_alternatives(run_in_subprocess(print_gpt2_error, cwd=tmp_path, timeout=100).rstrip("\n"))
