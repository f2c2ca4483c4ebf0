"""Agreement of gradients is held to its definition, and moving an adapter leaves no trace."""

import math

import pytest
import torch

from qlora_edu import gradients, lora, models, qlora, training

ROWS = [training.Encoded((1, 20, 21), (30, 31, 2)), training.Encoded((1, 40), (41, 42, 2))]


@pytest.fixture
def twin():
    model, _ = models.tiny()
    torch.manual_seed(0)
    qlora.add_qlora(model, r=4)
    return model.train()


def test_cosine_and_ratio_are_those_of_two_arrows():
    ours = {"a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([[2.0, 0.0]])}
    theirs = {"a": torch.tensor([[3.0, 3.0]]), "b": torch.tensor([[0.0, -1.0]])}
    found = gradients.agreement(ours, theirs)
    assert found["a"] == pytest.approx((math.cos(math.pi / 4), math.sqrt(18)))
    assert found["b"] == pytest.approx((0.0, 0.5))
    assert gradients.whole(ours, theirs) == pytest.approx((3 / math.sqrt(5 * 19), math.sqrt(19 / 5)))
    assert gradients.middle(found, "b") == found["b"]


def test_length_of_a_gradient_does_not_overflow():
    huge = {"a": torch.full((4,), 1e30)}
    assert gradients.agreement(huge, huge)["a"] == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ({}, "a gradient for each name"),
        ({"b": torch.ones(2)}, "a gradient for each name"),
        ({"a": torch.ones(3)}, "a: expected gradients of one shape"),
        ({"a": torch.zeros(2)}, "a: expected finite gradients that are not zero"),
        ({"a": torch.tensor([1.0, float("nan")])}, "a: expected finite gradients"),
        ({"a": torch.tensor([1.0, float("inf")])}, "a: expected finite gradients"),
    ],
)
def test_what_cannot_be_compared_is_refused(theirs, says):
    for compare in (gradients.agreement, gradients.whole):
        with pytest.raises(ValueError, match=says):
            compare({"a": torch.ones(2)}, theirs)


def test_no_name_with_that_ending_is_an_error():
    with pytest.raises(ValueError, match="no name ends in 'q_proj'"):
        gradients.middle({"v_proj": (1.0, 1.0)}, "q_proj")


def test_of_b_is_the_slope_of_the_loss(twin):
    """A central difference of the loss along the gradient gives the gradient's squared length."""
    loss, found = gradients.of_b(twin, ROWS)
    assert found.keys() == lora.lora_layers(twin).keys()
    assert all(p.grad is None for p in twin.parameters())
    length = torch.cat([g.flatten() for g in found.values()]).norm().item()
    step = 1e-2 / length
    with gradients.moved(twin, found, step):
        down, _ = gradients.of_b(twin, ROWS)
    with gradients.moved(twin, found, -step):
        up, _ = gradients.of_b(twin, ROWS)
    assert down < loss < up
    assert (up - down) / (2 * step) == pytest.approx(length, rel=0.02)


def test_moved_restores_every_bit_even_after_an_error(twin):
    before = [p.detach().clone() for p in lora.adapter_parameters(twin)]
    direction = {name: torch.ones_like(layer.lora_b) for name, layer in lora.lora_layers(twin).items()}
    with pytest.raises(KeyError), gradients.moved(twin, direction, 2.0):
        size = torch.cat([layer.lora_b.flatten() for layer in lora.lora_layers(twin).values()]).norm()
        assert size.item() == pytest.approx(2.0, rel=1e-5)
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(before, lora.adapter_parameters(twin), strict=True))


def test_a_model_without_an_adapter_is_named():
    with pytest.raises(ValueError, match="has no LoRA layers"):
        gradients.of_b(models.tiny()[0], ROWS)


def test_of_b_does_not_add_to_a_gradient_from_before(twin):
    _, expected = gradients.of_b(twin, ROWS)
    for p in lora.adapter_parameters(twin):
        p.grad = torch.ones_like(p)
    _, found = gradients.of_b(twin, ROWS)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_b_that_gets_no_gradient_is_named(twin):
    name, layer = list(lora.lora_layers(twin).items())[3]
    layer.enabled = False
    with pytest.raises(ValueError, match=f"{name} is switched off"):
        gradients.of_b(twin, ROWS)
    layer.enabled = True
    layer.lora_b.requires_grad_(False)
    with pytest.raises(ValueError, match=f"{name} has a frozen B"):
        gradients.of_b(twin, ROWS)
    layer.lora_b.requires_grad_()
    layer.merge()
    with pytest.raises(ValueError, match=f"{name} is merged"):
        gradients.of_b(twin, ROWS)
    layer.unmerge()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"outside torch\.no_grad"):
        gradients.of_b(twin, ROWS)


@pytest.mark.parametrize(
    ("change", "length", "says"),
    [
        (lambda b: {}, 1.0, "direction: expected a finite direction that is not zero; got length 0"),
        (lambda b: {"NAME": torch.zeros_like(b)}, 1.0, "direction: expected a finite direction"),
        (lambda b: {"NAME": torch.full_like(b, math.nan)}, 1.0, "direction: expected a finite direction"),
        (lambda b: {"NAME": torch.ones(1, 1)}, 1.0, r"direction: expected shape \(.*; got \(1, 1\)"),
        (lambda b: {"q_proj": torch.ones_like(b)}, 1.0, "direction: expected names .*; got 'q_proj'"),
        (lambda b: {"NAME": torch.ones_like(b)}, math.nan, "length: expected a finite number; got nan"),
        (lambda b: {"NAME": torch.ones_like(b)}, math.inf, "length: expected a finite number; got inf"),
    ],
)
def test_moved_refuses_what_is_no_step(twin, change, length, says):
    name, layer = next(iter(lora.lora_layers(twin).items()))
    direction = {name if key == "NAME" else key: d for key, d in change(layer.lora_b.detach()).items()}
    before = layer.lora_b.detach().clone()
    with pytest.raises(ValueError, match=says), gradients.moved(twin, direction, length):
        pass
    assert torch.equal(layer.lora_b, before)
