"""What the naive layer keeps, by formula, is what autograd keeps of a real naive layer, to the byte."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qlora_edu import lora, memory, models, qlora
from qlora_edu.memory import activations, decoded
from qlora_edu.memory.activations import Work

WORK = Work(rows=2, length=24, rank=4, itemsize=4)


class Naive(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.quantized, self.compute_dtype = layer.quantized, layer.compute_dtype
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x):
        return F.linear(x, self.quantized.dequantize(x.dtype))


@pytest.fixture
def twin():
    model, _ = models.tiny()
    qlora.add_qlora(model, r=4)
    return model.train()


def kept(model, function=None):
    ids = torch.arange(48).view(2, 24)
    decoder = model.get_decoder()
    function = function or (lambda: decoder(input_ids=ids, use_cache=False))
    return sum(memory.kept_by_forward(model, function).values())


def make_naive(model):
    for layer in lora.lora_layers(model).values():
        layer.base = Naive(layer.base)


def test_the_difference_between_the_layers_is_the_formula(twin):
    shape = memory.shape_of(twin)
    by_hand = kept(twin)
    make_naive(twin)
    assert kept(twin) - by_hand == decoded.decoded(shape, WORK) > 0
    assert by_hand == sum(decoded.kept(shape, WORK).values()) == activations.kept(shape, WORK)
    assert kept(twin) == sum(decoded.kept(shape, WORK, naive=True).values())


def test_with_checkpointing_it_is_one_block(twin):
    shape = memory.shape_of(twin)
    x = torch.ones(2, 24, shape.d, requires_grad=True)
    angles = twin.get_decoder().rotary_emb(x, torch.arange(24)[None])
    block = twin.get_decoder().layers[1]

    def forward():
        return block(x, position_embeddings=angles)

    by_hand = kept(twin, forward)
    make_naive(twin)
    assert kept(twin, forward) - by_hand == decoded.decoded(shape, WORK, checkpointing=True)


def test_parts_add_up_with_checkpointing_as_well():
    shape = memory.shape_of("llama-7b")
    work = Work(rank=64)
    with_it = decoded.kept(shape, work, naive=True, checkpointing=True)
    assert list(with_it) == list(decoded.PARTS)
    rest = sum(with_it.values()) - with_it["decoded weights"]
    assert rest == activations.kept(shape, work, checkpointing=True) + sum(
        activations.block(shape, work).values()
    )


def test_what_keeps_no_decoded_weight_is_refused():
    with pytest.raises(ValueError, match="work: expected a frozen base"):
        decoded.decoded(memory.shape_of("llama-7b"), Work(full=True))
    other = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 100}
    with pytest.raises(ValueError, match=r"LLaMA's block|nn.Linear"):
        decoded.decoded(memory.shape_of(other), Work())


def test_a_models_name_will_do():
    shape, work = memory.shape_of("llama-7b"), Work()
    assert decoded.decoded("llama-7b", work) == decoded.decoded(shape, work) > 0
    assert decoded.kept("llama-7b", work, naive=True) == decoded.kept(shape, work, naive=True)
