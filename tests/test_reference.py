"""bitsandbytes' switches, as this course sets them."""

import torch
from torch import nn

from qlora_edu import models, parity, reference


def test_layers_are_made_with_the_repacking_switched_off():
    layer = reference.linear4bit(nn.Linear(64, 64, bias=False), torch.bfloat16)
    assert not layer.support_avx512bf16_for_cpu


def test_a_layer_with_the_switch_left_on_repacks_exactly_where_the_cpu_can():
    linear = nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)
    linear.weight.data = parity.stored_weights(64 * 128).view(64, 128).to(torch.bfloat16)
    x = parity.stored_weights(3 * 128).view(3, 128).to(torch.bfloat16)
    moved = {}
    for name in ("off", "on"):
        layer = reference.linear4bit(linear, torch.bfloat16).requires_grad_(False)
        if name == "on":
            assert reference.leave_switch_on(layer) is layer
        before = layer.weight.data.flatten().clone()
        with torch.no_grad():
            layer.eval()(x)
        moved[name] = not torch.equal(layer.weight.data.flatten(), before)
    assert moved == {"off": False, "on": reference.repacks_in_place()}


def test_what_is_not_quantized_stays_trainable_only_if_asked_for(tmp_path):
    model, _ = models.tiny(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    frozen, free = (reference.load_4bit(tmp_path, frozen=frozen) for frozen in (True, False))
    assert frozen.training and free.training
    assert not any(p.requires_grad for p in frozen.parameters())
    trains = {name for name, p in free.named_parameters() if p.requires_grad}
    assert trains == {name for name, _ in free.named_parameters() if "norm" in name or "embed" in name}
