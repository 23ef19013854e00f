"""Both vocabularies give the same ids in Hugging Face's `tokenizers`, and come back unchanged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from helpers import random_stories
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from storyllm.data.tokenizer import END_OF_TEXT, gpt2_tokenizer, tokenizer_hash, train_bpe
from storyllm.data.tokenizer_json import GPT2_HASH, tokenizer_from_json, tokenizer_to_json

# Words of few letters have many splits into tokens, and text from all of Unicode has many single bytes.
TEXTS = st.text() | st.text("aeinst 'd\n") | st.text(st.characters(codec="ascii"))


@pytest.fixture(scope="module")
def bpe() -> tiktoken.Encoding:
    return train_bpe([*random_stories(150), "aaa aaaa aaaaaaaa ababab abababab tatata"], 440)


@pytest.fixture(params=["bpe", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> tiktoken.Encoding:
    if request.param == "bpe":
        return request.getfixturevalue("bpe")
    request.getfixturevalue("gpt2_cache")
    return gpt2_tokenizer()


def test_ids_are_the_same_for_any_text(tokenizer):
    other = Tokenizer.from_str(json.dumps(tokenizer_to_json(tokenizer)))

    @settings(max_examples=400, deadline=None, derandomize=True, database=None)
    @given(TEXTS)
    def same(text):
        if END_OF_TEXT not in text:  # there it is the end-of-text token
            assert other.encode(text).ids == tokenizer.encode_ordinary(text)
            assert other.decode(tokenizer.encode_ordinary(text)) == text

    same()
    assert other.encode(END_OF_TEXT).ids == [tokenizer.eot_token]
    other.encode_special_tokens = True  # special tokens are ordinary text
    assert other.encode(END_OF_TEXT).ids == tokenizer.encode_ordinary(END_OF_TEXT)


def test_a_tokenizer_comes_back_unchanged(tokenizer):
    values = tokenizer_to_json(tokenizer)
    back = tokenizer_from_json(values)
    assert tokenizer_hash(back) == tokenizer_hash(tokenizer)
    assert back.name == ("gpt2" if tokenizer.name == "gpt2" else f"bpe:{tokenizer.n_vocab}")
    saved_again = json.loads(Tokenizer.from_str(json.dumps(values)).to_str())
    assert tokenizer_hash(tokenizer_from_json(saved_again)) == tokenizer_hash(tokenizer)


def original_gpt2(cache: Path) -> dict[str, Any]:
    """GPT-2's own tokenizer.json: one merge for each token, in the order in which they were learned."""
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
    lines = (cache / hashlib.sha1(url.encode()).hexdigest()).read_text(encoding="utf-8").splitlines()
    values = tokenizer_to_json(gpt2_tokenizer())
    values["model"] |= {"merges": lines[1:], "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    del values["model"]["ignore_merges"], values["pre_tokenizer"]["use_regex"]
    values["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    return values


def test_gpt2s_own_tokenizer_is_recognized(gpt2_cache):
    values = original_gpt2(gpt2_cache)
    assert len(values["model"]["merges"]) == 50_000
    tokenizer = tokenizer_from_json(values)
    assert tokenizer.name == "gpt2"
    assert tokenizer_hash(tokenizer) == tokenizer_hash(gpt2_tokenizer()) == GPT2_HASH


def test_gpt2s_own_merges_give_the_same_ids(gpt2_cache):
    other, tokenizer = Tokenizer.from_str(json.dumps(original_gpt2(gpt2_cache))), gpt2_tokenizer()

    @settings(max_examples=400, deadline=None, derandomize=True, database=None)
    @given(TEXTS)
    def same(text):
        assert other.encode(text).ids == tokenizer.encode(text, allowed_special={END_OF_TEXT})

    same()
