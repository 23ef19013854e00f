"""Text survives both vocabularies, whatever it holds; a trained one is what `tokenizers` itself would give."""

from __future__ import annotations

import base64
import random
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from conftest import synthetic_stories

from storyllm.config import StoryLLMError
from storyllm.tokenizer import (
    END_OF_TEXT,
    GPT2_SPLIT,
    gpt2_tokenizer,
    tokenizer_from_dict,
    tokenizer_hash,
    tokenizer_to_dict,
    train_bpe,
)

NASTY = [
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
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 50,
    " " * 5_000 + "x" + "\n" * 5_000,
    "!?" * 3_000,
    "Zoë" * 2_000,
]


def random_text(rng: random.Random) -> str:
    """Up to 60 code points: of all of Unicode, of the odd ones, or of plain letters."""
    odd = " \n\r\t\0\x1c\x85\u00a0'.,!19aeéß\u0301\u200d\u202e\ufeff\u3000אب😀"

    def character() -> str:
        kind = rng.random()
        if kind < 0.35:
            return rng.choice(odd)
        code = rng.randrange(0x110000) if kind < 0.6 else rng.randrange(0x250)
        return chr(code) if not 0xD800 <= code < 0xE000 else "?"

    return "".join(character() for _ in range(rng.randrange(60)))


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [random_text(rng) for _ in range(count)]


@pytest.fixture(scope="module")
def bpe() -> tiktoken.Encoding:
    return train_bpe(synthetic_stories(150), 400)


@pytest.fixture
def gpt2(gpt2_cache: Path) -> tiktoken.Encoding:
    return gpt2_tokenizer()


@pytest.fixture(params=["bpe", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> tiktoken.Encoding:
    return request.getfixturevalue(request.param)


def tokens_of(tokenizer: tiktoken.Encoding) -> list[bytes]:
    return [tokenizer.decode_single_token_bytes(rank) for rank in range(tokenizer.eot_token)]


# Text <-> ids


def test_any_text_comes_back(tokenizer: tiktoken.Encoding) -> None:
    for text in NASTY + random_texts(600):
        ids = tokenizer.encode_ordinary(text)
        assert tokenizer.decode_bytes(ids) == text.encode(), repr(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.eot_token for token in ids)


def test_the_random_texts_hold_what_is_difficult() -> None:
    text = "".join(random_texts(600))
    assert {"\0", "\r", "😀", "\u202e"} <= set(text)
    assert any(unicodedata.combining(c) for c in text)
    assert any(ord(c) > 0xFFFF for c in text)
    assert any(unicodedata.bidirectional(c) in ("R", "AL") for c in text)


def test_the_end_of_text_mark_in_a_story_is_ordinary_text(tokenizer: tiktoken.Encoding) -> None:
    for text in (END_OF_TEXT, f"a {END_OF_TEXT} b", f"{END_OF_TEXT}\n" * 5):
        (ids,) = tokenizer.encode_ordinary_batch([text])
        assert tokenizer.eot_token not in ids
        assert tokenizer.decode(ids) == text


def test_the_end_of_text_token_is_the_last_id(tokenizer: tiktoken.Encoding) -> None:
    assert tokenizer.eot_token == tokenizer.n_vocab - 1
    assert tokenizer.decode([tokenizer.eot_token]) == END_OF_TEXT
    assert len(set(tokens_of(tokenizer))) == tokenizer.n_vocab - 1
    assert tokenizer.eot_token < 2**16


def test_gpt2_is_gpt2s(gpt2: tiktoken.Encoding) -> None:
    assert gpt2.n_vocab == 50257
    assert gpt2.eot_token == 50256
    # Ids that GPT-2's own encoder gives.
    assert gpt2.encode_ordinary("Hello world") == [15496, 995]
    assert gpt2.encode_ordinary("Once upon a time") == [7454, 2402, 257, 640]


def test_our_rule_for_words_is_gpt2s(gpt2: tiktoken.Encoding) -> None:
    ours = tokenizer_from_dict(tokenizer_to_dict(gpt2))
    assert ours._pat_str == GPT2_SPLIT
    for text in NASTY + random_texts(600, seed=1):
        assert ours.encode_ordinary(text) == gpt2.encode_ordinary(text), repr(text)


# Training


@pytest.mark.parametrize("size", [257, 258, 300, 400])
def test_the_vocabulary_has_exactly_the_size_asked_for(size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = train_bpe(synthetic_stories(100), size)
    assert tokenizer.n_vocab == size
    assert tokenizer.eot_token == size - 1
    assert tokenizer.name == f"bpe:{size}"


def test_the_first_tokens_are_the_bytes_and_every_other_joins_two_before_it(bpe: tiktoken.Encoding) -> None:
    tokens = tokens_of(bpe)
    assert tokens[:256] == [bytes([byte]) for byte in range(256)]
    for rank in range(256, len(tokens)):
        before = set(tokens[:rank])
        token = tokens[rank]
        assert any(token[:cut] in before and token[cut:] in before for cut in range(1, len(token))), token


def test_a_smaller_vocabulary_is_the_beginning_of_a_larger_one(bpe: tiktoken.Encoding) -> None:
    assert tokens_of(train_bpe(synthetic_stories(150), 300)) == tokens_of(bpe)[:299]


def test_learning_shortens_the_text(bpe: tiktoken.Encoding) -> None:
    text = "\n".join(synthetic_stories(10, seed=9))
    assert len(bpe.encode_ordinary(text)) < len(text.encode()) / 2


def test_tokens_never_join_words() -> None:
    tokenizer = train_bpe(["of the cat of the cat"] * 100, 257 + 5)
    assert all(b" " not in token[1:] for token in tokens_of(tokenizer))


def test_training_twice_gives_the_same() -> None:
    stories = synthetic_stories(100, seed=3) + random_texts(100, seed=3)
    one, two = train_bpe(stories, 400), train_bpe(iter(stories), 400)
    assert tokens_of(one) == tokens_of(two)
    assert tokenizer_hash(one) == tokenizer_hash(two)


def test_training_in_another_process_with_one_thread_gives_the_same() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import types; package = types.ModuleType('storyllm'); package.__path__ = [sys.argv[1] + '/storyllm']\n"
        "sys.modules['storyllm'] = package\n"  # the module alone: what the package imports besides takes seconds
        "from conftest import synthetic_stories\n"
        "from storyllm.tokenizer import train_bpe, tokenizer_hash\n"
        "print(tokenizer_hash(train_bpe(synthetic_stories(100, seed=4), 400)))"
    )
    here = Path(__file__).resolve().parent
    environment = {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1", "PATH": ""}
    command = [sys.executable, "-c", code, str(here.parent), str(here)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == tokenizer_hash(train_bpe(synthetic_stories(100, seed=4), 400))


@pytest.mark.parametrize("stories", [[], [""], ["a"], ["ab " * 50]])
def test_a_corpus_too_small_for_the_size_warns_and_works(stories: list[str]) -> None:
    with pytest.warns(UserWarning, match="1000") as caught:
        tokenizer = train_bpe(stories, 1000)
    assert len(caught) == 1
    assert str(tokenizer.n_vocab) in str(caught[0].message)
    assert 257 <= tokenizer.n_vocab < 300
    assert tokenizer.eot_token == tokenizer.n_vocab - 1
    assert tokenizer.decode(tokenizer.encode_ordinary("Zoë 😀")) == "Zoë 😀"


def test_the_stories_are_streamed_into_training() -> None:
    """Training takes an iterator that can be gone through only once."""
    assert train_bpe((story for story in synthetic_stories(50)), 300).n_vocab == 300


def test_what_goes_wrong_in_the_stories_comes_through() -> None:
    def stories() -> Iterator[str]:
        yield "a story"
        raise StoryLLMError("page 7 is torn out")

    with pytest.raises(StoryLLMError, match="page 7 is torn out"):
        train_bpe(stories(), 300)


# The oracle: the `tokenizers` library encodes with the merges themselves, tiktoken with the ranks of their results.


def libraries_own(stories: list[str], size: int) -> Callable[[str], list[bytes]]:
    """Text -> the bytes of its tokens, by a tokenizer that the library trains and runs itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(stories, trainer)

    # One byte of UTF-8 has one character in the library's alphabet: asked of the library, not of our table.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte_of: dict[str, int] = {}
    for code in [*range(0x800), *range(0x800, 0x10000, 0x40), *range(0x10000, 0x110000, 0x1000)]:
        if not 0xD800 <= code < 0xE000:
            ((written, _),) = byte_level.pre_tokenize_str(chr(code))
            byte_of.update(zip(written, chr(code).encode(), strict=True))
    return lambda text: [bytes(byte_of[c] for c in token) for token in learner.encode(text).tokens]


def assert_agreement(tokenizer: tiktoken.Encoding, own: Callable[[str], list[bytes]], texts: list[str]) -> None:
    for text in texts:
        assert tokenizer.decode_tokens_bytes(tokenizer.encode_ordinary(text)) == own(text), repr(text)


def test_agrees_with_the_tokenizers_library(bpe: tiktoken.Encoding) -> None:
    own = libraries_own(synthetic_stories(150), 400)
    held_out = synthetic_stories(60, seed=77)
    assert_agreement(bpe, own, held_out + NASTY + random_texts(300, seed=2))


def test_agrees_with_the_tokenizers_library_on_repetitions() -> None:
    """Where merges overlap with themselves the two ways to encode could part."""
    stories = ["aaaa aaaaaaa hahaha hahahahaha nooooo noooooooooo!!!!!!!!", "oh ooooh ohohohoh ......... -------"] * 30
    tokenizer, own = train_bpe(stories, 290), libraries_own(stories, 290)
    words = [unit * count for unit in ("a", "ha", "o", "oh", "!", ".", "-", "aha") for count in range(1, 30)]
    assert_agreement(tokenizer, own, words)


def test_agrees_with_the_tokenizers_library_on_real_stories(sample_stories: Path) -> None:
    from storyllm.config import DataConfig
    from storyllm.stories import read_stories

    data = DataConfig(source=str(sample_stories))
    train = [story for story, _ in zip(read_stories(data, "train"), range(400), strict=False)]
    held_out = [story for story, _ in zip(read_stories(data, "validation"), range(150), strict=False)]
    tokenizer = train_bpe(train, 2_000)
    assert tokenizer.n_vocab == 2_000
    assert_agreement(tokenizer, libraries_own(train, 2_000), held_out)


# Kept in a file


def test_a_dictionary_gives_the_same_tokenizer_back(tokenizer: tiktoken.Encoding) -> None:
    import json

    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer_to_dict(tokenizer))))
    assert again.name == tokenizer.name
    assert (again.n_vocab, again.eot_token) == (tokenizer.n_vocab, tokenizer.eot_token)
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    assert tokenizer_to_dict(again) == tokenizer_to_dict(tokenizer)
    for text in NASTY + random_texts(100, seed=5) + synthetic_stories(20, seed=5):
        assert again.encode_ordinary(text) == tokenizer.encode_ordinary(text)


def test_the_hash_tells_vocabularies_apart(bpe: tiktoken.Encoding) -> None:
    shorter = train_bpe(synthetic_stories(150), 399)
    other = train_bpe(random_texts(400), 400)
    tokens = tokens_of(bpe)
    swapped = tokenizer_from_dict(as_dict([*tokens[:-2], tokens[-1], tokens[-2]]))
    assert len({tokenizer_hash(t) for t in (bpe, shorter, other, swapped)}) == 4


def test_the_hash_is_of_the_ids_not_of_the_name(bpe: tiktoken.Encoding) -> None:
    renamed = tokenizer_from_dict({**tokenizer_to_dict(bpe), "name": "another"})
    assert tokenizer_hash(renamed) == tokenizer_hash(bpe)


def as_dict(tokens: list[bytes]) -> dict[str, Any]:
    return {"name": "made by hand", "tokens": " ".join(base64.b64encode(token).decode() for token in tokens)}


BYTES = [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize(
    "values",
    [
        *(None, [], "gpt2", {}, {"name": "x"}, {"tokens": as_dict(BYTES)["tokens"]}),
        *({"name": "x", "tokens": tokens} for tokens in (None, 3, "", "AA==", "not base64!", "é", ["AA=="])),
        as_dict(BYTES[:-1]),  # a byte too few
        as_dict([*BYTES, b"ab", b"ab"]),  # a token twice
        as_dict([*BYTES, b""]),  # a token of nothing
        {"name": "x", "tokens": as_dict(BYTES)["tokens"].replace(" ", ",")},
        as_dict([*BYTES, *(f"{i:05}".encode() for i in range(65_536 - 256))]),  # one id too many for 16 bits
    ],
    ids=str,
)
def test_what_is_not_a_vocabulary_is_refused(values: Any) -> None:
    with pytest.raises(StoryLLMError) as caught:
        tokenizer_from_dict(values)
    assert "\n" not in str(caught.value)


def test_the_largest_vocabulary_fits_16_bits() -> None:
    tokenizer = tokenizer_from_dict(as_dict([*BYTES, *(f"{i:05}".encode() for i in range(65_535 - 256))]))
    assert tokenizer.eot_token == 65_535


# GPT-2's vocabulary where it cannot be had


def one_line_with_the_ways_out(message: str) -> None:
    assert "\n" not in message
    assert "TIKTOKEN_CACHE_DIR" in message
    assert "bpe:" in message


@pytest.mark.parametrize(
    "error", [OSError("no route\nto host"), RuntimeError("requests: max retries"), ValueError("x")]
)
def test_gpt2_without_a_network_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def get_encoding(name: str) -> tiktoken.Encoding:
        assert name == "gpt2"
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(StoryLLMError) as caught:
        gpt2_tokenizer()
    one_line_with_the_ways_out(str(caught.value))


def test_gpt2_really_asked_for_without_a_cache(tmp_path: Path) -> None:
    """tiktoken itself tries: an empty cache, and a proxy that is not there in the network's place."""
    code = (
        "import sys, types; package = types.ModuleType('storyllm'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['storyllm'] = package\n"
        "from storyllm.tokenizer import gpt2_tokenizer\n"
        "from storyllm.config import StoryLLMError\n"
        "try: gpt2_tokenizer()\n"
        "except StoryLLMError as error: print(error)"
    )
    nowhere = "http://127.0.0.1:9"
    environment = {"TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": nowhere, "HTTP_PROXY": nowhere, "PATH": ""}
    package = Path(sys.modules["storyllm"].__path__[0])
    command = [sys.executable, "-c", code, str(package)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr
    one_line_with_the_ways_out(ended.stdout.rstrip("\n"))
