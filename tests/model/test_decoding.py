"""The decoding loop, with and without a cache, within the context and beyond it."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers import TINY

from storyllm import StoryLLMError
from storyllm.model.decoding import capture_graph, decode

CONTEXT = TINY.model.block_size

samplings = pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 5, "top_p": 0.9}]
)


def decoded(model, prompt, new, **options):
    return torch.stack(list(decode(model, prompt, new, generator=torch.Generator().manual_seed(0), **options)))


@samplings
@pytest.mark.parametrize("length", [1, 5, CONTEXT, CONTEXT + 4])
def test_cache_does_not_change_the_tokens_within_and_beyond_the_context(make_model, random_ids, sampling, length):
    model, prompt = make_model(), random_ids(3, length)
    cached = decoded(model, prompt, 40, **sampling)
    assert cached.shape == (40, 3)
    assert torch.equal(cached, decoded(model, prompt, 40, use_cache=False, **sampling))


def test_within_the_context_each_new_token_costs_one_position(make_model, random_ids):
    model, lengths = make_model(), []
    model.transformer["wte"].register_forward_hook(lambda _, arguments, __: lengths.append(arguments[0].size(1)))
    list(decode(model, random_ids(2, 5), 15))
    assert lengths == [5] + [1] * (CONTEXT - 5) + [CONTEXT] * 3


def test_beyond_the_context_the_model_reads_the_last_block_size_tokens(make_model, random_ids):
    model, idx = make_model(), random_ids(2, 5)
    for new in decode(model, idx, 30, temperature=0.0):
        assert torch.equal(new, model(idx[:, -CONTEXT:])[0][:, -1].argmax(-1))
        idx = torch.cat([idx, new[:, None]], dim=1)
    assert idx.size(1) == 35


def test_forced_ids_replace_sampled_ones(make_model, random_ids):
    """A row that is forced to a longer prompt continues as if it had started with it."""
    model, prompt = make_model(), random_ids(2, 8)
    forced = torch.full((5, 2), -1)
    forced[:, 1] = prompt[1, 3:]
    new = decoded(model, prompt[:, :3], 25, temperature=0.0, forced=forced)
    assert torch.equal(new[:, 0], decoded(model, prompt[:1, :3], 25, temperature=0.0)[:, 0])
    assert torch.equal(new[:5, 1], prompt[1, 3:])
    assert torch.equal(new[5:, 1], decoded(model, prompt[1:], 20, temperature=0.0)[:, 0])


def test_long_generations_keep_no_more_ids_than_the_context(make_model, random_ids):
    model, sizes = make_model(), []
    model.transformer["wte"].register_forward_hook(
        lambda _, arguments, __: sizes.append(arguments[0].untyped_storage().nbytes())
    )
    tokens = decode(model, random_ids(2, 5), 10**30)  # any number of tokens may be requested
    for _ in range(CONTEXT + 20):
        next(tokens)
    assert max(sizes) <= 2 * (CONTEXT + 2) * 8


def test_model_is_in_its_own_mode_between_two_tokens(make_model, random_ids):
    model = make_model(dropout=0.5).train()
    tokens = decode(model, random_ids(1, 4), 5)
    next(tokens)
    assert model.training
    tokens.close()
    assert model.training


def test_decoding_computes_no_gradients(make_model, random_ids):
    model = make_model()
    assert not any(new.requires_grad for new in decode(model, random_ids(1, 4), 3))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("shape", "options", "key_words"),
    [
        ((1, 0), {}, r"idx.*\(1, 0\)"),
        ((4,), {}, r"idx.*\(4,\)"),
        ((1, 4), {"top_p": 2.0}, "top_p.*2"),
        ((1, 4), {"temperature": -1.0}, "temperature.*-1"),
    ],
)
def test_invalid_input_is_rejected(make_model, shape, options, key_words):
    with pytest.raises(StoryLLMError, match=key_words):
        next(decode(make_model(), torch.zeros(shape, dtype=torch.long), 3, **options))


class FakeCUDA:
    """Stands in for `torch.cuda`: a graph repeats the step that was captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None) -> None:
        self.replays = 0

        def replay(graph: object) -> None:
            self.replays += 1

        class Stream:
            def __init__(self, *_: object) -> None: ...
            def wait_stream(self, _: object) -> None: ...

        @contextlib.contextmanager
        def graph(*_: object, **__: object):
            if failure is not None:
                raise failure
            yield

        for name, replacement in [
            ("Stream", Stream),
            ("current_stream", Stream),
            ("stream", lambda _: contextlib.nullcontext()),
            ("CUDAGraph", type("CUDAGraph", (), {"replay": replay})),
            ("graph", graph),
        ]:
            monkeypatch.setattr(torch.cuda, name, replacement)


def test_captured_graph_replaces_the_step(monkeypatch):
    cuda, calls = FakeCUDA(monkeypatch), []
    result = torch.zeros(3)

    def step():
        calls.append(1)
        return result

    graph = capture_graph(step, torch.device("cpu"))
    before = len(calls)
    assert before > 1  # warm-up and capture
    assert graph() is graph() is result
    assert (len(calls), cuda.replays) == (before, 2)


def test_failed_capture_warns_and_falls_back_to_the_step(monkeypatch):
    FakeCUDA(monkeypatch, RuntimeError("operation not permitted when stream is capturing\nmore lines"))

    def step():
        return torch.zeros(3)

    with pytest.warns(UserWarning, match="CUDA graph.*operation not permitted"):
        assert capture_graph(step, torch.device("cpu")) is step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@samplings
def test_cuda_graph_does_not_change_the_tokens(make_model, random_ids, sampling):
    model, prompt = make_model(block_size=64).cuda(), random_ids(3, 5).cuda()
    graph, plain = (
        torch.stack(
            list(
                decode(model, prompt, 80, generator=torch.Generator("cuda").manual_seed(0), use_cache=cache, **sampling)
            )
        )
        for cache in (True, False)
    )
    assert torch.equal(graph, plain)
