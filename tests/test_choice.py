"""Which kernels are chosen, and Numba's against the lines of torch that define them."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from qlora_edu import blockwise, codebooks
from qlora_edu.double_quantization import QuantizedScales
from qlora_edu.kernels import choice, encode, numba_codes, numba_lookup, team
from qlora_edu.parity import BLOCK_SIZES, DTYPES, ODD_SIZES, differing, stored_weights


@pytest.mark.parametrize(
    ("asked", "device", "found"),
    [
        ("torch", "cpu", "torch"),
        ("numba", "cpu", "numba"),
        ("torch", "cuda", "torch"),
        ("triton", "meta", "torch"),
        ("numba", "meta", "torch"),
    ],
)
def test_the_choice_of_a_kernel(monkeypatch, asked, device, found):
    monkeypatch.setenv(choice.VARIABLE, asked)
    name, reason = choice.chosen(torch.device(device))
    assert name == found and reason.endswith(".")


@pytest.fixture
def chosen_anew(monkeypatch):
    """What is chosen by itself on a CPU, not remembered from before."""
    monkeypatch.setenv(choice.VARIABLE, "auto")
    choice._chosen.cache_clear()
    yield lambda: choice.chosen(torch.device("cpu"))
    choice._chosen.cache_clear()


@pytest.mark.parametrize(
    ("lanes", "found", "reason"),
    [
        (16, "numba", "decodes 16 weights at once"),
        (8, "numba", "decodes 8 weights at once"),
        (0, "torch", "neither AVX-512 nor AVX2"),
    ],
)
def test_a_cpu_that_looks_many_codes_up_at_once_gets_numba(chosen_anew, monkeypatch, lanes, found, reason):
    monkeypatch.setattr(numba_lookup, "lanes", lambda: lanes)
    monkeypatch.setattr(
        numba_codes, "ready", lambda: 0.4
    )  # nothing is compiled for a CPU that may be another
    assert chosen_anew()[0] == found and reason in chosen_anew()[1]


def test_without_numba_torch_is_chosen_and_one_line_says_so(chosen_anew, monkeypatch):
    monkeypatch.setitem(sys.modules, "qlora_edu.kernels.numba_lookup", None)
    monkeypatch.delattr("qlora_edu.kernels.numba_lookup")
    with pytest.warns(UserWarning, match="Numba's kernels cannot run here .*: the same bits, more slowly"):
        assert chosen_anew()[0] == "torch"
    q = blockwise.quantize(stored_weights(256))  # no second line
    assert torch.equal(q.dequantize(), blockwise.decode(q.packed, q.scales(), "nf4", 64, 256))


def test_kernels_that_are_not_right_are_not_chosen(chosen_anew, monkeypatch):
    def wrong():
        raise RuntimeError("they compute something else")

    monkeypatch.setattr(numba_lookup, "lanes", lambda: 8)
    monkeypatch.setattr(numba_codes, "ready", wrong)
    with pytest.warns(UserWarning, match=r"cannot run here \(they compute something else\)"):
        assert chosen_anew()[0] == "torch"


@pytest.mark.parametrize("name", ["decode_into", "encode_into"])
def test_kernels_that_compute_something_else_are_not_ready(monkeypatch, name):
    right = getattr(numba_codes, name)
    monkeypatch.setattr(numba_codes, name, lambda out, *rest: right(out, *rest).mul_(2))
    numba_codes.ready.cache_clear()
    with pytest.raises(RuntimeError, match="Numba's loops, compiled for this CPU, compute something else"):
        numba_codes.ready()


def test_triton_is_chosen_where_it_is(monkeypatch):
    pytest.importorskip("triton", reason="needs Triton, which has no package for this system")
    for asked in ("auto", "triton"):
        monkeypatch.setenv(choice.VARIABLE, asked)
        assert choice.chosen(torch.device("cuda"))[0] == "triton"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="only Triton's interpreter runs: set TRITON_INTERPRET=1"):
        choice.chosen(torch.device("cpu"))


def test_a_kernel_that_cannot_run_is_named(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "cuda")
    with pytest.raises(
        ValueError, match=r"QLORA_EDU_KERNELS: expected one of auto, torch, numba, triton; got 'cuda'"
    ):
        choice.chosen(torch.device("cpu"))
    monkeypatch.setenv(choice.VARIABLE, "numba")
    with pytest.raises(RuntimeError, match="Numba's kernels are for a CPU"):
        choice.chosen(torch.device("cuda"))
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    choice._chosen.cache_clear()
    try:
        for asked, device in (("numba", "cpu"), ("triton", "cuda")):
            monkeypatch.setenv(choice.VARIABLE, asked)
            with pytest.raises(RuntimeError, match=f"{asked} is asked for, and is not installed"):
                choice.chosen(torch.device(device))
        monkeypatch.setenv(choice.VARIABLE, "auto")
        with pytest.warns(UserWarning, match="decoded by plain torch: the same bits"):
            assert choice.chosen(torch.device("cuda"))[0] == "torch"
    finally:
        choice._chosen.cache_clear()


# --- Numba -------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 2, 5])
def threads(request, monkeypatch):
    """Numba asked for, with that many threads, which share even the smallest tensor."""
    monkeypatch.setenv(choice.VARIABLE, "numba")
    monkeypatch.setattr(numba_codes, "DECODING_SHARED_FROM", 0)
    monkeypatch.setattr(numba_codes, "ENCODING_SHARED_FROM", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook", list(codebooks.CODEBOOKS))
def test_every_size_is_encoded_and_decoded_as_defined(threads, codebook, dtype):
    for count in ODD_SIZES[:-1]:
        weight = stored_weights(count).to(dtype)
        q = blockwise.quantize(weight, codebook=codebook)
        assert choice.encoder(weight.device) is choice.decoder(weight.device) is numba_codes
        whole = count // 64 * 64
        x = (
            (weight[:whole].float().view(-1, 64) / 1 * (1 / q.scales()[: whole // 64, None]))
            .flatten()
            .clamp(-1, 1)
        )
        assert torch.equal(q.packed[: whole // 2], blockwise.pack(blockwise.encode(x, codebook)))
        for target in DTYPES:
            right = blockwise.decode(q.packed, q.scales(), codebook, 64, count).to(target)
            assert differing(q.dequantize(target), right) == (count, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size(threads, block_size, dtype):
    weight = stored_weights(30_011).to(dtype)
    q = blockwise.quantize(weight, block_size, double_quant=True)
    os.environ[choice.VARIABLE] = "torch"  # the fixture puts it back
    plain = blockwise.quantize(weight, block_size, double_quant=True)
    assert torch.equal(q.packed, plain.packed)
    os.environ[choice.VARIABLE] = "numba"
    for target in DTYPES:
        right = blockwise.decode(q.packed, q.scales(), "nf4", block_size, q.numel).to(target)
        assert differing(q.dequantize(target), right) == (q.numel, 0)


@pytest.mark.parametrize("codebook", list(codebooks.CODEBOOKS))
def test_all_numbers_near_a_threshold_a_level_or_the_edge_of_a_cell(codebook):
    levels, thresholds, _ = codebooks.table(codebook)
    edges = (torch.arange(encode.CELLS, dtype=torch.float64) / ((encode.CELLS - 1) / 2) - 1).float()
    steps = torch.arange(-300, 301, dtype=torch.int32)
    near = (
        (torch.cat([levels, thresholds, edges]).view(torch.int32)[:, None] + steps)
        .flatten()
        .view(torch.float32)
    )
    x = near[near.abs() <= 1]
    x = torch.nn.functional.pad(x, (0, -x.numel() % 32))
    packed = torch.empty(x.numel() // 2, dtype=torch.uint8)
    numba_codes.encode_into(packed, x, torch.ones(x.numel() // 32), codebook, 32)
    assert torch.equal(packed, blockwise.pack(blockwise.encode(x, codebook)))


CPUS = {"avx512": ("skylake-avx512", "+avx512f,+avx2,+f16c", 16), "avx2": ("haswell", "+avx2,+f16c", 8)}
CPUS["older"] = ("nehalem", "+sse4.2", 0)
OF_ANY_CPU = "every_size or every_block_size or magnitudes or stay_nan or rounded_after_each"


@pytest.mark.parametrize("cpu", CPUS)
def test_older_cpus_decode_the_same(cpu):
    name, features, lanes = CPUS[cpu]
    if lanes > numba_lookup.lanes():
        pytest.skip(f"needs a CPU with {cpu}")
    forced = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    code = "from qlora_edu.kernels import numba_lookup; print(numba_lookup.lanes())"
    tests = ["-m", "pytest", "-q", __file__, "-k", OF_ANY_CPU]
    shown, tested = (
        subprocess.run([sys.executable, *arguments], env=os.environ | forced, capture_output=True, text=True)
        for arguments in (["-c", code], tests)
    )
    assert shown.stdout == f"{lanes}\n", shown.stderr
    assert tested.returncode == 0 and " passed" in tested.stdout, tested.stdout[-3000:]


def test_scales_that_are_nan_stay_nan(threads):
    bits = torch.tensor(
        [0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFC00000 - 2**32, -1, 0x7F800000], dtype=torch.int32
    )
    scales = bits.view(torch.float32)  # the last one is Inf, whose product with level 0 is NaN
    packed = torch.arange(16, dtype=torch.uint8).repeat(len(bits)) * 17
    for dtype in DTYPES:
        out = torch.empty(32 * len(bits), dtype=dtype)
        numba_codes.decode_into(out, packed, scales, "nf4", 32)
        right = blockwise.decode(packed, scales, "nf4", 32, out.numel())
        assert torch.equal(out.isnan(), right.isnan()) and torch.equal(out.isinf(), right.isinf())


OFFSETS = [0.0, 0.3, -0.3, 1e-41, float("inf"), float("nan")]


@pytest.mark.parametrize("offset", OFFSETS)
def test_scales_in_8_bits_are_rounded_after_each_step(threads, offset):
    blocks = 256 * 9 + 5
    absmax = torch.tensor([0.1, 1 / 3, 0.7, 1e-3, 1e-30, 1e-44, 3e38, 0.0, float("inf"), float("nan")])
    stored = QuantizedScales(torch.arange(blocks).to(torch.uint8), absmax, torch.tensor(offset))
    packed = torch.arange(16 * blocks, dtype=torch.int32).to(torch.uint8)
    for dtype in DTYPES:
        out = torch.empty(32 * blocks, dtype=dtype)
        numba_codes.decode_into(out, packed, stored, "nf4", 32)
        right = blockwise.decode(packed, stored.dequantize(), "nf4", 32, out.numel()).to(dtype)
        assert torch.equal(out.isnan(), right.isnan())
        assert differing(out.nan_to_num(nan=0.5), right.nan_to_num(nan=0.5)) == (out.numel(), 0)


def test_the_bits_of_those_scales_show_a_missing_rounding():
    product = codebooks.dynamic_map() * torch.tensor(0.1)
    fused = codebooks.dynamic_map().double() * torch.tensor(0.1).double() + torch.tensor(0.3).double()
    assert (fused.float() != product + torch.tensor(0.3)).any()


def test_scales_in_8_bits_that_do_not_fit_are_refused():
    out, packed = torch.empty(32 * 257), torch.zeros(16 * 257, dtype=torch.uint8)
    codes, absmax, offset = torch.zeros(257, dtype=torch.uint8), torch.ones(2), torch.tensor(0.5)
    for parts, message in (
        ((codes[:-1], absmax, offset), "256 scales"),
        ((codes, absmax[:1], offset), "expected 2 absmax of 257 scales and one offset; got 1 and 1"),
        ((codes, absmax, absmax), "got 2 and 2"),
        ((codes.int(), absmax, offset), "codes of the scales: expected uint8; got int32"),
        ((codes, absmax.double(), offset), "absmax of the scales: expected float32; got float64"),
        ((codes, absmax, offset.double()), "offset of the scales: expected float32; got float64"),
        ((codes, torch.ones(4)[::2], offset), "absmax of the scales: expected a contiguous tensor"),
        ((codes, absmax, offset.to("meta")), "offset of the scales: .* got one on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            numba_codes.decode_into(out, packed, QuantizedScales(*parts), "nf4", 32)


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or "OpenMP" not in torch.__config__.parallel_info(),
    reason="needs a torch whose threads are OpenMP's",
)
def test_all_of_torchs_threads_share_the_work(threads, monkeypatch):
    asked = []
    parallel = team._parallel()
    monkeypatch.setattr(team, "_parallel", lambda: lambda *job: (asked.append(job[2]), parallel(*job)))
    q = blockwise.quantize(stored_weights(4096))
    assert torch.equal(q.dequantize(), blockwise.decode(q.packed, q.scales(), "nf4", 64, 4096))
    assert asked == ([] if threads == 1 else [threads, threads])  # to encode, to decode


def test_without_openmp_one_thread_does_it(threads, monkeypatch):
    monkeypatch.setattr(team, "_parallel", lambda: None)
    q = blockwise.quantize(stored_weights(4096))
    assert torch.equal(q.dequantize(), blockwise.decode(q.packed, q.scales(), "nf4", 64, 4096))


def test_sizes_that_do_not_fit_are_refused_before_anything_is_touched():
    packed, scales = torch.zeros(32, dtype=torch.uint8), torch.ones(2)
    for out in (torch.empty(65), torch.empty(66), torch.empty(128), torch.empty(0)):
        with pytest.raises(ValueError, match="weights: expected whole blocks of 32"):
            numba_codes.decode_into(out, packed, scales, "nf4", 32)
        with pytest.raises(ValueError, match="weights: expected whole blocks of 32"):
            numba_codes.encode_into(packed, out, scales, "nf4", 32)
    with pytest.raises(ValueError, match="1 scales"):
        numba_codes.decode_into(torch.empty(64), packed, scales[:1], "nf4", 32)
    with pytest.raises(ValueError, match="weights: expected a contiguous tensor on the CPU"):
        numba_codes.decode_into(torch.empty(64, 2)[:, 0], packed, scales, "nf4", 32)
    with pytest.raises(ValueError, match="packed: expected a contiguous tensor on the CPU"):
        numba_codes.decode_into(torch.empty(64), packed.repeat(2)[::2], scales, "nf4", 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [2, 4, 8, 16, 24, 32, 48, 96])
def test_nothing_beyond_the_weights_is_written(threads, block_size, dtype):
    for blocks in (1, 2, 3, 7):
        n = blocks * block_size
        packed = torch.randint(256, (n // 2,), dtype=torch.uint8)
        scales = torch.linspace(-2, 2, blocks)
        memory = torch.full((n * dtype.itemsize + 256,), 0xA5, dtype=torch.uint8)
        out = memory[128:-128].view(dtype)
        numba_codes.decode_into(out, packed, scales, "nf4", block_size)
        assert torch.equal(out, blockwise.decode(packed, scales, "nf4", block_size, n).to(dtype))
        assert (memory[:128] == 0xA5).all() and (memory[-128:] == 0xA5).all()


def test_dtypes_that_the_loops_do_not_know_are_refused():
    packed, scales = torch.zeros(32, dtype=torch.uint8), torch.ones(2)
    for dtype in (torch.float64, torch.int32, torch.uint8):
        with pytest.raises(ValueError, match="weights: expected float32 or bfloat16 or float16; got"):
            numba_codes.decode_into(torch.empty(64).to(dtype), packed, scales, "nf4", 32)
    with pytest.raises(ValueError, match="packed: expected uint8; got int32"):
        numba_codes.decode_into(torch.empty(64), packed.int(), scales, "nf4", 32)
    with pytest.raises(ValueError, match="scales: expected float32; got float64"):
        numba_codes.decode_into(torch.empty(64), packed, scales.double(), "nf4", 32)


def test_tensors_that_require_a_gradient_are_refused():
    out, packed, scales = torch.empty(64), torch.zeros(32, dtype=torch.uint8), torch.ones(2)
    for tensors, name in (
        ((out.clone().requires_grad_(), packed, scales), "weights"),
        ((out, packed, scales.clone().requires_grad_()), "scales"),
    ):
        with pytest.raises(ValueError, match=f"{name}: no gradient passes here"):
            numba_codes.decode_into(*tensors, "nf4", 32)


def test_tensors_without_memory_are_refused(threads):
    q, out = blockwise.quantize(stored_weights(256)), torch.empty(256)
    out.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="tensors: expected memory behind each"):
        q.dequantize(out=out)


def test_a_default_device_changes_nothing(chosen_anew):
    weight = stored_weights(1024 * 4096).view(1024, 4096)
    q, before = blockwise.quantize(weight), chosen_anew()[0]
    choice._chosen.cache_clear()
    numba_codes.ready.cache_clear()
    with torch.device("meta"):
        assert chosen_anew()[0] == before
        assert torch.equal(
            q.dequantize(), blockwise.decode(q.packed, q.scales(), "nf4", 64, q.numel).view(1024, 4096)
        )


def test_scales_of_all_magnitudes_are_rounded_as_torch_rounds():
    tails = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x18000])
    bits = ((torch.arange(0, 0x7F70, 3)[:, None] << 16) + tails).flatten().int()
    scales = bits.view(torch.float32)
    packed = torch.arange(256, dtype=torch.uint8).repeat(len(scales) // 16 + 1)[: 16 * len(scales)]
    for dtype in DTYPES:
        out = torch.empty(32 * len(scales), dtype=dtype)
        numba_codes.decode_into(out, packed, scales, "nf4", 32)
        right = blockwise.decode(packed, scales, "nf4", 32, out.numel()).to(dtype)
        assert differing(out, right) == (out.numel(), 0)


def test_autograd_notices_what_numba_writes(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "numba")
    q = blockwise.quantize(stored_weights(256))
    out = torch.empty(q.shape)
    version = out._version
    q.dequantize(out=out)
    assert out._version > version


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_fork_works_without_its_parents_threads():
    code = """
import os, torch
from qlora_edu import blockwise
from qlora_edu.kernels import numba_codes
from qlora_edu.parity import stored_weights
numba_codes.DECODING_SHARED_FROM = 0
torch.set_num_threads(2)
q = blockwise.quantize(stored_weights(100_000), double_quant=True)
right = q.dequantize()
child = os.fork()
if child == 0:
    # NumPy compares: torch's own threads do not survive a fork
    os._exit(0 if (q.dequantize().numpy() == right.numpy()).all() else 1)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {choice.VARIABLE: "numba"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == "0\n", done.stderr


def test_threads_that_decode_at_the_same_time(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "numba")
    monkeypatch.setattr(numba_codes, "DECODING_SHARED_FROM", 0)
    weights = [stored_weights(200_000, i) for i in range(4)]
    stored = [blockwise.quantize(w) for w in weights]
    right = [blockwise.decode(q.packed, q.scales(), "nf4", 64, q.numel) for q in stored]
    wrong = []

    def work(i):
        for _ in range(20):
            if not torch.equal(stored[i].dequantize(), right[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
