"""Every fast path against the plain line that defines it."""

import io
import threading

import psutil
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qlora_edu import blockwise, codebooks
from qlora_edu.kernels import decode, encode, low_rank, scratch
from qlora_edu.lora import LoRALinear
from qlora_edu.parity import differing, stored_weights
from qlora_edu.qlora import NF4Linear, QLoRALinear

NAMES = list(codebooks.CODEBOOKS)
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


def neighbours(values: torch.Tensor, ulps: int) -> torch.Tensor:
    """Every float32 within so many ulps of some values, both signs of zero and what lies around them included."""
    steps = torch.arange(-ulps, ulps + 1, dtype=torch.int32)
    near = (values.view(torch.int32)[:, None] + steps).flatten().view(torch.float32)
    tiny = torch.arange(ulps, dtype=torch.int32).view(torch.float32)  # +0 and the smallest subnormals
    near = torch.cat([near, tiny, -tiny])
    return near[near.abs() <= 1]  # a NaN is not


def assert_encoded_as_defined(x: torch.Tensor, codebook: str, device: str) -> None:
    """x: float32 in [-1, 1]."""
    x = F.pad(x, (0, -x.numel() % 32)).to(device)
    packed = torch.empty(x.numel() // 2, dtype=torch.uint8, device=device)
    encode.encode_into(packed, x, torch.ones(x.numel() // 32, device=device), codebook, 32)
    assert torch.equal(packed, blockwise.pack(blockwise.encode(x, codebook)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codebook", NAMES)
class TestEncode:
    def test_all_numbers_near_a_threshold_or_a_level(self, codebook, device):
        levels, thresholds, _ = codebooks.table(codebook)
        assert_encoded_as_defined(neighbours(torch.cat([levels, thresholds]), 2_000), codebook, device)

    def test_all_numbers_near_the_edge_of_a_cell(self, codebook, device):
        edges = torch.arange(encode.CELLS, dtype=torch.float64) / ((encode.CELLS - 1) / 2) - 1
        assert_encoded_as_defined(neighbours(edges.float(), 40), codebook, device)

    def test_every_bfloat16(self, codebook, device):
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
        assert_encoded_as_defined(patterns[patterns.abs() <= 1], codebook, device)

    def test_no_two_thresholds_share_a_cell(self, codebook, device):
        cells = encode.cell(codebooks.table(codebook, device)[1])
        assert (cells.diff() > 0).all() and 0 < cells.min() and cells.max() < encode.CELLS - 1


def test_the_ends_lie_in_the_first_and_the_last_cell():
    assert encode.cell(torch.tensor([-1.0, 1.0])).tolist() == [0, encode.CELLS - 1]


PIECE = decode.WEIGHTS_PER_PIECE


@pytest.mark.parametrize("count", [PIECE - 64, PIECE - 1, PIECE, PIECE + 1, PIECE + 64, 2 * PIECE + 4_097])
@pytest.mark.parametrize("block_size", [64, 4_096])
def test_pieces_meet_without_a_seam(count, block_size):
    assert encode.WEIGHTS_PER_PIECE == PIECE
    weight = stored_weights(count)
    stored = blockwise.quantize(weight, block_size)
    whole = count // block_size * block_size
    scales = torch.stack([block.abs().amax() for block in weight.split(block_size)])
    each = scales.repeat_interleave(block_size)[:count]
    x = torch.cat([weight[:whole] * (1 / each[:whole]), weight[whole:] / each[whole:]]).clamp(-1, 1)
    codes = blockwise.encode(F.pad(x, (0, count % 2)), "nf4")
    assert torch.equal(stored.packed, blockwise.pack(codes)) and torch.equal(stored.scales(), scales)
    assert differing(stored.dequantize(), codebooks.nf4()[codes.int()][:count] * each) == (count, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codebook", NAMES)
@pytest.mark.parametrize("dtype", blockwise.FLOATS)
def test_every_byte_is_decoded_as_defined(dtype, codebook, device):
    packed = torch.arange(256, dtype=torch.uint8, device=device).repeat(3)
    scales = stored_weights(packed.numel() * 2 // 32).abs().to(device)
    out = torch.full((packed.numel() * 2,), 7, dtype=dtype, device=device)
    found = decode.decode_into(out, packed, scales, codebook, 32)
    expected = blockwise.decode(packed, scales, codebook, 32, out.numel()).to(dtype)
    assert found is out and differing(out, expected) == (out.numel(), 0)


# The fused layer. Every step rounds to bfloat16 once, with a relative error of at most U; a float64 oracle of the same
# weights tells how much that may add up to, entry by entry. Sums are made in float32: the slack covers that.
U, SLACK = 2**-8, 1.05
R, IN, OUT, SCALING = 6, 192, 128, 16 / 6


def fused_layer(kind: str, bias: bool) -> LoRALinear:
    dense = nn.Linear(IN, OUT, bias=bias)
    dense.weight.data = stored_weights(OUT * IN).view(OUT, IN) / 20
    if bias:
        dense.bias.data = stored_weights(OUT, 3)
    if kind == "bfloat16":
        dense = dense.bfloat16()
    base = NF4Linear.of(dense) if kind == "nf4" else dense
    layer = (QLoRALinear if kind == "nf4" else LoRALinear)(base, R, 16, compute_dtype=torch.bfloat16)
    layer.lora_a.data = stored_weights(R * IN, 11).view(R, IN) / 14
    layer.lora_b.data = stored_weights(OUT * R, 17).view(OUT, R) / 10
    return layer


def exact(
    layer: LoRALinear, x: torch.Tensor, g: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For y and each gradient: its value in float64, and the magnitudes of all that is rounded on the way to it."""
    base = layer.base
    w = base.dequantized(torch.bfloat16).weight if isinstance(base, NF4Linear) else base.weight.bfloat16()
    w, a, b = w.double(), layer.lora_a.double(), layer.lora_b.double()
    bias = torch.zeros(OUT) if base.bias is None else base.bias.bfloat16()
    x, g, s, bias = x.double(), g.double(), layer.scaling, bias.double()
    y0, dx0, h, gh = x @ w.T + bias, g @ w, x @ a.T, s * g @ b
    size_h, size_gh = x.abs() @ a.abs().T, s * g.abs() @ b.abs()
    y, dx = y0 + s * h @ b.T, dx0 + gh @ a
    return {  # base rounded, sum rounded, and up to four roundings in each product of the update
        "y": (y, y0.abs() + y.abs() + 3 * s * size_h @ b.abs().T),
        "x": (dx, dx0.abs() + dx.abs() + 4 * size_gh @ a.abs()),
        "a": (gh.T @ x, 4 * size_gh.T @ x.abs()),
        "b": (s * g.T @ h, 3 * s * g.abs().T @ size_h),
    }


def run(layer: LoRALinear, x: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor | None]:
    layer.zero_grad()
    x = x.detach().clone().requires_grad_(x.requires_grad)
    y = layer(x)
    y.backward(g)
    return {"y": y.detach(), "x": x.grad, "a": layer.lora_a.grad, "b": layer.lora_b.grad}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_layer_is_as_exact_as_its_roundings_allow(kind, bias):
    layer = fused_layer(kind, bias)
    x = stored_weights(37 * IN, 23).view(37, IN).bfloat16().requires_grad_()
    g = stored_weights(37 * OUT, 29).view(37, OUT).bfloat16()
    fused = run(layer, x, g)
    for name, (value, magnitude) in exact(layer, x.detach(), g).items():
        error = (fused[name].double() - value).abs()
        assert (error <= U * SLACK * magnitude).all(), name
        # A bound can be loose: the error must also be small as a whole, where a wrong factor would show.
        assert error.norm() < 0.01 * value.norm(), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
def test_the_fused_layer_errs_not_much_more_than_its_definition(kind, bias):
    layer = fused_layer(kind, bias)
    x = stored_weights(37 * IN, 23).view(37, IN).bfloat16().requires_grad_()
    g = stored_weights(37 * OUT, 29).view(37, OUT).bfloat16()
    fused = run(layer, x, g)
    layer.compute_dtype = None
    plain = run(layer, x, g)
    for name, (value, _) in exact(layer, x.detach(), g).items():
        assert fused[name].dtype == plain[name].dtype and fused[name].shape == plain[name].shape
        errors = [(found[name].double() - value).norm() for found in (fused, plain)]
        if name in "yx":  # rounded to bfloat16 by both
            assert errors[0] <= 2 * errors[1], name
        else:  # the definition's gradients of A and B are made in float32
            assert errors[1] < 1e-5 * value.norm() and errors[0] <= U * value.norm(), name


def test_the_fused_layer_with_a_frozen_input_and_frozen_a():
    layer = fused_layer("nf4", True)
    x, g = stored_weights(5 * IN).view(5, IN).bfloat16(), torch.ones(5, OUT, dtype=torch.bfloat16)
    expected = run(layer, x.clone().requires_grad_(), g)
    frozen = run(layer, x, g)
    assert frozen["x"] is None
    assert all(torch.equal(frozen[name], expected[name]) for name in ("y", "a", "b"))
    layer.lora_a.requires_grad_(False)
    frozen = run(layer, x, g)
    assert frozen["a"] is None and torch.equal(frozen["b"], expected["b"])


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (2, 3), (2, 1, 3)])
def test_the_fused_layer_takes_any_leading_shape(shape):
    layer = fused_layer("nf4", True)
    x = stored_weights(torch.Size(shape).numel() * IN).view(*shape, IN).bfloat16().requires_grad_()
    y = layer(x)
    assert y.shape == (*shape, OUT)
    y.sum().backward()
    assert x.grad.shape == x.shape
    if x.numel():
        assert torch.equal(y.view(-1, OUT), layer(x.view(-1, IN)))


def test_the_fused_layer_takes_a_strided_input_and_gradient():
    layer = fused_layer("bfloat16", False)
    x = stored_weights(IN * 8).view(IN, 8).bfloat16()
    g = stored_weights(OUT * 8).view(OUT, 8).bfloat16()
    strided = run(layer, x.T.requires_grad_(), g.T)
    plain = run(layer, x.T.contiguous().requires_grad_(), g.T.contiguous())
    for name in plain:
        torch.testing.assert_close(strided[name], plain[name])


def test_an_input_that_was_overwritten_after_forward_is_noticed():
    layer = fused_layer("nf4", False)
    x = stored_weights(3 * IN).view(3, IN).bfloat16()
    y = layer(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives_of_the_fused_layer_are_refused():
    layer = fused_layer("nf4", False)
    x = stored_weights(3 * IN).view(3, IN).bfloat16().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_linear_with_update_by_its_own_name():
    base = nn.Linear(8, 4)
    a, b = stored_weights(3 * 8).view(3, 8), stored_weights(4 * 3, 9).view(4, 3)
    x = stored_weights(2 * 8, 50).view(2, 8)
    expected = base(x) + 0.7 * (x @ a.T) @ b.T
    torch.testing.assert_close(low_rank.linear_with_update(x, base, a, b, 0.7), expected)


class TestScratch:
    @pytest.fixture(autouse=True)
    def fresh(self):
        scratch.release()
        yield
        scratch.release()

    def test_one_memory_for_all_of_a_dtype(self):
        large = scratch.scratch((8, 16), torch.float32, torch.device("cpu"))
        small = scratch.scratch((3, 5), torch.float32, torch.device("cpu"))
        other = scratch.scratch((3, 5), torch.bfloat16, torch.device("cpu"))
        assert large.shape == (8, 16) and small.shape == (3, 5) and small.is_contiguous()
        assert large.data_ptr() == small.data_ptr() != other.data_ptr()

    def test_it_grows_and_old_views_stay_valid(self):
        small = scratch.scratch((4,), torch.float32, torch.device("cpu")).fill_(1)
        scratch.scratch((4_000,), torch.float32, torch.device("cpu")).fill_(2)
        assert small.tolist() == [1] * 4

    def test_each_thread_has_its_own(self):
        mine = scratch.scratch((4,), torch.float32, torch.device("cpu"))
        theirs = []
        thread = threading.Thread(
            target=lambda: theirs.append(scratch.scratch((4,), torch.float32, torch.device("cpu")))
        )
        thread.start()
        thread.join()
        assert theirs[0].data_ptr() != mine.data_ptr()

    def test_released_memory_is_not_handed_out_again(self):
        kept = scratch.scratch((4,), torch.float32, torch.device("cpu"))
        scratch.release()
        scratch.release()
        assert scratch.scratch((4,), torch.float32, torch.device("cpu")).data_ptr() != kept.data_ptr()

    def test_memory_made_in_inference_mode_serves_training(self):
        with torch.inference_mode():
            made = scratch.scratch((4,), torch.float32, torch.device("cpu"))
        assert not made.is_inference()


class TestFresh:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(), (0,), (3, 5), (4099, 2053)], ids=str)
    def test_a_tensor_of_its_own(self, shape, dtype):
        tensor = scratch.fresh(shape, dtype, torch.device("cpu"))
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert not tensor._is_view() and not tensor.requires_grad
        other = scratch.fresh(shape, dtype, torch.device("cpu"))
        tensor.fill_(1), other.fill_(2)
        assert (tensor == 1).all() and (other == 2).all()

    def test_large_memory_is_given_back(self):
        process = psutil.Process()
        tensor = scratch.fresh((2**28,), torch.uint8, torch.device("cpu")).fill_(1)
        full = process.memory_info().rss
        del tensor
        assert full - process.memory_info().rss > 0.9 * 2**28

    def test_it_trains_and_is_saved_as_any_other(self):
        parameter = nn.Parameter(scratch.fresh((2**22,), torch.float32, torch.device("cpu")).fill_(3))
        parameter.square().sum().backward()
        with torch.no_grad():
            parameter -= parameter.grad / 2
        assert not parameter.any()
        file = io.BytesIO()
        torch.save(parameter.detach(), file)
        assert torch.equal(torch.load(io.BytesIO(file.getvalue()), weights_only=True), parameter.detach())

    def test_without_large_pages_it_is_plain_memory(self, monkeypatch):
        class Refused:
            def __init__(self, *_, **__):
                raise OSError(22, "Invalid argument")

        monkeypatch.setattr(scratch.mmap, "mmap", Refused)
        assert scratch.fresh((2**23,), torch.float32, torch.device("cpu")).shape == (2**23,)
        monkeypatch.delattr(scratch.mmap, "MADV_HUGEPAGE", raising=False)
        assert scratch.fresh((2**23,), torch.float32, torch.device("cpu")).shape == (2**23,)

    def test_too_much_and_other_devices_are_torchs_matter(self):
        with pytest.raises(RuntimeError, match="allocate"):
            scratch.fresh((2**50,), torch.float32, torch.device("cpu"))
        assert scratch.fresh((2**30,), torch.float32, torch.device("meta")).is_meta
