"""Whole 4-bit models, saved by either side and loaded by the other."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_edu import checkpoints, lora, models, parity, qlora, reference


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


def logits(model):
    ids = torch.arange(40).view(2, 20) * 7 % 270
    with torch.no_grad():
        return model.train()(input_ids=ids).logits


def quantized(dtype, **options):
    model, _ = models.tiny(dtype=dtype)
    qlora.quantize_model(model, **options)
    return model


@pytest.mark.parametrize("double_quant", [False, True])
def test_saved_here_loaded_by_transformers(tmp_path, dtype, double_quant):
    mine = quantized(dtype, double_quant=double_quant)
    checkpoints.save_quantized(mine, tmp_path)
    reference.bitsandbytes()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=dtype)
    assert sum(type(m).__name__ == "Linear4bit" for m in theirs.modules()) == 14
    assert parity.differing(logits(mine), logits(theirs)) == (2 * 20 * 273, 0)


@pytest.mark.parametrize("double_quant", [False, True])
def test_saved_by_transformers_loaded_here(tmp_path, dtype, double_quant):
    base, _ = models.tiny(dtype=dtype)
    base.save_pretrained(tmp_path / "base")
    theirs = reference.load_4bit(tmp_path / "base", compute_dtype=dtype, double_quant=double_quant)
    theirs.save_pretrained(tmp_path / "4bit")
    mine = checkpoints.load_quantized(tmp_path / "4bit")
    names = [name for name, m in mine.named_modules() if isinstance(m, qlora.NF4Linear)]
    assert len(names) == 14
    for name in names:
        codes = theirs.get_submodule(name).weight
        assert torch.equal(mine.get_submodule(name).weight, codes.flatten())
        assert mine.get_submodule(name).quantized.double_quant is double_quant
    assert parity.differing(logits(mine), logits(theirs)) == (2 * 20 * 273, 0)


def test_saved_and_loaded_here_the_file_is_the_same(tmp_path, dtype):
    first = checkpoints.save_quantized(quantized(dtype), tmp_path / "first")
    second = checkpoints.save_quantized(checkpoints.load_quantized(first), tmp_path / "second")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_a_loaded_model_can_be_trained(tmp_path):
    model = checkpoints.load_quantized(checkpoints.save_quantized(quantized(torch.bfloat16), tmp_path))
    lora.add_lora(model, r=4)
    logits_before = logits(model)
    model.train()(input_ids=torch.arange(20).view(1, 20), labels=torch.arange(20).view(1, 20)).loss.backward()
    assert all(p.grad is not None for p in lora.adapter_parameters(model))
    assert torch.equal(logits_before, logits(model))


def test_what_cannot_be_saved_is_refused(tmp_path):
    plain, _ = models.tiny()
    with pytest.raises(ValueError, match="expected 4-bit layers of one kind; got none"):
        checkpoints.save_quantized(plain, tmp_path / "x")
    adapted = quantized(torch.float32)
    lora.add_lora(adapted)
    with pytest.raises(ValueError, match="has an adapter"):
        checkpoints.save_quantized(adapted, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_loaded_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        checkpoints.load_quantized(tmp_path)
    models.tiny()[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not stored in 4 bits"):
        checkpoints.load_quantized(tmp_path)
