"""A model built layer by layer: its bytes are those predicted, and its step is a step."""

import pytest
import torch
from torch import nn

from qlora_edu import bigstep, memory
from qlora_edu.qlora import NF4Linear, QLoRALinear

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 11,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def shape(request):
    return TINY | {"tie_word_embeddings": request.param}


def test_every_byte_of_the_model_is_where_the_prediction_has_it(shape):
    model = bigstep.build(shape, rank=4, said=lambda _: None)
    layers = [m for m in model.modules() if isinstance(m, QLoRALinear)]
    assert [type(m) for m in model.modules() if isinstance(m, nn.Linear)] == [nn.Linear]  # the output layer
    assert len(layers) == 7 * 11 and not any(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    plan = bigstep.predicted(shape, rank=4, length=8, batch=1)
    stored = [layer.base.quantized for layer in layers]
    assert sum(q.packed.nbytes for q in stored) == plan.at_peak["codes"]
    assert sum(q.nbytes - q.packed.nbytes for q in stored) == (
        plan.at_peak["scales"] + plan.at_peak["second-level scales"]
    )
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert trained == plan.at_peak["adapter"]
    frozen = {p.data_ptr(): p.nbytes for p in model.parameters() if not p.requires_grad}
    assert sum(frozen.values()) == plan.at_peak["unquantized weights"]


def test_a_step_trains_all_adapters_and_nothing_else(shape):
    model = bigstep.build(shape, rank=4, said=lambda _: None)
    seen = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_hook(lambda g, name=name: seen.__setitem__(name, g.abs().max().item()))
    found = bigstep.step(model, length=16, batch=2)
    assert list(found) == ["states", "forward", "backward", "update"]
    assert all(part["seconds"] > 0 and part["peak"] > 0 for part in found.values())
    assert seen and all("lora_" in name for name in seen)
    assert all(seen[name] > 0 for name in seen if name.endswith("lora_b"))
    logits = model(torch.arange(10)[None]).logits
    assert logits.isfinite().all() and logits.std() > 0


def test_the_weights_are_random_and_the_same_each_time(shape):
    first, again = (bigstep.build(shape, rank=2, said=lambda _: None) for _ in range(2))
    packed = [
        [m.base.weight for m in model.modules() if isinstance(m, QLoRALinear)] for model in (first, again)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*packed, strict=True))
    assert len({p.numpy().tobytes() for p in packed[0]}) == len(packed[0])
    layer = next(m for m in first.modules() if isinstance(m, NF4Linear))
    assert 0.015 < layer.quantized.dequantize().float().std() < 0.025


def test_what_does_not_fit_is_refused_with_the_sum(monkeypatch, capsys):
    plan = bigstep.predicted("llama-65b", 16, 64, 1)
    with pytest.raises(bigstep.TooLarge, match=r"llama-65b: the step takes 38\.\d GB, and 16\.0 GB are free"):
        bigstep.check_room(plan, 16_000_000_000)
    bigstep.check_room(plan, 40_000_000_000)
    monkeypatch.setattr(bigstep.limits, "memory_available", lambda: 16_000_000_000)
    monkeypatch.setattr(bigstep, "build", None)
    assert bigstep.main(["--shape", "llama-65b"]) == 2
    said = capsys.readouterr().err
    terms = [float(term.split()[-1]) for term in said.splitlines()[1].removeprefix("GB: ").split(" + ")]
    assert abs(sum(terms) - (plan.peak + bigstep.PROCESS) / 1e9) < 0.01 * len(terms)


def test_33b_is_predicted_under_24_gb_and_7b_under_6():
    for shape, limit in (("llama-33b", 24e9), ("llama-7b", 6e9)):
        assert bigstep.predicted(shape, 16, 64, 1).peak + bigstep.PROCESS < limit


def test_the_command_prints_predicted_and_measured(capsys):
    assert bigstep.main(["--shape", "smollm2-135m", "--rank", "2", "--length", "8", "--json"]) == 0
    said = capsys.readouterr().out
    assert "0.5159 bytes a quantized weight" in said and "measured without the process / predicted" in said
    assert '"bytes_a_weight": 0.515' in said.splitlines()[-1]


def test_the_peak_is_measured_with_room_that_a_larger_model_would_not_notice():
    """A fresh process: what it takes beyond the prediction is what torch and the allocator keep, whatever the model."""
    found = memory.in_fresh_process("qlora_edu.bigstep:run", "smollm2-135m", 16, 64, 1)
    beyond = found["peak"] - found["process"] - found["predicted_peak"]
    assert -20_000_000 < beyond < 150_000_000
