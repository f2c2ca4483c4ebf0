"""The layout of a 4-bit checkpoint, byte for byte that of bitsandbytes, in both directions."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_edu import reference
from qlora_edu.blockwise import BLOCK_SIZES, FLOATS, quantize
from qlora_edu.parity import differing, stored_weights
from qlora_edu.qlora import NF4Linear
from qlora_edu.storage import from_stored, to_stored

STATE = ".quant_state.bitsandbytes__nf4"
shapes = st.one_of(
    st.tuples(st.integers(1, 2_000)), st.tuples(st.integers(1, 40), st.sampled_from([1, 7, 64, 96]))
)


def weights(shape=(24, 128), dtype=torch.float32):
    return stored_weights(torch.Size(shape).numel()).view(shape).to(dtype)


def linear(dtype=torch.float32, bias=True) -> nn.Linear:
    layer = nn.Linear(128, 24, bias=bias, dtype=dtype)
    layer.weight.data = weights(dtype=dtype)
    if bias:
        layer.bias.data = weights((24,), dtype)
    return layer


def stored_by_bitsandbytes(weight, block_size, codebook, double_quant):
    packed, state = reference.quantize(weight, block_size, codebook, double_quant)
    names = {name.removeprefix("weight"): value for name, value in state.as_dict(packed=True).items()}
    return {"": packed} | {f".{name}": value for name, value in names.items()}


def assert_same(a, b):
    assert set(a) == set(b)
    for name in a:
        assert differing(a[name], b[name])[1] == 0, name


@settings(deadline=None, max_examples=40)
@given(
    shapes,
    st.sampled_from(FLOATS),
    st.sampled_from(BLOCK_SIZES),
    st.sampled_from(["nf4", "fp4"]),
    st.booleans(),
)
def test_every_byte_is_what_bitsandbytes_writes(shape, dtype, block_size, codebook, double_quant):
    weight = weights(shape, dtype)
    ours = to_stored(quantize(weight, block_size, codebook, double_quant))
    theirs = stored_by_bitsandbytes(weight, block_size, codebook, double_quant)
    if codebook == "fp4":  # the sign of its second zero is not stored here
        theirs[".quant_map"] = theirs[".quant_map"] + 0.0
    theirs[""] = theirs[""].reshape(-1, 1)
    assert_same(ours, theirs)


@settings(deadline=None, max_examples=40)
@given(shapes, st.sampled_from(FLOATS), st.sampled_from(BLOCK_SIZES), st.booleans())
def test_what_bitsandbytes_wrote_is_read_to_the_last_bit(shape, dtype, block_size, double_quant):
    weight = weights(shape, dtype)
    found = from_stored(stored_by_bitsandbytes(weight, block_size, "nf4", double_quant))
    expected = quantize(weight, block_size, double_quant=double_quant)
    assert differing(found.dequantize(), expected.dequantize()) == (weight.numel(), 0)
    assert (found.shape, found.dtype, found.block_size) == (shape, dtype, block_size)
    assert found.double_quant == double_quant
    assert_same(to_stored(found), to_stored(expected))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_saved_layer_loads_into_bitsandbytes_and_back(tmp_path, dtype, double_quant):
    ours = NF4Linear.of(linear(dtype), torch.float32, double_quant=double_quant)
    path = tmp_path / "a folder with spaces" / "layer.safetensors"
    path.parent.mkdir()
    save_file(ours.state_dict(), path)
    tensors = load_file(path)

    bnb = reference.bitsandbytes()
    theirs = bnb.nn.Linear4bit(128, 24, compute_dtype=torch.float32, quant_type="nf4")
    theirs.bias.data = tensors.pop("bias")
    theirs.weight = bnb.nn.Params4bit.from_prequantized(
        data=tensors.pop("weight"), quantized_stats=tensors, device="cpu", module=theirs
    )
    x = weights((5, 128))
    assert differing(theirs(x), ours(x)) == (5 * 24, 0)

    back = NF4Linear.of(nn.Linear(128, 24, dtype=dtype), torch.float32)  # other weights
    back.load_state_dict({name: tensor.clone() for name, tensor in theirs.state_dict().items()})
    assert differing(back(x), ours(x)) == (5 * 24, 0)
    assert_same(back.state_dict(), ours.state_dict())


def test_a_float_view_of_the_codes_holds_the_same_bytes():
    """bitsandbytes can keep packed codes as bfloat16, so that FSDP takes them for weights."""
    stored = to_stored(quantize(weights()))
    viewed = stored | {"": stored[""].flatten().view(torch.bfloat16).unsqueeze(1)}
    assert_same(to_stored(from_stored(viewed)), stored)


def test_a_codebook_without_a_name_there_is_refused():
    with pytest.raises(ValueError, match="nf4 and fp4 only; got 'int4'"):
        to_stored(quantize(weights(), codebook="int4"))


def state(**changes):
    facts = json.loads(bytes(to_stored(quantize(weights(), double_quant=True))[STATE].tolist()))
    return torch.tensor(list(json.dumps(facts | changes).encode()), dtype=torch.uint8)


WRONG = {
    "no codes": ({"": None}, r"expected a packed weight"),
    "no scales": ({".absmax": None}, r"expected a packed weight, \".absmax\""),
    "no state": ({STATE: None}, r"one \".quant_state.bitsandbytes__"),
    "two states": ({".quant_state.bitsandbytes__fp4": state()}, r"one \".quant_state.bitsandbytes__"),
    "no JSON": ({STATE: torch.zeros(9, dtype=torch.uint8)}, r"does not describe a 4-bit tensor"),
    "a state of floats": ({STATE: torch.rand(9)}, r"does not describe a 4-bit tensor"),
    "an unknown dtype": ({STATE: state(dtype="float8")}, r"does not describe a 4-bit tensor"),
    "no dtype": ({STATE: state(dtype="load")}, r"unknown quant_type, blocksize or dtype"),
    "another codebook": ({STATE: state(quant_type="nf3")}, r"unknown quant_type"),
    "an odd block size": ({STATE: state(blocksize=63)}, r"unknown quant_type, blocksize"),
    "another shape": (
        {STATE: state(shape=[24, 129])},
        r"packed codes: expected 1548 of torch.uint8; got 1536",
    ),
    "a shape that is no list": ({STATE: state(shape=7)}, r"does not describe a 4-bit tensor"),
    "few codes": ({"": torch.zeros(5, 1, dtype=torch.uint8)}, r"packed codes: expected 1536 .*; got 5"),
    "few scales": ({".absmax": torch.zeros(5, dtype=torch.uint8)}, r"\.absmax: expected 48 .*; got 5"),
    "float scales": (
        {".absmax": torch.zeros(48)},
        r"\.absmax: expected 48 of torch.uint8; got 48 of .*float32",
    ),
    "few second-level scales": ({".nested_absmax": torch.zeros(3)}, r"\.nested_absmax: expected 1 "),
    "no second-level scales": ({".nested_absmax": None}, r"need \.nested_absmax"),
    "another second-level block": ({STATE: state(nested_blocksize=128)}, r"nested_blocksize of 256"),
    "other levels": ({".quant_map": torch.zeros(16)}, r"\.quant_map does not hold the levels of nf4"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_damaged_checkpoint_is_refused(what):
    change, message = WRONG[what]
    stored = to_stored(quantize(weights(), double_quant=True)) | change
    stored = {name: tensor for name, tensor in stored.items() if tensor is not None}
    with pytest.raises(ValueError, match=f"stored: .*{message}"):
        from_stored(stored)


def test_float_scales_are_not_taken_for_8_bit_ones():
    stored = to_stored(quantize(weights()))
    stored[".absmax"] = stored[".absmax"].to(torch.uint8)
    with pytest.raises(ValueError, match=r"\.absmax: expected 48 of torch.float32; got 48 of torch.uint8"):
        from_stored(stored)
