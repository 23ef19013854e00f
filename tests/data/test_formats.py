"""A file's stories come in bounded pieces with the same token ids, and an invalid file is refused in one line."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
import tiktoken
from helpers import STORY_FORMATS, jsonl_bytes, random_stories, source_of
from hypothesis import given, settings
from hypothesis import strategies as st

from storyllm import DataConfig, StoryLLMError, read_stories
from storyllm.data import formats
from storyllm.data.formats import read_file
from storyllm.data.prepare import encoded_batches
from storyllm.data.stories import read_pieces
from storyllm.data.tokenizer import train_bpe

# Whitespace of every kind, and what GPT-2's pattern treats specially.
PARTS = [
    *(" ", " ", "\n", "\n\n", "   ", "\t", "\x0b", "\x1c", "\x1f", "\x85", "\u00a0", "\u2028", "\u3000"),
    *("a", "cat", "'ll", "'", "12", "!?", "é", "שלום", "日本", "😀", "e\u0301", "x<|endoftext|>"),
    *("â€œ", "Ã\u00a0", "â€‰"),  # mojibake, also of whitespace
]


@pytest.fixture(scope="module")
def tokenizer() -> tiktoken.Encoding:
    """A vocabulary with tokens of several whitespace characters."""
    return train_bpe([" \n \n\n  cat\n\n cat's  \n   12 12  \u00a0\u00a0 \x1c\x1c" * 30, *random_stories(50)], 330)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    # With pieces of the usual size, only a large text would have more than one.
    monkeypatch.setattr(formats, "PIECE_CHARACTERS", 20)
    monkeypatch.setattr(formats, "CUT_CHARACTERS", 10)


def random_text(seed: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choices(PARTS, k=rng.randrange(150)))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("clean", [False, True])
def test_pieces_have_the_token_ids_of_the_story(tmp_path: Path, tokenizer: tiktoken.Encoding, clean: bool) -> None:
    numbers = []

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.integers(0, 2**32).map(random_text), min_size=1, max_size=3))
    def check(stories: list[str]) -> None:
        content = "".join(f"{story}\n<|endoftext|>\n" for story in stories).encode()
        data = DataConfig(source=str(source_of(tmp_path / "txt", ".txt", content)), clean=clean)
        whole = DataConfig(source=str(source_of(tmp_path / "jsonl", ".jsonl", jsonl_bytes(stories))), clean=clean)
        expected = list(read_stories(whole, "train"))
        pieces = list(read_pieces(data, "train"))
        assert list(read_stories(data, "train")) == expected
        encode, end = tokenizer.encode_ordinary, [tokenizer.eot_token]
        ids = [token for text, ends_story in pieces for token in encode(text) + end * ends_story]
        assert ids == [token for story in expected for token in encode(story) + end]
        assert [token for batch in encoded_batches(pieces, tokenizer) for token in batch.ids] == ids
        numbers.append(len(pieces) - len(expected))

    check()
    assert max(numbers) > 5  # otherwise nothing was tested


@pytest.mark.parametrize("newline", [" ", "\n"])
def test_pieces_of_a_text_without_separators_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newline: str
) -> None:
    monkeypatch.setattr(formats, "PIECE_CHARACTERS", 1_000)
    text = newline.join(random_stories(100))
    (tmp_path / "a.txt").write_text(text)
    pieces = list(read_file(tmp_path / "a.txt", "text"))
    assert "".join(piece for piece, _ in pieces) == text
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(piece) for piece, _ in pieces) <= 2_100


def test_a_word_longer_than_a_piece_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PIECE_CHARACTERS", 1_000)
    (tmp_path / "a.txt").write_text("a" * 5_500)
    assert list(read_file(tmp_path / "a.txt", "text")) == [("a" * 5_500, True)]


def test_a_separator_within_a_long_line_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PIECE_CHARACTERS", 20)
    text = "a" * 20 + "<|endoftext|>\nb"
    (tmp_path / "a.txt").write_text(text)
    assert list(read_file(tmp_path / "a.txt", "text")) == [(text, True)]


def read(path: Path) -> list[str]:
    return [text for text, _ in read_file(path, "text")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"id,text\n1,one\n2\n", ["line 3", "1 cells", "2"]),
        ("a.csv", b"id,text\n1,one\n2,two,three\n", ["line 3", "3 cells", "2"]),
        ("a.csv", b'text\n"one\n', ["line 2", "CSV"]),
        ("a.csv", b'text\n"one" two\n', ["line 2", "CSV"]),
        ("a.csv", b"text\none\ncaf\xe9\n", ["line 3", "0xe9"]),
        ("a.json", b'[{"text": "a"}, 3]', ["element 2", "'text'"]),
        ("a.json", b'[{"text": "a"}, {"story": "b"}]', ["element 2", "'text'"]),
        ("a.json", b'[{"text": "a"}', ["JSON array"]),
        ("a.json", b'{"text": "a"}\noops', ["line 2", "'text'"]),
        ("a.json", b'{"data": [{"text": "a"}]}', ["line 1", "'text'"]),
        ("a.json", b"[" * 100_000, ["JSON array"]),
        ("a.jsonl.gz", b"not compressed", ["gzip"]),
        ("a.txt.gz", gzip.compress(b"text" * 1_000, mtime=0)[:-9], ["gzip"]),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:-8] + bytes(8), ["gzip"]),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:10] + b"\xff" * 50, ["gzip"]),
        ("a.txt.gz", gzip.compress(b"one\ncaf\xe9", mtime=0), ["line 2", "0xe9"]),
    ],
)
def test_an_invalid_file_is_refused(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StoryLLMError) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("name", "content", "stories"),
    [
        ("a.csv", b"", []),
        ("a.csv", b"text\n", []),
        ("a.csv", b'text\r\n""\r\n\r\n"a ""b"",\nc"\r\n', ["", 'a "b",\nc']),
        ("a.csv", b"text,n\n,1\nNA,2\n", ["", "NA"]),
        ("a.csv", b"text\n" + b"x" * 200_000, ["x" * 200_000]),  # Python's default limit of a cell is 131,072
        ("a.json", b"", []),
        ("a.json", b" \n[]", []),
        ("a.json", b'\n[\n {"text": "a"},\n\n {"text": "b"}\n]\n', ["a", "b"]),
        ("a.json", b'\n{"text": "a"}\n{"text": "[b"}', ["a", "[b"]),
        ("A.TXT.GZ", gzip.compress(b"a\r\nb", mtime=0), ["a\nb"]),
    ],
)
def test_an_unusual_file_is_read(tmp_path: Path, name: str, content: bytes, stories: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == stories


def test_a_shard_of_llama2_c_is_read(tmp_path: Path) -> None:
    records = [{"story": story, "instruction": {"words": ["a"]}} for story in random_stories(5)]
    (tmp_path / "data00.json").write_text(json.dumps(records))
    assert [text for text, _ in read_file(tmp_path / "data00.json", "story")] == random_stories(5)


@pytest.mark.parametrize("suffix", STORY_FORMATS)
def test_the_suffix_may_be_in_upper_case(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"A{suffix.upper()}"
    path.write_bytes(STORY_FORMATS[suffix](["one", "two"]))
    assert read(path) == ["one", "two"]
