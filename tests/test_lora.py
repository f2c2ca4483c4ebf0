"""The low-rank layer against its equation in float64 and against PEFT; each known mistake would show."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from qlora_edu import models
from qlora_edu.lora import (
    LLAMA_LINEARS,
    LoRALinear,
    adapter_parameters,
    add_lora,
    find_targets,
    lora_layers,
)
from qlora_edu.parity import differing, stored_weights

# Nothing here is degenerate: r is not alpha, the weight is not square, B is not zero.
R, ALPHA, IN, OUT = 3, 7, 40, 24


def dense(dtype=torch.float32, bias=True) -> nn.Linear:
    layer = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    layer.weight.data = stored_weights(OUT * IN).view(OUT, IN).to(dtype)
    if bias:
        layer.bias.data = stored_weights(OUT, 5).to(dtype)
    return layer


def adapted(base: nn.Module | None = None, **options) -> LoRALinear:
    layer = LoRALinear(base or dense(), R, ALPHA, **options)
    layer.lora_a.data = stored_weights(R * IN, 50).view(R, IN)
    layer.lora_b.data = stored_weights(OUT * R, 60).view(OUT, R)
    return layer


def batch(*leading) -> torch.Tensor:
    return stored_weights(torch.Size(leading).numel() * IN, 70).view(*leading, IN)


def oracle(layer: LoRALinear, x: torch.Tensor, scaling: float) -> torch.Tensor:
    """W x + scaling B A x, in float64."""
    y = x.double() @ layer.base.weight.double().T + scaling * (
        x.double() @ (layer.lora_b.double() @ layer.lora_a.double()).T
    )
    return y if layer.base.bias is None else y + layer.base.bias.double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize(("rank_stabilized", "scaling"), [(False, 7 / 3), (True, 7 / 3**0.5)])
def test_forward_is_the_equation(bias, leading, rank_stabilized, scaling):
    layer = adapted(dense(bias=bias), rank_stabilized=rank_stabilized)
    x = batch(*leading)
    torch.testing.assert_close(layer(x).double(), oracle(layer, x, scaling), rtol=1e-5, atol=1e-4)
    assert layer.scaling == pytest.approx(scaling)


def test_gradients_are_those_of_the_equation():
    layer, x = adapted(), batch(4).requires_grad_()
    g = stored_weights(4 * OUT, 80).view(4, OUT)
    layer(x).backward(g)
    a, b = (t.detach().double().requires_grad_() for t in (layer.lora_a, layer.lora_b))
    x64 = x.detach().double().requires_grad_()
    (x64 @ layer.base.weight.double().T + 7 / 3 * (x64 @ a.T) @ b.T).backward(g.double())
    for ours, exact in ((layer.lora_a, a), (layer.lora_b, b), (x, x64)):
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-3)
    assert layer.base.weight.grad is None and layer.base.bias.grad is None


MISTAKES = {
    "alpha forgotten": lambda base, a, b, x: base(x) + x @ a.T @ b.T,
    "r forgotten": lambda base, a, b, x: base(x) + ALPHA * x @ a.T @ b.T,
    "r / alpha": lambda base, a, b, x: base(x) + R / ALPHA * x @ a.T @ b.T,
    "sqrt(r)": lambda base, a, b, x: base(x) + ALPHA / R**0.5 * x @ a.T @ b.T,
    "the adapter returns zero": lambda base, a, b, x: base(x),
    "the base is left out": lambda base, a, b, x: ALPHA / R * x @ a.T @ b.T,
    "the base is scaled too": lambda base, a, b, x: ALPHA / R * (base(x) + x @ a.T @ b.T),
    "the sign is wrong": lambda base, a, b, x: base(x) - ALPHA / R * x @ a.T @ b.T,
    "the bias is added twice": lambda base, a, b, x: base(x) + ALPHA / R * x @ a.T @ b.T + base.bias,
    "A and B change places": lambda base, a, b, x: (
        base(x) + ALPHA / R * x @ a.reshape(IN, R) @ b.reshape(R, OUT)
    ),
    "dropout at inference": lambda base, a, b, x: base(x) + ALPHA / R * (x * 0.9) @ a.T @ b.T,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_known_mistake_would_show(mistake):
    """The inputs of these tests tell right from wrong: each wrong formula is far outside the tolerance."""
    layer, x = adapted(), batch(4)
    wrong = MISTAKES[mistake](layer.base, layer.lora_a, layer.lora_b, x)
    assert (wrong - layer(x)).abs().median() > 0.1


class TestInitialisation:
    def test_the_layer_starts_as_its_base_to_the_last_bit(self):
        for dtype in (torch.float32, torch.bfloat16):
            base = dense(dtype)
            x = batch(4).to(dtype)
            assert differing(LoRALinear(base, R, ALPHA)(x), base(x)) == (4 * OUT, 0)

    def test_a_fills_plus_minus_one_over_root_in_and_b_is_zero(self):
        layer = LoRALinear(nn.Linear(400, 300), 50)
        bound = 1 / 400**0.5
        assert layer.lora_a.shape == (50, 400) and layer.lora_b.shape == (300, 50)
        assert 0.99 * bound < layer.lora_a.abs().max() <= bound
        # 20,000 uniform draws: mean and standard deviation within six standard errors
        assert layer.lora_a.mean().abs() < 6 * bound / 3**0.5 / 20_000**0.5
        assert layer.lora_a.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert not layer.lora_b.any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_one_seed_draws_what_peft_draws(self, dtype):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.q_proj = dense(dtype)
                self.v_proj = dense(dtype)

        torch.manual_seed(3)
        theirs = get_peft_model(
            Model(), LoraConfig(r=R, target_modules=["q_proj", "v_proj"])
        ).base_model.model
        torch.manual_seed(3)
        ours = Model()
        # Building a model draws numbers as well, so that only the same order of draws gives the same A.
        add_lora(ours, R, targets=["v_proj", "q_proj"])
        for name in ("q_proj", "v_proj"):
            expected = getattr(theirs, name).lora_A.default.weight
            assert differing(getattr(ours, name).lora_a, expected) == (R * IN, 0)

    def test_parameters_are_float32_whatever_the_base_and_the_default(self):
        torch.set_default_dtype(torch.bfloat16)
        try:
            layer = LoRALinear(dense(torch.bfloat16), R)
        finally:
            torch.set_default_dtype(torch.float32)
        assert layer.lora_a.dtype == layer.lora_b.dtype == torch.float32

    def test_only_a_and_b_train(self):
        layer = adapted()
        assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_a", "lora_b"]


def test_training_moves_a_and_b_and_no_bit_of_the_base():
    layer = LoRALinear(dense(torch.bfloat16), R, ALPHA)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(batch(4).bfloat16()).float().square().mean().backward()
        optimizer.step()
    after = layer.state_dict()
    for name in ("base.weight", "base.bias"):
        assert differing(after[name], before[name])[1] == 0
    for name in ("lora_a", "lora_b"):
        assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switched_off_it_is_the_base_to_the_last_bit(dtype):
    layer, x = adapted(dense(dtype)), batch(4).to(dtype)
    assert differing(layer(x), layer.base(x))[1] > 0
    layer.enabled = False
    assert differing(layer(x), layer.base(x)) == (4 * OUT, 0)
    layer.enabled = True
    assert differing(layer(x), layer.base(x))[1] > 0


class TestDropout:
    def test_it_drops_entries_of_the_updates_input_only(self):
        layer = adapted(nn.Linear(IN, OUT, bias=False), dropout=0.25).train()
        x = batch(200)
        torch.manual_seed(0)
        update = layer(x) - layer.base(x)
        torch.manual_seed(0)
        dropped = nn.functional.dropout(x, 0.25)
        torch.testing.assert_close(update, dropped @ layer.delta().T, rtol=1e-4, atol=1e-3)
        assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.03)

    def test_it_is_off_in_eval_mode(self):
        layer, plain, x = adapted(dropout=0.5).eval(), adapted(), batch(4)
        assert differing(layer(x), plain(x)) == (4 * OUT, 0)
        assert differing(layer.train()(x), plain(x))[1] > 0

    def test_a_layer_with_dropout_and_a_compute_dtype_still_drops(self):
        layer = adapted(dense(torch.bfloat16), dropout=0.5, compute_dtype=torch.bfloat16).train()
        x = batch(8).bfloat16()
        assert not torch.equal(layer(x), layer(x))


class TestMerge:
    def test_the_weight_becomes_w_plus_delta(self):
        layer, x = adapted(), batch(4)
        w, before = layer.base.weight.detach().clone().double(), layer(x)
        exact = w + 7 / 3 * layer.lora_b.double() @ layer.lora_a.double()
        layer.merge()
        torch.testing.assert_close(layer.base.weight.double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            layer.base.weight.double(), w + layer.delta().double(), rtol=1e-6, atol=1e-6
        )
        assert differing(layer(x), layer.base(x))[1] == 0  # costs no more than the base
        torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_unmerging_gives_the_weight_back_but_for_rounding(self, dtype):
        layer = adapted(dense(dtype))
        before = layer.base.weight.detach().clone()
        largest = max(before.abs().max(), (before + layer.delta()).abs().max()).item()
        layer.merge()
        layer.unmerge()
        error = (layer.base.weight - before).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * largest and not layer.merged

    def test_twice_is_refused_and_changes_nothing(self):
        layer = adapted()
        with pytest.raises(RuntimeError, match="unmerge: the update is not in the base"):
            layer.unmerge()
        layer.merge()
        merged = layer.base.weight.detach().clone()
        with pytest.raises(RuntimeError, match="merge: the update is in the base's weight already"):
            layer.merge()
        assert torch.equal(layer.base.weight, merged)

    def test_a_merged_update_cannot_be_switched_off(self):
        """It would look like the base alone and not be it."""
        layer = adapted()
        layer.merge()
        layer.enabled = False
        with pytest.raises(RuntimeError, match=r"merged, so it cannot be switched off; call unmerge\(\)"):
            layer(batch(4))

    def test_delta_is_detached(self):
        assert not adapted().delta().requires_grad and adapted().delta().shape == (OUT, IN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[
            ({"r": r}, rf"r: expected a whole number of at least 1; got {r!r}")
            for r in (0, -1, 2.0, "8", True, None)
        ],
        *[
            ({"dropout": p}, rf"dropout: expected a probability in \[0, 1\); got {p!r}")
            for p in (-0.1, 1, 1.5, float("nan"), "0.1", None)
        ],
        *[
            ({"alpha": alpha}, rf"alpha: expected a finite number; got {alpha!r}")
            for alpha in (float("nan"), float("inf"), "16", None)
        ],
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_by_name(options, message):
    base = dense()
    with pytest.raises(ValueError, match=message):
        LoRALinear(base, **options)
    assert base.weight.requires_grad  # nothing was frozen


@pytest.mark.parametrize("base", [nn.Embedding(4, 4), nn.LayerNorm(4), nn.Sequential()])
def test_only_linear_layers_are_wrapped(base):
    with pytest.raises(TypeError, match=f"base: expected a linear layer .*; got {type(base).__name__}"):
        LoRALinear(base)


class TestAddLora:
    @pytest.fixture
    def model(self):
        return models.tiny()[0]

    def test_every_target_is_wrapped_and_all_else_frozen(self, model):
        linears = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.split(".")[-1] != "lm_head"
        ]
        assert add_lora(model, R, ALPHA) == linears == list(lora_layers(model))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {f"{name}.{part}" for name in linears for part in ("lora_a", "lora_b")}
        parameters = adapter_parameters(model)
        assert len(parameters) == 2 * len(linears) and all(p.requires_grad for p in parameters)
        assert sum(p.numel() for p in parameters) == sum(
            R * (layer.base.in_features + layer.base.out_features) for layer in lora_layers(model).values()
        )

    def test_a_name_must_end_in_the_target(self, model):
        names = add_lora(model, R, targets=["q_proj"])
        assert names and all(name.endswith(".q_proj") for name in names)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"targets": ["qproj"]}, ValueError, r"targets: no layer's name ends in 'qproj'"),
            ({"targets": ["q_proj", "vproj", "typo"]}, ValueError, "name ends in 'typo' or 'vproj'"),
            ({"targets": None}, TypeError, "targets: expected a list of names, such as"),
            ({"targets": [1]}, TypeError, "targets: expected a list of names, such as"),
            ({"alpha": True}, ValueError, "alpha: expected a finite number; got True"),
            ({"dropout": False}, ValueError, "dropout: expected a probability"),
            ({"targets": []}, ValueError, "targets: expected at least one name"),
            (
                {"targets": "q_proj"},
                TypeError,
                r"targets: expected a list of names, such as .*; got 'q_proj'",
            ),
            ({"targets": ["q_proj", "mlp"]}, TypeError, r"mlp: expected a linear layer"),
            ({"targets": ["embed_tokens"]}, TypeError, r"embed_tokens: expected a linear layer"),
            ({"r": 0}, ValueError, "r: expected"),
            ({"alpha": float("nan")}, ValueError, "alpha: expected"),
            ({"dropout": 1.0}, ValueError, "dropout: expected"),
        ],
        ids=str,
    )
    def test_what_is_refused_changes_nothing(self, model, arguments, error, message):
        before = [(name, p.requires_grad) for name, p in model.named_parameters()]
        with pytest.raises(error, match=message):
            add_lora(model, **arguments)
        assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
        assert not lora_layers(model)

    def test_a_second_time_is_refused(self, model):
        add_lora(model, R)
        before = [name for name, _ in model.named_parameters()]
        with pytest.raises(ValueError, match="model: has LoRA layers already"):
            add_lora(model, R)
        assert [name for name, _ in model.named_parameters()] == before

    def test_a_copy_trains_on_its_own(self, model):
        add_lora(model, R)
        twin = copy.deepcopy(model)
        for parameter in adapter_parameters(twin):
            parameter.data.fill_(1)
        assert not any((parameter == 1).all() for parameter in adapter_parameters(model))

    def test_finding_targets_changes_nothing(self, model):
        assert set(find_targets(model, LLAMA_LINEARS)) == set(add_lora(copy.deepcopy(model)))
        assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
