"""Counting an adapter by formula equals counting the tensors of one, and the published numbers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPTNeoXConfig, LlamaConfig, LlamaForCausalLM

from qlora_edu import counts
from qlora_edu.memory.shapes import shape_of

SMALL = LlamaConfig(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


@pytest.mark.parametrize("r", [1, 5])
@pytest.mark.parametrize("targets", [counts.QUERY_VALUE, counts.ALL_LINEAR])
def test_the_formula_is_what_peft_trains(r, targets):
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(SMALL), LoraConfig(r=r, target_modules=list(targets)))
    trained, total = model.get_nb_trainable_parameters()
    assert counts.adapter(SMALL, r, targets) == trained
    assert counts.share(SMALL, r, targets) == pytest.approx(100 * trained / (total - trained))
    assert counts.counted(model) == (trained, total)


def test_published_numbers():
    """LoRA, table 4: 4.7 M and 37.7 M trainable for GPT-3; LLaMA-7B as counted by everyone."""
    assert [round(counts.gpt3_adapter(r) / 1e6, 1) for r in (1, 8)] == [4.7, 37.7]
    assert shape_of("llama-7b").parameters == 6_738_415_616
    assert counts.adapter("llama-7b", 8, counts.QUERY_VALUE) == 4_194_304


def test_packed_bytes_counted_as_parameters_give_the_number_that_was_printed():
    """huggingface/peft#1020: 8,650,752 of 10,597,552,128 for a model of 20 billion."""
    shape = shape_of(GPTNeoXConfig())
    trained = counts.adapter(shape, 8, ["query_key_value"])
    assert (trained, counts.as_packed(shape) + trained) == (8_650_752, 10_597_552_128)


def test_a_model_on_the_meta_device_has_the_shapes_and_no_memory():
    model = counts.on_meta("llama-65b")
    assert all(p.is_meta for p in model.parameters())
    assert counts.counted(model)[1] == shape_of("llama-65b").parameters


@pytest.mark.parametrize("r", [0, -1, 2.0, True, None])
def test_a_rank_that_is_none_is_refused(r):
    for count in (counts.gpt3_adapter, lambda r: counts.adapter(SMALL, r)):
        with pytest.raises(ValueError, match="r: expected a whole number of at least 1"):
            count(r)


def test_unknown_targets_are_refused_by_name():
    with pytest.raises(ValueError, match="nonsense"):
        counts.adapter(SMALL, 8, ["nonsense"])
