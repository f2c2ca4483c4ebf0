"""Block-wise 4-bit quantization against bitsandbytes (all bits), a float64 search for the nearest level, and itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_edu import blockwise, codebooks, models
from qlora_edu.blockwise import BLOCK_SIZES, FLOATS, QuantizedTensor, quantize
from qlora_edu.parity import _pairs, differing, row, stored_weights

shapes = st.one_of(
    st.tuples(st.integers(1, 3_000)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40)),
)
floats = st.sampled_from(FLOATS)
block_sizes = st.sampled_from(BLOCK_SIZES)
names = st.sampled_from(list(codebooks.CODEBOOKS))
starts = st.integers(0, 50_000)
few = settings(deadline=None, max_examples=40)


def make(shape, start=0, dtype=torch.float32):
    return stored_weights(torch.Size(shape).numel(), start).view(shape).to(dtype)


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether two quantized tensors hold the same bits."""
    pairs = [(a.packed, b.packed), (a.scales(), b.scales())]
    facts = [(q.codebook, q.block_size, q.shape, q.dtype) for q in (a, b)]
    return facts[0] == facts[1] and not any(differing(*pair)[1] for pair in pairs)


@few
@given(shapes, starts, floats, block_sizes, st.sampled_from(["nf4", "fp4"]), st.booleans())
def test_every_bit_is_that_of_bitsandbytes(shape, start, dtype, block_size, codebook, double_quant):
    result = row("", *_pairs(make(shape, start, dtype).flatten(), block_size, codebook, double_quant))
    assert result.compared > 0 and result.mismatches == 0


@pytest.mark.parametrize("double_quant", [False, True])
def test_every_bit_is_that_of_bitsandbytes_on_real_weights(double_quant):
    model, _ = models.load(models.SMOLLM2, dtype=torch.bfloat16, progress=False)
    layer = model.model.layers[7]
    for weight in (layer.mlp.down_proj.weight, layer.self_attn.k_proj.weight):
        result = row("", *_pairs(weight.detach(), 64, "nf4", double_quant))
        assert result.compared > weight.numel() and result.mismatches == 0


@few
@given(shapes, starts, floats, block_sizes, names)
def test_a_code_belongs_to_the_nearest_level_times_the_scale(shape, start, dtype, block_size, codebook):
    """The oracle searches all 16 levels in float64. Two float32 roundings may decide a near-tie the other way."""
    weight = make(shape, start, dtype)
    stored = quantize(weight, block_size, codebook)
    flat = weight.double().flatten()
    scales = flat.abs().split(block_size)
    scale = torch.cat([block.amax().expand(len(block)) for block in scales])
    distances = (flat[:, None] - codebooks.table(codebook)[0].double() * scale[:, None]).abs()
    chosen = (flat - stored.dequantize(torch.float32).flatten()).abs()
    assert (chosen <= distances.amin(dim=1) + 3e-7 * scale).all()


@few
@given(shapes, starts, floats, block_sizes, names, st.booleans())
def test_quantizing_the_decoded_weights_again_changes_nothing(
    shape, start, dtype, block_size, codebook, double_quant
):
    once = quantize(make(shape, start, dtype), block_size, codebook, double_quant)
    twice = quantize(once.dequantize(), block_size, codebook)
    if codebook == "nf4":  # the others have two codes for zero
        assert torch.equal(once.packed, twice.packed)
    if not double_quant:  # there the new scale is that of the 8-bit one, rounded to the dtype
        assert torch.equal(once.dequantize(), twice.dequantize())


@few
@given(shapes, starts, floats, block_sizes, names)
def test_fast_decoding_is_the_definition(shape, start, dtype, block_size, codebook):
    stored = quantize(make(shape, start, dtype), block_size, codebook)
    for target in FLOATS:
        plain = blockwise.decode(stored.packed, stored.scales(), codebook, block_size, stored.numel)
        assert differing(stored.dequantize(target), plain.view(shape).to(target)) == (stored.numel, 0)


@given(st.lists(st.integers(0, 15), min_size=2, max_size=100).filter(lambda codes: len(codes) % 2 == 0))
def test_packing_and_back(codes):
    packed = blockwise.pack(torch.tensor(codes, dtype=torch.uint8))
    assert blockwise.unpack(packed).tolist() == codes
    assert packed.tolist() == [16 * high + low for high, low in zip(codes[::2], codes[1::2], strict=True)]


@few
@given(st.integers(2, 70), st.integers(2, 70), starts, floats)
def test_a_tensor_that_is_not_contiguous_counts_as_its_values(rows, columns, start, dtype):
    base = make((rows, columns), start, dtype)
    wide = make((rows, 2 * columns), start, dtype)
    views = [
        base.T,
        wide[:, ::2],
        wide[:, columns:],
        base[:1].expand(rows, columns),
        base.flip(0),
        base[0, 0],
    ]
    for view in views:
        assert same(quantize(view), quantize(view.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 63, 64, 1_001])
def test_the_input_is_left_as_it_was(count, dtype):
    weight = torch.nn.Parameter(make((count,), dtype=dtype))
    before = weight.detach().clone()
    stored = quantize(weight, double_quant=True)
    stored.dequantize().fill_(9)
    assert differing(weight, before) == (count, 0)
    assert weight.requires_grad and not stored.dequantize().requires_grad


def test_one_thread_or_two_give_the_same_bits():
    weight = make((1_000, 1_111))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(quantize(weight, double_quant=True))
            found[-1] = (found[-1], found[-1].dequantize())
    finally:
        torch.set_num_threads(before)
    assert same(found[0][0], found[1][0])
    assert differing(found[0][1], found[1][1]) == (weight.numel(), 0)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3, 5), (2, 3, 7), (128, 64)])
def test_shape_dtype_and_size_are_kept(shape):
    stored = quantize(make(shape, dtype=torch.bfloat16), 32)
    count = torch.Size(shape).numel()
    assert (stored.numel, stored.shape, stored.dtype) == (count, shape, torch.bfloat16)
    assert stored.nbytes == (count + 1) // 2 + 4 * -(-count // 32)
    assert stored.dequantize().shape == shape and stored.dequantize().dtype == torch.bfloat16
    assert stored.dequantize(torch.float16).dtype == torch.float16


def test_out_is_written_into_and_decides_the_dtype():
    stored = quantize(make((7, 9)))
    out = torch.full((7, 9), 5.0, dtype=torch.bfloat16)
    assert stored.dequantize(out=out) is out
    assert torch.equal(out, stored.dequantize(torch.bfloat16))


def test_moving_keeps_every_bit_and_a_dtype_is_no_device():
    stored = quantize(make((8, 64)), double_quant=True)
    assert same(stored.to("cpu"), stored)
    with pytest.raises(TypeError):
        stored.to(torch.bfloat16)  # codes as floats would be nonsense


def test_quantized_tensors_compare_by_identity():
    a, b = quantize(make((64,))), quantize(make((64,)))
    assert a == a and a != b and len({a, b}) == 2


def test_under_inference_mode_and_without_it():
    with torch.inference_mode():
        inside = quantize(make((65, 3)), 32, "fp4")
    assert same(inside, quantize(make((65, 3)), 32, "fp4"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 63, 64, 70])  # whole blocks and the short last one
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_inf_are_refused_and_found(value, where, dtype):
    weight = make((71,), dtype=dtype)
    weight[where] = value
    with pytest.raises(
        ValueError, match=rf"weight: expected finite values; got {value} at flat index {where} "
    ):
        quantize(weight)


WRONG = [
    ({"weight": [1.0, 2.0]}, TypeError, r"weight: expected a torch\.Tensor; got list"),
    ({"weight": torch.ones(4, dtype=torch.int32)}, TypeError, r"weight: expected float32.*got torch\.int32"),
    ({"weight": torch.ones(4).double()}, TypeError, r"got torch\.float64. Convert it first"),
    ({"weight": torch.ones(4, dtype=torch.complex64)}, TypeError, r"got torch\.complex64"),
    ({"weight": torch.ones(4, dtype=torch.bool)}, TypeError, r"got torch\.bool"),
    ({"weight": torch.ones(4, device="meta")}, ValueError, r"weight: .*meta device"),
    ({"weight": torch.ones(0)}, ValueError, r"weight: expected at least one element; got shape \(0,\)"),
    ({"weight": torch.ones(3, 0)}, ValueError, r"got shape \(3, 0\)"),
    ({"codebook": "nf3"}, ValueError, r"codebook: expected one of nf4, fp4, int4; got 'nf3'"),
    *[
        ({"block_size": size}, ValueError, rf"block_size: expected one of .*4096\); got {size!r}")
        for size in (0, -64, 16, 63, 8192, "64", 64.0, True, None)
    ],
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[str(case[0])[:40] for case in WRONG])
def test_what_cannot_be_quantized_is_refused_by_name(wrong, error, message):
    with pytest.raises(error, match=message):
        quantize(**{"weight": make((64,))} | wrong)


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(9, 7),
        torch.empty(7, 9, dtype=torch.float64),
        torch.empty(9, 7).T,
        torch.empty(7, 9, dtype=torch.uint8),
    ],
)
def test_an_out_that_does_not_fit_is_refused(out):
    with pytest.raises(ValueError, match=r"out: expected a contiguous float tensor of shape \(7, 9\); got"):
        quantize(make((7, 9))).dequantize(out=out)


def test_a_dtype_that_is_no_float_of_ours_is_refused():
    with pytest.raises(ValueError, match=r"dtype: expected float32, bfloat16 or float16; got torch\.int8"):
        quantize(make((7, 9))).dequantize(torch.int8)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 70, 129])
@pytest.mark.parametrize("dtype", FLOATS)
def test_blocks_of_zeros_decode_to_zeros(count, dtype):
    weight = torch.zeros(count, dtype=dtype)
    assert row("", *_pairs(weight, 64, "nf4", False)).mismatches == 0
    assert not quantize(weight).dequantize().any()


def test_whole_blocks_are_multiplied_by_the_inverse_and_the_short_last_one_divided():
    """Next to a threshold the two differ: such weights are sought here, and bitsandbytes agrees about each."""
    scale = stored_weights(400).abs().clamp(min=0.1)[:, None]
    steps = torch.arange(-3, 4, dtype=torch.int32)
    near = (codebooks.table("nf4")[1] * scale).view(torch.int32)[:, :, None] + steps
    near, scale = near.view(torch.float32).flatten(1), scale.expand(-1, 15 * 7)
    multiplied, divided = (
        blockwise.encode(x, "nf4").view(scale.shape) for x in (near * (1 / scale), near / scale)
    )
    rows, columns = (multiplied != divided).nonzero(as_tuple=True)
    assert len(rows) > 20
    for i, j in zip(rows[:40].tolist(), columns[:40].tolist(), strict=True):
        short = torch.stack([near[i, j], scale[i, 0]])
        whole = torch.cat([short, torch.zeros(62)])
        assert blockwise.unpack(quantize(whole).packed)[0] == multiplied[i, j]
        assert blockwise.unpack(quantize(short).packed)[0] == divided[i, j]
        assert row("", *_pairs(whole, 64, "nf4", False), *_pairs(short, 64, "nf4", False)).mismatches == 0


def test_an_odd_number_of_codes_is_not_packed():
    with pytest.raises(ValueError, match="codes: expected an even number; got 3"):
        blockwise.pack(torch.zeros(3, dtype=torch.uint8))
