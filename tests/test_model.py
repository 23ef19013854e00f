"""The model against its specification, against GPT-2 itself, and against the slow way of doing the same."""

import math

import pytest
import torch

from storyllm import GPT, RECIPES, GPTConfig, StoryLLMError
from storyllm import model as model_module
from storyllm.model import KVCache

TINY = GPTConfig(vocab_size=97, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0)


def make(config=TINY, seed=0, **changes):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**vars(config), **changes})).eval()
    # Fresh biases and layer norms are zeros and ones, which would hide a forgotten one.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def ids(batch=3, length=16, vocab_size=97, seed=1):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_the_specifications_model_has_its_parameters():
    model = GPT(RECIPES["faithful"].model)
    assert model.num_parameters() == 29_995_392
    assert model.num_parameters(count_tied_head=True) == 49_294_080


def test_names_in_the_state_dict_are_gpt2s():
    names = set(make().state_dict())
    block = ["ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight"]
    block += ["attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight"]
    block += ["mlp.c_proj.bias"]
    expected = {f"transformer.h.{layer}.{name}" for layer in range(2) for name in block}
    expected |= {f"transformer.{name}" for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")}
    assert names == expected | {"lm_head.weight"}


def test_without_bias_there_is_none():
    assert not [name for name, _ in make(bias=False).named_parameters() if "bias" in name]


def test_the_head_is_the_token_embedding():
    model = make()
    assert model.lm_head.weight is model.transformer["wte"].weight
    model.load_state_dict(make(seed=5).state_dict())
    assert model.lm_head.weight is model.transformer["wte"].weight


def test_initialisation_scales_the_residual_projections():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=1000, n_layer=8, n_head=4, n_embd=256))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name


def test_initial_loss_is_that_of_guessing():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=5000, n_layer=4, n_head=4, n_embd=128)).eval()
    _, loss = model(ids(4, 64, 5000), ids(4, 64, 5000, seed=2))
    assert loss.item() == pytest.approx(math.log(5000), abs=0.1)


def test_shapes_and_loss():
    model = make()
    logits, loss = model(ids())
    assert logits.shape == (3, 16, 97)
    assert loss is None
    targets = ids(seed=2)
    logits, loss = model(ids(), targets)
    by_hand = -torch.stack([logits[b, t].log_softmax(-1)[targets[b, t]] for b in range(3) for t in range(16)]).mean()
    torch.testing.assert_close(loss, by_hand)


@pytest.mark.parametrize("flash_attention", [True, False])
def test_a_later_token_never_changes_an_earlier_logit(flash_attention):
    model = make(flash_attention=flash_attention)
    before = ids()
    for position in (1, 7, 15):
        after = before.clone()
        after[:, position] = (after[:, position] + 1) % 97
        changed = (model(before)[0] - model(after)[0]).abs().amax(-1) > 0  # (B, T)
        assert not changed[:, :position].any()
        assert changed[:, position:].all()


def test_flash_and_plain_attention_agree():
    plain, flash = make(flash_attention=False), make(flash_attention=True)
    torch.testing.assert_close(plain(ids())[0], flash(ids())[0], atol=1e-5, rtol=1e-5)
    for model in (plain, flash):
        model.loss(ids(), ids(seed=2)).backward()
    for one, other in zip(plain.parameters(), flash.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("flash_attention", [True, False])
def test_dropout_acts_on_attention_weights_in_training_only(flash_attention):
    model = make(dropout=0.5, flash_attention=flash_attention)
    torch.testing.assert_close(model(ids())[0], model(ids())[0], atol=0, rtol=0)
    model.train()
    attention = model.transformer["h"][0].attn
    q, k, v = torch.randn(3, 2, 2, 16, 16)
    assert not torch.equal(attention.attend(q, k, v), attention.attend(q, k, v))
    for dropout in (model.transformer["drop"], attention.resid_dropout, model.transformer["h"][0].mlp.dropout):
        assert (dropout(torch.ones(1000)) == 0).float().mean().item() == pytest.approx(0.5, abs=0.08)


def test_the_loss_alone_equals_the_loss_of_all_logits():
    whole, alone = make(), make()
    _, loss = whole(ids(), ids(seed=2))
    loss.backward()
    assert torch.allclose(alone.loss(ids(), ids(seed=2)), loss, atol=1e-6)
    alone.loss(ids(), ids(seed=2)).backward()
    for one, other in zip(whole.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)


def test_gradient_checkpointing_changes_neither_loss_nor_gradients():
    results = []
    for gradient_checkpointing in (False, True):
        model = make(dropout=0.2, gradient_checkpointing=gradient_checkpointing).train()
        torch.manual_seed(3)
        loss = model.loss(ids(), ids(seed=2))
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_gradient_checkpointing_keeps_less_for_the_backward_pass():
    kept = []
    for gradient_checkpointing in (False, True):
        model = make(n_layer=6, gradient_checkpointing=gradient_checkpointing).train()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            model.hidden(ids())
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


def test_one_batch_can_be_learned_by_heart():
    model = make().train()
    x, y = ids(4), ids(4, seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model.loss(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    assert (model.eval()(x)[0].argmax(-1) == y).all()


@pytest.mark.parametrize("flash_attention", [True, False])
@pytest.mark.parametrize("pieces", [[16], [1] * 16, [5, 1, 1, 4, 5], [10, 6]])
def test_cached_logits_equal_uncached(flash_attention, pieces):
    model = make(flash_attention=flash_attention)
    cache = KVCache(model.config, 3, torch.device("cpu"), torch.float32)
    parts = ids().split(pieces, dim=1)
    cached = torch.cat([model.lm_head(model.hidden(part, cache)) for part in parts], dim=1)
    torch.testing.assert_close(cached, model(ids())[0], atol=1e-5, rtol=1e-5)
    assert cache.length == 16


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 5, "top_p": 0.9}])
def test_generation_with_cache_equals_generation_without_far_beyond_the_context(sampling):
    model, prompt = make(), ids(3, 5)
    told = [
        torch.stack(list(model.stream(prompt, 40, generator=torch.Generator().manual_seed(0), **how, **sampling)))
        for how in ({"use_cache": True}, {"use_cache": False})
    ]
    assert told[0].shape == (40, 3)
    assert torch.equal(*told)


@pytest.mark.parametrize("flash_attention", [True, False])
def test_the_steps_that_a_gpu_captures_give_the_same_logits(monkeypatch, flash_attention):
    """A CUDA GPU's path on the CPU: fixed shapes, a step taken more than once, ids through a buffer."""
    captured = []

    def capture(step, device):
        captured.append(step())
        return step

    monkeypatch.setattr(model_module, "capture", capture)
    monkeypatch.setattr(model_module, "_worth_capturing", lambda device, steps: True)
    model, prompt = make(flash_attention=flash_attention), ids(3, 5)
    fixed, fresh = (
        list(model.stream(prompt, 30, generator=torch.Generator().manual_seed(0), use_cache=use_cache))
        for use_cache in (True, False)
    )
    assert torch.equal(torch.stack(fixed), torch.stack(fresh))
    assert len(captured) == 1
    decoder = model._decoder(prompt, 12)
    with torch.inference_mode():
        for length in range(5, 17):
            expected = model.next_logits(ids(3, 16)[:, :length])
            torch.testing.assert_close(decoder(ids(3, 16)[:, :length]), expected, atol=1e-5, rtol=1e-5)


def test_a_step_is_captured_where_it_pays():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert model_module._worth_capturing(cuda, 112)
    assert not model_module._worth_capturing(cuda, 5)
    assert not model_module._worth_capturing(cpu, 112)


def test_beyond_the_context_the_last_tokens_are_fed_afresh():
    model, idx = make(), ids(2, 5)
    for new in model.stream(idx, 30, temperature=0.0):
        expected = model(idx[:, -16:])[0][:, -1].argmax(-1)
        assert torch.equal(new, expected)
        idx = torch.cat([idx, new[:, None]], dim=1)


def test_generate_returns_the_prompt_and_exactly_so_many_new_ids():
    model = make()
    for length, new in [(1, 0), (1, 1), (5, 30), (16, 3), (40, 2)]:
        out = model.generate(ids(2, length), new, generator=torch.Generator().manual_seed(0))
        assert out.shape == (2, length + new)
        assert torch.equal(out[:, :length], ids(2, length))


def test_generation_leaves_the_models_mode_and_uses_no_dropout():
    model = make(dropout=0.5).train()
    first, second = (model.generate(ids(1, 4), 20, temperature=0.0) for _ in range(2))
    assert torch.equal(first, second)
    assert model.training


def test_bad_input_is_refused_in_one_line():
    model = make()
    with pytest.raises(StoryLLMError, match="17 tokens were given, the context is 16"):
        model(ids(1, 17))
    with pytest.raises(StoryLLMError, match="expected \\(B, T\\)"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 3)
    with pytest.raises(StoryLLMError, match="top_p is 2"):
        model.generate(ids(1, 4), 3, top_p=2.0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_layer": 3, "n_head": 4, "n_embd": 64},
        {"block_size": 32, "n_head": 1, "vocab_size": 131},
        {"flash_attention": False, "n_layer": 1},
    ],
)
def test_logits_agree_with_transformers_gpt2(changes):
    transformers = pytest.importorskip("transformers")
    model = make(**changes)
    config = model.config
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function="gelu",  # the exact one
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ).eval()
    # GPT-2's own linear layers hold their weights as (in, out).
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {name: t.T if name.endswith(transposed) else t for name, t in model.state_dict().items()}
    missing = reference.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert not [name for name in missing.missing_keys if not name.endswith(("attn.bias", "attn.masked_bias"))]
    x = ids(3, config.block_size, config.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], reference(x).logits, atol=1e-4, rtol=0)
