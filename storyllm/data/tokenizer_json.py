"""A tokenizer as `tokenizer.json`, the format of Hugging Face's `tokenizers`, in both directions."""

from __future__ import annotations

from typing import Any

import tiktoken

from ..config import StoryLLMError, shown
from .formats import END_OF_TEXT
from .tokenizer import byte_of_character, tokenizer_hash, tokenizer_of

GPT2_HASH = "445c95aed02d34f9cebfeeba666b08c9aebb5419c128c1c8e6995ac1a15f28b9"  # `tokenizer_hash` of GPT-2's vocabulary

# The values that a `tokenizer.json` must have to split text as StoryLLM does. None also stands for a missing value.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "normalizer": (None,),
    "pre_tokenizer.type": ("ByteLevel",),
    "pre_tokenizer.add_prefix_space": (False,),
    "pre_tokenizer.use_regex": (True, None),
    "post_processor.type": ("ByteLevel", None),  # changes offsets only
    "model.type": ("BPE",),
    "model.dropout": (None,),
    "model.continuing_subword_prefix": ("", None),
    "model.end_of_word_suffix": ("", None),
    "model.byte_fallback": (False, None),
}


def tokenizer_to_json(tokenizer: tiktoken.Encoding) -> dict[str, Any]:
    """The contents of a `tokenizer.json` that gives the same ids for any text.

    The exception is `<|endoftext|>` in a text, which `tokenizers` reads as the end-of-text token.
    """
    tokens = _token_texts(tokenizer)
    end_of_text = {"id": len(tokens), "content": END_OF_TEXT, "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**end_of_text, **flags}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is a token is that token, as in tiktoken
            "vocab": {**{token: rank for rank, token in enumerate(tokens)}, END_OF_TEXT: len(tokens)},
            "merges": [f"{left} {right}" for left, right in _all_merges(tokens)],
        },
    }


def tokenizer_from_json(values: Any) -> tiktoken.Encoding:
    """The tokenizer in the contents of a `tokenizer.json`: GPT-2's vocabulary, or one written by `tokenizer_to_json`.

    Raises StoryLLMError, naming what was found, for any other tokenizer: its token ids could differ.
    """
    for name, accepted in REQUIRED.items():
        if (found := _value(values, name)) not in accepted:
            raise StoryLLMError(f"its {name} is {shown(found)}, must be {' or '.join(map(repr, accepted))}")
    try:
        model, added = values["model"], values["added_tokens"]
        if (special := [token["content"] for token in added]) != [END_OF_TEXT]:
            raise StoryLLMError(f"its special tokens are {shown(special)}, must be {[END_OF_TEXT]}")
        ids = {**model["vocab"], END_OF_TEXT: added[0]["id"]}
        *tokens, last = sorted(ids, key=ids.__getitem__)
        if sorted(ids.values()) != list(range(len(ids))) or last != END_OF_TEXT:
            raise StoryLLMError(f"its ids are not 0, 1, 2, ... with {END_OF_TEXT!r} as the last one")
        byte_of = byte_of_character()
        encoded = [bytes(byte_of[character] for character in token) for token in tokens]
        tokenizer = tokenizer_of(f"bpe:{len(ids)}", encoded)
        merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise StoryLLMError(f"it is not a byte-level BPE vocabulary ({type(error).__name__})") from error
    if tokenizer_hash(tokenizer) == GPT2_HASH:
        tokenizer.name = "gpt2"
    own_merges = tokenizer.name == "gpt2" and ["".join(merge) for merge in merges] == tokens[256:]
    if not own_merges and not (model.get("ignore_merges") is True and merges == _all_merges(tokens)):
        raise StoryLLMError(f"its {len(merges):,} merges are neither GPT-2's nor those of a StoryLLM export")
    return tokenizer


def _token_texts(tokenizer: tiktoken.Encoding) -> list[str]:
    """Each token but the last in GPT-2's characters for bytes."""
    character_of = {byte: character for character, byte in byte_of_character().items()}
    tokens = [tokenizer.decode_single_token_bytes(rank) for rank in range(tokenizer.eot_token)]
    return ["".join(character_of[byte] for byte in token) for token in tokens]


def _all_merges(tokens: list[str]) -> list[list[str]]:
    """Every split of every token into two tokens, in the order of the tokens.

    tiktoken merges any pair whose concatenation is a token. The merges that a token was learned from are fewer.
    """
    known = set(tokens)
    splits = ([token[:i], token[i:]] for token in tokens for i in range(1, len(token)))
    return [split for split in splits if known.issuperset(split)]


def _value(values: Any, name: str) -> Any:
    """The value of a dotted name in nested dictionaries, None if it is missing."""
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
