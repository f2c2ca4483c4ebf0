"""The Triton kernels against the lines of torch that define them: on a GPU, or else in Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_edu import blockwise, codebooks
from qlora_edu.parity import BLOCK_SIZES, DTYPES, ODD_SIZES, differing, stored_weights

triton = pytest.importorskip("triton", reason="needs Triton, which has no package for this system")
from qlora_edu.kernels import choice, triton_decode, triton_product  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = list(codebooks.CODEBOOKS)
SHAPES = [(1, 2), (2, 6), (3, 10), (5, 62), (64, 64), (65, 66), (70, 192), (130, 130)]
GUARD = 7.0


def quantized(shape, codebook="nf4", block_size=64, double_quant=False, dtype=torch.float32):
    weight = stored_weights(shape[0] * shape[1], 3).view(shape).to(dtype)
    return blockwise.quantize(weight, block_size, codebook, double_quant).to(DEVICE)


def defined(q: blockwise.QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight by the definition, on the CPU in plain torch."""
    q = q.to("cpu")
    return blockwise.decode(q.packed, q.scales(), q.codebook, q.block_size, q.numel).view(q.shape).to(dtype)


def test_without_a_gpu_the_interpreter_runs_the_kernels():
    assert triton_decode.INTERPRETED.value is (DEVICE == "cpu")


# --- decoding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook", NAMES)
@pytest.mark.parametrize("count", ODD_SIZES)
def test_every_size_decodes_as_defined_and_nothing_is_written_beyond_it(count, codebook, dtype):
    q = quantized((count, 1), codebook)
    buffer = torch.full((count + 5_000,), GUARD, dtype=dtype, device=DEVICE)
    out = buffer[:count]
    assert triton_decode.decode_into(out, q.packed, q.scales(), codebook, 64) is out
    assert differing(out.cpu(), defined(q, dtype).flatten()) == (count, 0)
    assert (buffer[count:] == GUARD).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size_decodes_as_defined(block_size, dtype):
    q = quantized((4_097, 3), block_size=block_size, double_quant=True)
    out = torch.empty(q.shape, dtype=dtype, device=DEVICE)
    triton_decode.decode_into(out.view(-1), q.packed, q.scales(), q.codebook, block_size)
    assert differing(out.cpu(), defined(q, dtype)) == (q.numel, 0)


def test_a_kernel_is_not_started_on_what_is_too_short():
    packed, scales = torch.zeros(32, dtype=torch.uint8, device=DEVICE), torch.ones(2, device=DEVICE)
    for out in (torch.empty(65, device=DEVICE), torch.empty(64, 2, device=DEVICE)[:, 0]):
        with pytest.raises(
            ValueError, match="out: expected a contiguous tensor of at most 64 weights in 2 blocks"
        ):
            triton_decode.decode_into(out, packed, scales, "nf4", 32)
    with pytest.raises(ValueError, match="64 weights in 1 blocks"):
        triton_decode.decode_into(torch.empty(64, device=DEVICE), packed, scales[:1], "nf4", 32)


def test_nothing_is_decoded_to_nothing():
    nothing = torch.empty(0, device=DEVICE)
    packed = torch.empty(0, dtype=torch.uint8, device=DEVICE)
    assert triton_decode.decode_into(nothing, packed, nothing, "nf4", 64).numel() == 0


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # NumPy's, in the interpreter: to infinity
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_number_is_rounded_as_torch_rounds(dtype):
    """Code 15 of NF4 is 1, so that each weight is its scale: here numbers of all exponents, near ties and subnormal."""
    tails = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001, 0xFFFF, 0x18000, 0x3000])
    bits = (torch.arange(0, 0x7F80, 3)[:, None] << 16) + tails  # finite, positive
    bits = bits.flatten()[bits.flatten() < 0x7F800000].int()
    scales = torch.cat(
        [bits.view(torch.float32), -bits.view(torch.float32), torch.tensor([torch.inf, -torch.inf])]
    )
    packed = torch.full((len(scales),), 0xFF, dtype=torch.uint8)
    out = torch.empty(2 * len(scales), dtype=dtype, device=DEVICE)
    triton_decode.decode_into(out, packed.to(DEVICE), scales.to(DEVICE), "nf4", 2)
    assert differing(out.cpu(), scales.to(dtype).repeat_interleave(2)) == (2 * len(scales), 0)
    out = triton_decode.decode_into(
        out[:2], packed[:1].to(DEVICE), torch.full((1,), torch.nan, device=DEVICE), "nf4", 2
    )
    assert out.isnan().all()


# --- products ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_with_the_identity_is_the_weight_in_every_bit(shape, dtype, double_quant):
    """Sums of one number and zeros are exact: this shows each weight at its place, whatever the order of addition."""
    q = quantized(shape, double_quant=double_quant)
    rows, columns = (torch.eye(n, dtype=dtype, device=DEVICE) for n in shape)
    w = defined(q, dtype) + 0.0  # -0 + 0 is 0
    assert differing(triton_product.product(columns, q).cpu(), w.T) == (q.numel, 0)
    assert differing(triton_product.product_back(rows, q).cpu(), w) == (q.numel, 0)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("codebook", NAMES)
def test_blocks_that_go_over_the_end_of_a_row(codebook, block_size):
    q = quantized((70, 118), codebook, block_size)
    rows, columns = (torch.eye(n, device=DEVICE) for n in q.shape)
    w = defined(q, torch.float32) + 0.0
    assert differing(triton_product.product(columns, q).cpu(), w.T) == (q.numel, 0)
    assert differing(triton_product.product_back(rows, q).cpu(), w) == (q.numel, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 15, 16, 17, 63, 65, 130])
def test_the_sums_are_float32_and_rounded_once(m, dtype):
    q = quantized((70, 322), double_quant=True)
    w = defined(q, dtype).double()
    unit = torch.finfo(dtype).eps / 2
    for function, width, matrix in (
        (triton_product.product, 322, w.T),
        (triton_product.product_back, 70, w),
    ):
        x = stored_weights(m * width, 11).view(m, width).to(dtype)
        found = function(x.to(DEVICE), q).cpu()
        exact, sizes = x.double() @ matrix, x.double().abs() @ matrix.abs()
        # width additions and products in float32, in any order; then one rounding to dtype
        bound = (
            (width + 1) * 2.0**-24 * sizes * 1.01 + unit * exact.abs() * 1.01 + 2.0**-24
        )  # float16's subnormals
        assert found.dtype == dtype and found.shape == exact.shape
        assert ((found.double() - exact).abs() <= bound).all()
        assert (found.double() - exact).norm() <= max(unit, 2.0**-21) * exact.norm()


def test_products_of_no_rows():
    q = quantized((4, 6))
    assert triton_product.product(torch.empty(0, 6, device=DEVICE), q).shape == (0, 4)
    assert triton_product.product_back(torch.empty(0, 4, device=DEVICE), q).shape == (0, 6)


def test_what_a_product_refuses():
    q, x = quantized((4, 6)), torch.zeros(3, 6, device=DEVICE)
    for bad in (x[:, :4], x[0], x.int(), x.T.contiguous().T, x[None]):
        with pytest.raises(ValueError, match=r"x: expected a contiguous float matrix \(m, 6\)"):
            triton_product.product(bad, q)
    with pytest.raises(ValueError, match=r"g: expected a contiguous float matrix \(m, 4\)"):
        triton_product.product_back(x, q)
    with pytest.raises(ValueError, match="weight: expected an even number of columns"):
        triton_product.product(x, quantized((4, 5)))


def test_the_kernels_are_short_enough_to_read():
    for module in (triton_decode, triton_product):
        lines = [line for line in open(module.__file__) if line.strip() and not line.strip().startswith("#")]
        kernels = "".join(lines).split('"""', 2)[2].split("\ndef ")[0]
        assert kernels.count("\n") <= 60


# --- where they are used -----------------------------------------------------------------------------------


def test_the_package_decodes_with_them_when_asked_and_autograd_notices(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "triton")
    for count in (1, 31, 64, 1_001):
        q = quantized((count, 3), double_quant=True, dtype=torch.bfloat16)
        assert choice.decoder(q.packed.device) is triton_decode
        out = torch.empty(q.shape, device=DEVICE)
        version = out._version
        assert differing(q.dequantize(out=out).cpu(), defined(q, torch.float32)) == (q.numel, 0)
        assert count < 64 or out._version > version


def test_they_compile_for_gpus_that_are_not_here():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "compile_triton.py", "80", "90"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    made = re.findall(r"^(80|90) (_\w+) (\w+) [1-9]\d+$", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and len(set(made)) == 2 * 3 * 3, done.stderr
