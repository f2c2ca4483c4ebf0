"""Predicted bytes, against counts by hand, transformers' own tensors and what autograd keeps."""

import json

import pytest
import torch
from transformers import LlamaConfig

from qlora_edu import memory, models
from qlora_edu.memory import activations, steps
from qlora_edu.memory.activations import Work


def test_65b_is_counted_as_by_hand():
    d, f, layers, vocabulary = 8192, 22_016, 80, 32_000
    by_hand = layers * (4 * d * d + 3 * d * f + 2 * d) + 2 * vocabulary * d + d
    assert memory.shape_of("llama-65b").parameters == by_hand == 65_285_660_672


def test_full_fine_tuning_has_12_bytes_a_number_before_activations():
    found = memory.predict("llama-7b", "full", length=8).parts
    numbers = memory.shape_of("llama-7b").parameters
    assert found["unquantized weights"] + found["gradients"] + found["optimizer"] == 12 * numbers


def test_a_4_bit_matrix_costs_codes_scales_and_their_scales():
    found = memory.predict("llama-7b", "qlora").parts
    numbers = memory.shape_of("llama-7b").in_linears
    assert found["codes"] == numbers // 2 and found["scales"] == numbers // 64
    bits = 8 * (found["codes"] + found["scales"] + found["second-level scales"]) / numbers
    assert bits == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize("name", memory.NAMED)
@pytest.mark.parametrize("work", [Work(2, 64, full=True), Work(3, 32, rank=5)], ids=["full", "lora"])
def test_activations_are_what_autograd_keeps_of_transformers_own_code(name, work):
    shape = memory.shape_of(name)
    assert activations.kept(shape, work) == sum(memory.kept_on_meta(shape, work).values())


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_small_step_allocates_what_is_predicted(method, checkpointing):
    model, _ = models.tiny(dtype=torch.bfloat16)
    loss = steps.convert(model, method)
    line = memory.timeline(steps.stages(model, loss, 4, 128, checkpointing))
    expected = memory.predict(model.config, method, batch=4, length=128, checkpointing=checkpointing)
    assert line.peak == pytest.approx(expected.moving, rel=0.10)


def test_every_knob_moves_the_prediction_the_right_way():
    small = memory.predict("llama-7b", "qlora", rank=8, checkpointing=True).peak
    for more in (
        {"rank": 64},
        {"length": 4096},
        {"batch": 8},
        {"checkpointing": False},
        {"double_quant": False},
    ):
        assert memory.predict("llama-7b", "qlora", **({"rank": 8, "checkpointing": True} | more)).peak > small


def test_the_config_that_is_given_stays_as_it_was():
    config = LlamaConfig(hidden_size=64, intermediate_size=192, num_hidden_layers=1, vocab_size=100)
    before = config.to_dict()
    memory.predict(config, "lora")
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "half"}, "method: expected one of full, lora, qlora"),
        ({"length": 0}, "length: expected a whole number of at least 1; got 0"),
        ({"batch": 1.5}, "batch: expected a whole number"),
        ({"dtype": torch.int8}, "dtype: expected"),
        ({"scored": 10_000}, "scored: expected 0 to 511 tokens"),
        ({"method": "full", "loss": "answer"}, "loss: expected 'library'"),
        ({"checkpointing": "False"}, "checkpointing: expected True or False; got 'False'"),
        ({"double_quant": 1}, "double_quant: expected True or False; got 1"),
        ({"master_weights": True}, "master_weights: what is trained has 32 bits already"),
        ({"batch": None}, "batch: expected a whole number"),
        ({"method": "full", "rank": 0}, "rank: expected a whole number"),
        ({"method": "lora", "block_size": 63}, "block_size: expected one of"),
        ({"targets": ["q_porj"]}, "targets: expected names among"),
        ({"targets": []}, "targets: expected at least one name"),
    ],
)
def test_an_argument_that_is_none_of_these_is_named(changes, says):
    with pytest.raises(ValueError, match=says):
        memory.predict("llama-7b", **changes)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"model_type": "llama", "hiden_size": 64}, "no setting 'hiden_size'. Was 'hidden_size' meant"),
        ({"model_type": "lama"}, "such as llama"),
        ({}, '"model_type"'),
        ("", "got ''"),
    ],
    ids=str,
)
def test_a_model_that_is_mistyped_is_refused(model, says):
    with pytest.raises(ValueError, match=says):
        memory.predict(model)


def test_a_models_own_config_file_is_taken_as_it_is():
    config = LlamaConfig(hidden_size=64, intermediate_size=192, num_hidden_layers=1, vocab_size=100)
    written = json.loads(config.to_json_string(use_diff=False)) | {"torch_dtype": "bfloat16", "auto_map": {}}
    assert memory.shape_of(written).parameters == memory.shape_of(config).parameters


@pytest.mark.parametrize("changes", [{"rows": -2}, {"length": 0}, {"rank": True}, {"itemsize": 3}], ids=str)
def test_a_pass_through_the_model_has_a_size(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: expected"):
        Work(**changes)


def test_activations_of_a_mistyped_target_are_refused():
    with pytest.raises(ValueError, match=r"targets: expected some of .*; got q_porj"):
        activations.kept(memory.shape_of("llama-7b"), Work(targets=frozenset({"q_porj"})))


def test_a_timeline_of_nothing_is_refused():
    with pytest.raises(ValueError, match="stages: expected at least one function"):
        memory.timeline({})
