"""The GPT compared with its specification and with the GPT-2 of `transformers`."""

from __future__ import annotations

import math
import re

import pytest
import torch
from helpers import TINY
from torch.utils.flop_counter import FlopCounterMode

from storyllm import GPT, RECIPES, GPTConfig, StoryLLMError
from storyllm.device import flops_per_token

VOCAB_SIZE, CONTEXT = TINY.model.vocab_size, TINY.model.block_size

both_attentions = pytest.mark.parametrize("flash_attention", [True, False])


@pytest.mark.parametrize(
    ("recipe", "parameters", "with_head"),
    [("faithful", 29_995_392, 49_294_080), ("gpt2-small", 124_439_808, 163_037_184)],
)
def test_number_of_parameters(recipe, parameters, with_head):
    with torch.device("meta"):
        model = GPT(RECIPES[recipe].model)
    assert model.num_parameters() == parameters
    assert model.num_parameters(count_tied_head=True) == with_head


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_has_the_names_of_gpt2(make_model, bias):
    modules = [f"h.{layer}.{name}" for layer in (0, 1) for name in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj")]
    modules += [f"h.{layer}.mlp.{name}" for layer in (0, 1) for name in ("c_fc", "c_proj")] + ["ln_f"]
    expected = {f"transformer.{name}.weight" for name in [*modules, "wte", "wpe"]} | {"lm_head.weight"}
    if bias:
        expected |= {f"transformer.{name}.bias" for name in modules}
    assert set(make_model(bias=bias).state_dict()) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_layer": 3, "n_head": 4, "n_embd": 64},
        {"block_size": 32, "n_head": 1, "vocab_size": 331},
        {"flash_attention": False, "n_layer": 1},
        {"activation": "gelu_tanh"},
    ],
)
def test_logits_equal_those_of_transformers_gpt2(make_model, random_ids, changes):
    transformers = pytest.importorskip("transformers")
    model = make_model(**changes)
    config = model.config
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function={"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.activation],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ).eval()
    # GPT-2's own linear layers store their weights as (in, out).
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    reference.load_state_dict({n: t.T if n.endswith(transposed) else t for n, t in model.state_dict().items()})
    idx = random_ids(3, config.block_size)
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], reference(idx).logits, atol=1e-5, rtol=0)  # sees the kind of GELU


def test_head_and_token_embedding_share_one_parameter(make_model):
    model = make_model()
    assert model.lm_head.weight is model.transformer["wte"].weight
    model.load_state_dict(make_model(seed=5).state_dict())
    assert model.lm_head.weight is model.transformer["wte"].weight


def test_initial_loss_is_that_of_a_uniform_guess(random_ids):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=5000, n_layer=4, n_head=4, n_embd=128)).eval()
    _, loss = model(random_ids(4, 64), random_ids(4, 64, seed=1))
    assert loss.item() == pytest.approx(math.log(5000), abs=0.1)


def test_loss_is_the_mean_negative_log_probability_of_the_targets(make_model, random_ids):
    model, idx, targets = make_model(), random_ids(), random_ids(seed=1)
    logits, loss = model(idx)
    assert logits.shape == (3, CONTEXT, VOCAB_SIZE) and loss is None
    logits, loss = model(idx, targets)
    log_probs = [logits[b, t].log_softmax(-1)[targets[b, t]] for b in range(3) for t in range(CONTEXT)]
    torch.testing.assert_close(loss, -torch.stack(log_probs).mean())


def test_loss_method_equals_the_loss_of_forward(make_model, random_ids):
    idx, targets = random_ids(), random_ids(seed=1)
    forward, method = make_model(), make_model()
    losses = [forward(idx, targets)[1], method.loss(idx, targets)]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=0)
    for loss in losses:
        loss.backward()
    for p, q in zip(forward.parameters(), method.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


@both_attentions
def test_a_token_changes_no_earlier_logits(make_model, random_ids, flash_attention):
    model, before = make_model(flash_attention=flash_attention), random_ids()
    for position in (1, 7, CONTEXT - 1):
        after = before.clone()
        after[:, position] = (after[:, position] + 1) % VOCAB_SIZE
        changed = (model(before)[0] - model(after)[0]).abs().amax(-1) > 0  # (B, T)
        assert not changed[:, :position].any()
        assert changed[:, position:].all()


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (1, 2, 2, 8), (2, 3, 8, 16), (1, 2, 16, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_flash_and_plain_attention_agree(make_model, shape, masked):
    torch.manual_seed(1)
    q, k, v = torch.randn(3, *shape)
    T = shape[2]
    mask = torch.rand(T, T) < 0.5 if masked else None
    if masked:
        mask.fill_diagonal_(True)  # a row without visible keys is undefined
    outputs = [
        make_model(flash_attention=flash).transformer["h"][0].attn.attend(q, k, v, mask) for flash in (True, False)
    ]
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-5)
    if not masked:  # causal: the first token sees only itself
        torch.testing.assert_close(outputs[0][:, :, 0], v[:, :, 0])


def test_models_with_flash_and_plain_attention_have_equal_logits_and_gradients(make_model, random_ids):
    plain, flash = make_model(flash_attention=False), make_model(flash_attention=True)
    torch.testing.assert_close(plain(random_ids())[0], flash(random_ids())[0], atol=1e-5, rtol=1e-5)
    for model in (plain, flash):
        model.loss(random_ids(), random_ids(seed=1)).backward()
    for p, q in zip(plain.parameters(), flash.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)


@both_attentions
def test_dropout_is_active_in_training_mode_only(make_model, random_ids, flash_attention):
    model = make_model(dropout=0.5, flash_attention=flash_attention)
    assert torch.equal(model(random_ids())[0], model(random_ids())[0])
    model.train()
    block = model.transformer["h"][0]
    q, k, v = torch.randn(3, 2, 2, 16, 16)
    assert not torch.equal(block.attn.attend(q, k, v), block.attn.attend(q, k, v))
    for dropout in (model.transformer["drop"], block.attn.resid_dropout, block.mlp.dropout):
        assert (dropout(torch.ones(1000)) == 0).float().mean().item() == pytest.approx(0.5, abs=0.08)


def test_gradient_checkpointing_changes_neither_loss_nor_gradients(make_model, random_ids):
    results = []
    for gradient_checkpointing in (False, True):
        model = make_model(dropout=0.2, gradient_checkpointing=gradient_checkpointing).train()
        torch.manual_seed(3)
        loss = model.loss(random_ids(), random_ids(seed=1))
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_checkpointing_saves_fewer_activations(make_model, random_ids):
    saved = []
    for gradient_checkpointing in (False, True):
        model = make_model(n_layer=6, gradient_checkpointing=gradient_checkpointing).train()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            model.hidden(random_ids())
        saved.append(sum(sizes))
    assert saved[1] < saved[0] / 3


def test_model_can_memorize_one_batch(make_model, random_ids):
    model, x, y = make_model().train(), random_ids(4), random_ids(4, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model.loss(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    assert (model.eval()(x)[0].argmax(-1) == y).all()


@pytest.mark.parametrize(("length", "new"), [(1, 0), (1, 1), (5, 30), (CONTEXT, 3), (40, 2)])
def test_generate_returns_the_prompt_and_exactly_the_requested_tokens(make_model, random_ids, length, new):
    model, prompt = make_model(), random_ids(2, length)
    out = model.generate(prompt, new)
    assert out.shape == (2, length + new) and out.dtype == torch.int64
    assert torch.equal(out[:, :length], prompt)


def test_generate_repeats_with_the_same_generator_seed(make_model, random_ids):
    model, prompt = make_model(), random_ids(2, 4)
    first, again, other = (
        model.generate(prompt, 20, generator=torch.Generator().manual_seed(seed)).tolist() for seed in (1, 1, 2)
    )
    assert first == again != other


def test_generate_uses_no_dropout_and_keeps_the_mode(make_model, random_ids):
    model = make_model(dropout=0.5).train()
    first, second = (model.generate(random_ids(1, 4), 20, temperature=0.0) for _ in range(2))
    assert torch.equal(first, second)
    assert model.training


@both_attentions
def test_generate_works_in_bfloat16_and_under_autocast(make_model, random_ids, flash_attention):
    model = make_model(flash_attention=flash_attention)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.generate(random_ids(2, 4), 20).shape == (2, 24)
    assert model.bfloat16().generate(random_ids(2, 4), 20).shape == (2, 24)


def test_input_longer_than_the_context_is_rejected(make_model, random_ids):
    with pytest.raises(StoryLLMError, match=rf"{CONTEXT + 1} .*{CONTEXT}"):
        make_model()(random_ids(1, CONTEXT + 1))


def test_a_recipe_in_place_of_a_model_configuration_is_rejected():
    with pytest.raises(StoryLLMError, match=r"Recipe.*GPTConfig"):
        GPT(TINY)


@pytest.mark.parametrize("grad", [True, False])
def test_ignored_targets_count_in_neither_loss(make_model, random_ids, grad):
    model, idx, targets = make_model(), random_ids(), random_ids(seed=1)
    targets[:, 3:9] = targets[1] = -100
    with torch.set_grad_enabled(grad):
        loss = model.loss(idx, targets)
        torch.testing.assert_close(loss, model(idx, targets)[1])
    logits, kept = model(idx)[0], targets != -100
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[kept], targets[kept]))


@pytest.mark.parametrize(
    ("idx", "targets", "key_words"),
    [
        ((2, 8), (2, 7), r"targets .*\(2, 7\).*\(2, 8\)"),
        ((2, 8), (0, 8), r"targets .*\(0, 8\).*\(2, 8\)"),
        ((2, 8), (16,), r"targets .*\(16,\).*\(2, 8\)"),
        ((0, 8), (0, 8), r"targets .*\(0, 8\).*at least one token"),
        ((8,), (8,), r"idx .*\(8,\).*\(B, T\)"),
    ],
)
def test_other_shapes_are_rejected_by_forward_and_loss(make_model, idx, targets, key_words):
    model = make_model()
    for function in (model, model.loss):
        with pytest.raises(StoryLLMError, match=key_words):
            function(*(torch.zeros(shape, dtype=torch.long) for shape in (idx, targets)))


@pytest.mark.parametrize("shape", [(8,), (2, 0), (1, 2, 3)])
def test_ids_of_another_shape_are_rejected(make_model, shape):
    with pytest.raises(StoryLLMError, match=rf"idx .*{re.escape(str(shape))}.*\(B, T\)"):
        make_model()(torch.zeros(shape, dtype=torch.long))


# PyTorch's tools


def test_the_loss_compiles_into_one_graph(make_model, random_ids):
    model, idx, targets = make_model().train(), random_ids(), random_ids(seed=1)
    targets[0, :5] = -100
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (model.loss, compiled):
        loss = function(idx, targets)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


@both_attentions
@pytest.mark.parametrize("strict", [True, False])
def test_export_with_dynamic_batch_and_length(make_model, random_ids, flash_attention, strict):
    model = make_model(flash_attention=flash_attention)
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=CONTEXT)}
    exported = torch.export.export(model, (random_ids(2, 5),), dynamic_shapes=(dynamic,), strict=strict).module()
    for shape in ((1, CONTEXT), (4, 3)):
        torch.testing.assert_close(exported(random_ids(*shape))[0], model(random_ids(*shape))[0], atol=1e-5, rtol=1e-5)


def test_gradients_per_window_with_torch_func(make_model, random_ids):
    model, idx, targets = make_model(flash_attention=False), random_ids(), random_ids(seed=1)
    parameters = dict(model.named_parameters())

    def loss(parameters, x, y):
        return torch.func.functional_call(model, parameters, (x[None], y[None]))[1]

    per_window = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, idx, targets)
    model.loss(idx, targets).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(per_window[name].mean(0), parameter.grad, atol=1e-6, rtol=1e-4)


def test_flops_of_the_linear_layers_are_counted(make_model, random_ids):
    model = make_model(flash_attention=False)
    with FlopCounterMode(display=False) as counter:
        model(random_ids(1))
    assert counter.get_total_flops() == flops_per_token(model.config) * CONTEXT // 3  # a third is the forward pass
