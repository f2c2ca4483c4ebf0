"""The set-up cell, and the stacks that chapters and benchmark compare."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_edu import course, doctor, lora, models, parity, qlora, reference, stacks


def test_the_setup_cell_says_what_it_found(capsys):
    device, dtype = course.begin()
    said = capsys.readouterr().out
    assert f"torch {torch.__version__}" in said
    assert str(dtype).removeprefix("torch.") in said
    assert (device.type == "cuda") == torch.cuda.is_available()
    assert dtype == models.pick_dtype(device)[0]
    assert reference.bitsandbytes().nn.modules.has_avx512bf16() is False


@pytest.mark.parametrize(("many", "expected"), [(5e-3, 1), (1e-4, 2)])
def test_threads_that_wait_for_busy_cores_are_not_used(monkeypatch, capsys, many, expected):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(doctor, "product_seconds", lambda threads: many if threads == 2 else 2e-4)
    try:
        course.begin()
        assert torch.get_num_threads() == expected
        assert ("slower on this machine" in capsys.readouterr().out) is (expected == 1)
    finally:
        torch.set_num_threads(before)


def test_an_unknown_stack_is_named():
    with pytest.raises(ValueError, match="expected one of course, course16, libraries, lora16; got 'peft'"):
        stacks.build("peft")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says there what is mapped")
def test_a_4_bit_stack_lets_go_of_the_16_bit_file():
    code = (
        "from qlora_edu import stacks; stack = stacks.build('course'); "
        "print(open('/proc/self/maps').read().count('model.safetensors'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "0"


def test_all_stacks_start_from_the_same_adapter_and_loss():
    """As loaded, the two 4-bit stacks are one function and draw one adapter, and so are the two 16-bit ones: the course
    differs only in rounding."""
    from qlora_edu import memory, training

    batch = training.Batch.of(memory.random_rows(1, 12), 0)
    for here, there in (("course", "libraries"), ("course16", "lora16")):
        built = {name: stacks.build(name) for name in (here, there)}
        mine = next(iter(lora.lora_layers(built[here].model).values())).lora_a
        theirs = next(p for n, p in built[there].model.named_parameters() if "lora_A" in n)
        assert parity.differing(mine, theirs) == (8 * 576, 0)
        with torch.no_grad():
            losses = [stack.loss(stack.model.train(), batch, batch.scored).item() for stack in built.values()]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_wrong_dtype_is_refused_before_anything_is_quantized():
    model, _ = models.tiny()
    with pytest.raises(TypeError, match=r"compute_dtype: expected .* got 'bfloat16'"):
        qlora.add_qlora(model, compute_dtype="bfloat16")
    assert not any(isinstance(module, qlora.NF4Linear) for module in model.modules())
