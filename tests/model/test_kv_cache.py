"""The KV cache: logits with a cache equal those without."""

from __future__ import annotations

import pytest
import torch
from helpers import TINY

from storyllm import StoryLLMError
from storyllm.model.kv_cache import KVCache, StaticKVCache

CONTEXT = TINY.model.block_size

both_attentions = pytest.mark.parametrize("flash_attention", [True, False])


def make_cache(batch_size: int = 3) -> KVCache:
    return KVCache(TINY.model, batch_size, torch.device("cpu"), torch.float32)


@both_attentions
@pytest.mark.parametrize("pieces", [[16], [1] * 16, [5, 1, 1, 4, 5], [10, 6]])
def test_cached_logits_equal_uncached(make_model, random_ids, flash_attention, pieces):
    model, cache = make_model(flash_attention=flash_attention), make_cache()
    cached = [model.lm_head(model.hidden(piece, cache)) for piece in random_ids().split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(cached, dim=1), model(random_ids())[0], atol=1e-5, rtol=1e-5)
    assert cache.length == CONTEXT


def test_next_logits_are_those_of_the_last_position(make_model, random_ids):
    model, cache, idx = make_model(), make_cache(), random_ids(3, 9)
    expected = model(idx)[0]
    torch.testing.assert_close(model.next_logits(idx), expected[:, -1])
    torch.testing.assert_close(model.next_logits(idx[:, :5], cache), expected[:, 4], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.next_logits(idx[:, 5:], cache), expected[:, -1], atol=1e-5, rtol=1e-5)


def test_cached_and_new_tokens_together_may_not_exceed_the_context(make_model, random_ids):
    model, cache = make_model(), make_cache()
    model.hidden(random_ids(3, 10), cache)
    with pytest.raises(StoryLLMError, match=rf"{CONTEXT + 1} .*{CONTEXT}"):
        model.hidden(random_ids(3, 7), cache)


@torch.inference_mode()
@both_attentions
def test_static_cache_gives_the_same_logits_however_often_a_step_is_repeated(make_model, random_ids, flash_attention):
    """A CUDA graph's steps on a CPU: constant shapes, and warm-up repeats each step."""
    model, idx = make_model(flash_attention=flash_attention), random_ids()
    cache = make_cache()
    model.next_logits(idx[:, :5], cache)
    static = StaticKVCache(cache)
    for position in range(5, CONTEXT):
        static.position.fill_(position)
        for _ in range(3):
            logits = model.next_logits(idx[:, position : position + 1], static)
        torch.testing.assert_close(logits, model.next_logits(idx[:, : position + 1]), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_static_cache_keeps_its_shapes_and_memory(make_model, random_ids):
    model, cache = make_model(), make_cache()
    model.next_logits(random_ids(3, 4), cache)
    static = StaticKVCache(cache)
    k = v = torch.ones(3, TINY.model.n_head, 1, TINY.model.n_embd // TINY.model.n_head)
    before = static.append(0, k, v)
    static.position.fill_(12)
    after = static.append(0, k, v)
    assert [t.data_ptr() for t in before] == [t.data_ptr() for t in after]
    assert {t.size(2) for t in (*before, *after)} == {CONTEXT}
    assert static.mask(1).tolist() == [[position <= 12 for position in range(CONTEXT)]]
