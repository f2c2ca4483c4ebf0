"""The fused functions: the forward pass of transformers in every bit, the derivatives of the definitions."""

import copy
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama import modeling_llama as llama

from qlora_edu import fused, lora, models, parity, qlora
from qlora_edu.fused import causal_attention, choice, loops, plain

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def numbers(*shape: int, dtype=torch.bfloat16, seed=0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(length: int, d: int, rows: int = 1, dtype=torch.bfloat16) -> tuple[Tensor, Tensor]:
    half = 1e4 ** -torch.linspace(0, 1, d // 2, dtype=torch.float64)
    angle = (torch.arange(length)[:, None] * half).repeat(1, 2) + torch.arange(rows)[:, None, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def causal(length: int, rows: int = 1, dtype=torch.bfloat16) -> Tensor:
    return torch.full((rows, 1, length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)


def same(found: Tensor, right: Tensor) -> None:
    """Every bit, where the CPU multiplies bfloat16 itself. For other products torch chooses the order of a sum by the
    shapes: then a few results are rounded to a neighbour."""
    if found.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        assert parity.differing(found, right) == (found.numel(), 0)
    else:
        steps = (
            64 if found.dtype == torch.float32 else 2
        )  # a sum of 64 products, rounded each time or at its end
        step = steps * torch.finfo(found.dtype).eps
        assert torch.allclose(found, right, rtol=step, atol=step)


@pytest.fixture(params=["torch", "numba"])
def kernels(request, monkeypatch):
    monkeypatch.setenv("QLORA_EDU_KERNELS", request.param)
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    """That many, which share even the smallest tensor."""
    monkeypatch.setattr(loops, "SHARED_FROM", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# The compiled loops


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 64), (4, 33, 576)])
def test_the_loops_normalise_as_torch_does(shape, threads):
    x, grad, weight = numbers(*shape), numbers(*shape, seed=1), numbers(shape[-1], seed=2)
    x.view(-1)[0], grad.view(-1)[-1] = 0.0, -0.0
    r = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(loops.normalise(x, weight, r), plain.normalise(x, weight, r))
    assert torch.equal(
        loops.normalise_backward(x, weight, r, grad), plain.normalise_backward(x, weight, r, grad)
    )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape", [(3, 1, 1, 2), (3, 5, 3, 6), (3, 17, 9, 64)])
def test_the_loops_rotate_as_torch_does(shape, rows, threads):
    x, (cos, sin) = numbers(*shape), angles(shape[1], shape[3], rows)
    turned = loops.rotate(x, cos, sin)
    assert torch.equal(turned, plain.rotate(x, cos, sin)) and turned.is_contiguous()
    back = loops.rotate_back(turned, cos, sin)
    assert torch.equal(back, plain.rotate_back(turned, cos, sin)) and back.is_contiguous()
    assert torch.allclose(back.float(), x.float(), atol=0.06)  # back where it was, but for rounding


def test_the_loops_take_what_is_not_contiguous_and_all_kinds_of_numbers():
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    x, weight, r = bits.view(2, 512, 64).transpose(0, 1), numbers(64), torch.tensor([0.7]).expand(512, 2, 1)
    assert x.isnan().any() and x.isinf().any() and (x == 0).any()
    found, right = loops.normalise(x, weight, r), plain.normalise(x, weight, r)
    assert torch.equal(found.isnan(), right.isnan()) and torch.equal(found.nan_to_num(7), right.nan_to_num(7))
    (cos, sin), x = angles(32, 64), bits.view(2, 16, 32, 64).transpose(1, 2)
    found, right = loops.rotate(x, cos, sin), plain.rotate(x, cos, sin)
    assert torch.equal(found.isnan(), right.isnan()) and torch.equal(found.nan_to_num(7), right.nan_to_num(7))


def test_loops_that_compute_something_else_are_not_used(monkeypatch):
    monkeypatch.setenv("QLORA_EDU_KERNELS", "numba")
    x = numbers(2, 3, 4, 8)
    monkeypatch.setattr(loops, "rotate", lambda *arguments: plain.rotate(*arguments) + 1)
    choice._loops.cache_clear()
    try:
        with pytest.warns(UserWarning, match="rotate, compiled for this CPU, computes something else"):
            assert choice.passes(x) is plain
    finally:
        choice._loops.cache_clear()
    monkeypatch.undo()
    monkeypatch.setenv("QLORA_EDU_KERNELS", "numba")
    assert choice.passes(x) is loops
    assert choice.passes(x, x.float()) is plain
    monkeypatch.setenv("QLORA_EDU_KERNELS", "torch")
    assert choice.passes(x) is plain


# The functions against transformers and against the definitions


@pytest.mark.parametrize("dtype", FLOATS)
def test_rms_norm_is_that_of_transformers(dtype, kernels, threads):
    norm = llama.LlamaRMSNorm(576, eps=0.1).requires_grad_(False)
    norm.weight.data = numbers(576, dtype=dtype, seed=1)
    x = 3 * numbers(2, 200, 576, dtype=dtype)
    x[0, 0] = 0
    found = fused.rms_norm(x, norm.weight, 0.1)
    assert found.dtype == dtype and parity.differing(found, norm(x)) == (found.numel(), 0)


def test_swiglu_is_that_of_transformers(threads):
    a, b = numbers(3, 50, 1536), numbers(3, 50, 1536, seed=1)
    assert parity.differing(fused.swiglu(a, b), F.silu(a) * b) == (a.numel(), 0)


def eager(q, k, v, cos, sin, mask, scaling):
    """Transformers' own functions."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k = llama.apply_rotary_pos_emb(q, k, cos, sin)
    module = torch.nn.Module()
    module.num_key_value_groups = q.shape[1] // k.shape[1]
    return llama.eager_attention_forward(module, q, k, v, mask, scaling)[0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("length", [1, 46, 67, 128, 200, 255])
def test_attention_is_that_of_transformers(length, dtype, kernels, threads):
    """Large scores, so that a sum of probabilities in another order shows."""
    mask = causal(length, 2, dtype)
    mask[1, :, :, length // 2 + 1 :] = torch.finfo(dtype).min  # padding
    for seed in (0, 10, 20, 30):
        q, k, v = (2 * numbers(2, length, heads, 64, dtype=dtype, seed=seed + heads) for heads in (9, 3, 3))
        arguments = (q, k, v, *angles(length, 64, dtype=dtype), mask, 0.125)
        same(fused.attention(*arguments), eager(*arguments))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("d", [32, 80, 128])
def test_scores_are_rounded_before_they_are_scaled(d, dtype, kernels):
    """1 / sqrt(64) rounds nothing; these do."""
    q, k, v = (2 * numbers(2, 100, heads, d, dtype=dtype, seed=heads) for heads in (4, 2, 2))
    arguments = (q, k, v, *angles(100, d, dtype=dtype), causal(100, 2, dtype), d**-0.5)
    same(fused.attention(*arguments), eager(*arguments))


@pytest.mark.parametrize("hidden", [torch.finfo(torch.bfloat16).min, -float("inf")])
def test_a_query_that_may_see_no_key_gets_what_transformers_gives(hidden, kernels):
    q, k, v = (numbers(2, 150, heads, 64, seed=heads) for heads in (4, 2, 2))
    mask = causal(150, 2)
    mask[1, :, :, :70] = hidden  # padding on the left
    arguments = (q, k, v, *angles(150, 64), mask, 0.125)
    found = fused.attention(*arguments)
    same(found, eager(*arguments))
    assert found.isfinite().all()


@pytest.mark.parametrize("queries", [1, 3, 64])
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("hidden", ["nothing", "later keys", "later keys but one", "all but two keys"])
def test_attention_has_the_derivatives_of_its_definition(hidden, heads, groups, queries, monkeypatch):
    """By finite differences, in float64, with parts of different sizes."""
    monkeypatch.setattr(causal_attention, "QUERIES", queries)
    q, k, v = (
        numbers(2, 5, n, 4, dtype=torch.float64, seed=n).requires_grad_() for n in (heads, groups, groups)
    )
    mask = None if hidden == "nothing" else causal(5, dtype=torch.float64)
    if hidden == "later keys but one":
        mask = mask.triu(2)
    if hidden == "all but two keys":
        mask = mask.masked_fill(torch.ones(5, 5).tril(-2).bool(), torch.finfo(torch.float64).min)
    options = (*angles(5, 4, rows=2, dtype=torch.float64), mask, 0.3)
    assert torch.autograd.gradcheck(lambda *x: fused.attention(*x, *options), (q, k, v))
    found, right = fused.attention(q, k, v, *options), eager(q, k, v, *options)
    assert torch.allclose(found, right)


def test_norm_and_swiglu_have_the_derivatives_of_their_definitions():
    a, b = (numbers(3, 5, dtype=torch.float64, seed=n).requires_grad_() for n in (0, 1))
    weight = numbers(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: fused.rms_norm(x, weight, 0.01), a)
    assert torch.autograd.gradcheck(fused.swiglu, (a, b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_no_further_from_the_truth_than_those_of_transformers(dtype, kernels):
    """The truth is computed in float64 from the same rounded numbers."""
    q, k, v = (numbers(2, 150, heads, 64, dtype=dtype, seed=heads) for heads in (9, 3, 3))
    options = (*angles(150, 64, dtype=dtype), causal(150, 2, dtype), 0.125)
    wide = tuple(x.double() if isinstance(x, Tensor) else x for x in options)
    slope = numbers(2, 150, 9, 64, dtype=dtype, seed=7)
    truth = gradients(lambda *x: eager(*x, *wide), [x.double() for x in (q, k, v)], slope.double())
    found = gradients(lambda *x: fused.attention(*x, *options), (q, k, v), slope)
    theirs = gradients(lambda *x: eager(*x, *options), (q, k, v), slope)
    for name, right, mine, other in zip("qkv", truth, found, theirs, strict=True):
        assert error(mine, right) <= 1.1 * error(other, right), name

    x, weight, slope = (
        numbers(100, 576, dtype=dtype),
        numbers(576, dtype=dtype, seed=1),
        q.view(-1, 576)[:100],
    )
    norm = llama.LlamaRMSNorm(576, eps=1e-5)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    definition = lambda x: weight.double() * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()  # noqa: E731
    (truth,) = gradients(definition, [x.double()], slope.double())
    (found,) = gradients(lambda x: fused.rms_norm(x, weight, 1e-5), [x], slope)
    (theirs,) = gradients(norm, [x], slope)
    assert error(found, truth) <= 1.1 * error(theirs, truth)


def gradients(function, inputs, slope) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    function(*inputs).backward(slope)
    return [x.grad for x in inputs]


def error(found: Tensor, right: Tensor) -> float:
    return ((found.double() - right).norm() / right.norm()).item()


def test_what_is_kept_is_what_is_said():
    """Bytes that autograd keeps: of a norm x and one number a row; of SwiGLU a and b; of attention q, k, v, p."""
    x, y = (numbers(2, 256, 576, seed=n).requires_grad_() for n in (0, 1))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes), lambda t: t):
        fused.rms_norm(x, numbers(576), 1e-5)
        assert sum(kept) == x.nbytes + 2 * 256 * 4 + 576 * 2
        kept.clear()
        fused.swiglu(x, y)
        assert sum(kept) == x.nbytes + y.nbytes
        kept.clear()
        q, k, v = (numbers(2, 256, heads, 64).requires_grad_() for heads in (9, 3, 3))
        cos, sin = angles(256, 64)
        fused.attention(q, k, v, cos, sin, causal(256), 0.125)
        # 64 queries at a time, and the keys up to the last of them; two rows, nine heads, two bytes
        seen = 64 * (64 + 128 + 192 + 256) * 2 * 9 * 2
        assert sum(kept) == q.nbytes + k.nbytes + v.nbytes + cos.nbytes + sin.nbytes + seen


# Bad input


def test_bad_arguments_are_named():
    x = numbers(2, 3, 8)
    with pytest.raises(ValueError, match=r"weight: expected shape \(8,\).* got \(7,\)"):
        fused.rms_norm(x, numbers(7), 1e-5)
    with pytest.raises(ValueError, match="weight: expected one that is frozen"):
        fused.rms_norm(x, numbers(8).requires_grad_(), 1e-5)
    with pytest.raises(ValueError, match=r"b: expected the shape and dtype of a, \(2, 3, 8\)"):
        fused.swiglu(x, x[:1])
    good = dict(zip(("q", "k", "v"), (numbers(2, 5, n, 8) for n in (4, 2, 2)), strict=True))
    good |= dict(zip(("cos", "sin"), angles(5, 8), strict=True)) | {"mask": causal(5), "scaling": 1.0}
    assert fused.attention(**good).shape == (2, 5, 4, 8)
    for name, bad, message in (
        ("q", numbers(2, 5, 8), r"q: expected shape \(b, t, heads, d\)"),
        ("q", numbers(2, 0, 4, 8), r"q: expected shape .*none of them 0"),
        ("q", numbers(2, 5, 4, 7), "q: expected an even d"),
        ("q", numbers(2, 5, 3, 8), r"k: expected .*groups a divisor of 3; got \(2, 5, 2, 8\)"),
        ("k", numbers(2, 4, 2, 8), r"k: expected \(2, 5, groups, 8\)"),
        ("v", numbers(2, 5, 1, 8), r"v: expected the shape of k"),
        ("cos", angles(4, 8)[0], r"cos: expected shape \(1 or 2, 5, 8\); got \(1, 4, 8\)"),
        ("sin", angles(5, 8, rows=3)[1], r"sin: expected shape \(1 or 2, 5, 8\)"),
        ("mask", causal(5)[0], r"mask: expected shape \(1 or 2, 1, 5, 5\); got \(1, 5, 5\)"),
        ("mask", causal(5).float(), "mask: expected torch.bfloat16 on cpu"),
        ("v", numbers(2, 5, 2, 8, dtype=torch.float32), "v: expected torch.bfloat16 on cpu"),
        ("mask", causal(5).requires_grad_(), "mask: expected a constant"),
    ):
        with pytest.raises(ValueError, match=message):
            fused.attention(**{**good, name: bad})


def test_second_derivatives_are_refused():
    x, y = numbers(3, 8).requires_grad_(), numbers(1, 3, 1, 8).requires_grad_()
    for value, of in (
        (fused.rms_norm(x, numbers(8), 1e-5), x),
        (fused.swiglu(x, numbers(3, 8)), x),
        (fused.attention(y, y, y, *angles(3, 8), causal(3), 1.0), y),
    ):
        (slope,) = torch.autograd.grad(value.square().sum(), of, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()


# A model


def two_models(dtype=torch.bfloat16, **options):
    """The same QLoRA model twice: as it is, and fused."""
    there, _ = models.tiny(dtype=dtype)
    torch.manual_seed(0)
    qlora.add_qlora(there, r=4, **options)
    for parameter in lora.adapter_parameters(there):
        parameter.data += 0.02 * numbers(*parameter.shape, dtype=parameter.dtype)
    return there.train(), fused.fuse(copy.deepcopy(there)).train()


IDS = torch.arange(2 * 150).view(2, 150) % 250
PADDED = torch.ones(2, 150, dtype=torch.int64)
PADDED[1, 90:] = 0


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_a_fused_model_computes_the_same(compute, padding, kernels, threads):
    there, here = two_models(compute_dtype=compute)
    mask = PADDED if padding == "right" else PADDED.flip(1)
    inputs = {"input_ids": IDS, "attention_mask": mask, "labels": IDS.where(mask == 1, -100)}
    inputs["use_cache"] = False  # with a cache attention is not fused
    right, found = there(**inputs), here(**inputs)
    same(found.logits, right.logits)
    assert found.loss.item() == pytest.approx(right.loss.item(), rel=1e-3)
    (there.zero_grad(), here.zero_grad())
    (right.loss.backward(), found.loss.backward())
    mine, theirs = (torch.cat([p.grad.flatten() for p in lora.adapter_parameters(m)]) for m in (here, there))
    assert error(mine, theirs.double()) < 0.02  # bfloat16 rounds by up to 0.004


def test_a_fused_model_calls_the_fused_functions(monkeypatch):
    model, _ = models.tiny(dtype=torch.bfloat16)
    called = []
    for name in ("attention", "rms_norm", "swiglu"):
        function = getattr(fused, name)
        monkeypatch.setattr(
            fused.model, name, lambda *a, name=name, function=function: called.append(name) or function(*a)
        )
    qlora.add_qlora(model, r=4)
    fused.fuse(model)(input_ids=IDS, attention_mask=PADDED, use_cache=False)
    assert called == ["rms_norm", "attention", "rms_norm", "swiglu"] * 2 + ["rms_norm"]


def test_in_float32_gradients_agree_to_its_rounding():
    there, here = two_models(dtype=torch.float32)
    for model in (there, here):
        model(input_ids=IDS, attention_mask=PADDED, labels=IDS, use_cache=False).loss.backward()
    mine, theirs = (torch.cat([p.grad.flatten() for p in lora.adapter_parameters(m)]) for m in (here, there))
    assert error(mine, theirs.double()) < 1e-5


def test_checkpointing_computes_the_same_gradients():
    _, here = two_models()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            here.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        here.zero_grad()
        here(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in lora.adapter_parameters(here)]))
    assert torch.equal(*found)


def test_names_and_weights_stay_and_a_copy_is_its_own():
    there, here = two_models()
    assert [name for name, _ in here.named_modules()] == [name for name, _ in there.named_modules()]
    assert list(here.state_dict()) == list(there.state_dict())
    again = copy.deepcopy(here)
    for module in again.modules():
        assert getattr(module.forward, "__self__", module) is module
    before = here(input_ids=IDS).logits
    again.model.norm.weight.data.zero_()
    assert torch.equal(here(input_ids=IDS).logits, before) and not again(input_ids=IDS).logits.any()


def test_what_is_fused_is_a_matter_of_classes():
    """Found by their names, with nothing hung on an instance: so a model can be stored, copied and replicated."""
    _, here = two_models()
    for module in here.modules():
        kind = type(module)
        assert getattr(sys.modules[kind.__module__], kind.__qualname__) is kind
        assert "forward" not in vars(module)


@pytest.mark.parametrize("kind", ["float32", "bool", "each head", "all queries alike", "trained"])
def test_masks_of_ones_own_do_what_they_did(kind):
    there, here = two_models()
    mask = {
        "float32": causal(150).float(),
        "bool": causal(150) == 0,
        "each head": causal(150).repeat(1, 4, 1, 1),
        "all queries alike": causal(150)[:, :, 90:91].repeat(2, 1, 1, 1),
        "trained": causal(150).requires_grad_(),
    }[kind]
    found, right = (m(input_ids=IDS, attention_mask=mask, use_cache=False).logits for m in (here, there))
    same(found, right)


def test_answers_are_the_same_tokens():
    there, here = (model.eval() for model in two_models())
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for mask in (PADDED, PADDED.flip(1)):
        found, right = (m.generate(input_ids=IDS, attention_mask=mask, **options) for m in (here, there))
        assert torch.equal(found, right)


def test_what_is_not_fused_is_done_as_before():
    there, here = two_models()
    found, right = (
        m(input_ids=IDS, output_attentions=True, use_cache=False).attentions for m in (here, there)
    )
    assert len(found) == len(right) == 2 and all(
        torch.equal(*pair) for pair in zip(found, right, strict=True)
    )

    for model in (there, here):  # dropout in attention draws from torch's generator
        for block in model.model.layers:
            block.self_attn.attention_dropout = 0.5
    found, right = (
        (torch.manual_seed(3), m(input_ids=IDS, use_cache=False).logits)[1] for m in (here, there)
    )
    assert torch.equal(found, right)

    for model in (there, here):  # trained norms get their gradients
        model.model.norm.weight.requires_grad_()
        torch.manual_seed(3)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert torch.equal(here.model.norm.weight.grad, there.model.norm.weight.grad)


def test_own_weights_are_copies_and_tied_ones_stay_tied():
    model, _ = models.tiny()
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    models.own_weights(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.data_ptr() != before[name].data_ptr()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_autocast_is_done_as_before():
    there, here = two_models(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, right = (m(input_ids=IDS, use_cache=False).logits for m in (here, there))
    assert torch.equal(found, right)


def test_another_activation_is_not_taken_for_silu():
    model, _ = models.tiny()
    for block in model.model.layers:
        block.mlp.act_fn = torch.nn.GELU()
    right = model(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(fused.fuse(model)(input_ids=IDS, use_cache=False).logits, right, atol=1e-5)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="expected one with transformers' LLaMA blocks; got Linear"):
        fused.fuse(torch.nn.Linear(2, 2))
    model, _ = models.tiny()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"expected eager attention, as models.load gives it; got 'sdpa'"):
        fused.fuse(model)
    assert type(model.model.norm) is llama.LlamaRMSNorm
    model.set_attn_implementation("eager")
    assert fused.fuse(fused.fuse(model)) is model
    right = model(input_ids=IDS, use_cache=False).logits
    model.set_attn_implementation("sdpa")  # whose mask means something else: then attention is not fused
    assert torch.allclose(model(input_ids=IDS, use_cache=False).logits, right, atol=1e-5)
