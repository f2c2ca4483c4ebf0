"""Managed memory: on a GPU the real thing, without one what can be said of it."""

import copy
import ctypes

import pytest
import torch

from qlora_edu.paging import ManagedMemory, OutOfMemory, PagedAdamW, UnifiedMemory, managed
from qlora_edu.stored import normals

PAGE = 4096
SIZES = (1, 100, 1023, 1024, 1025, 50_000)  # numbers of 4 bytes: under, at and over a page
OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}


def network(dtype=torch.float32, device="cuda"):
    numbers = iter(normals()[: sum(SIZES)].split(SIZES))
    return [torch.nn.Parameter(next(numbers).to(device, dtype, copy=True)) for _ in SIZES]


def steps(optimizer, parameters, first, last):
    for t in range(first, last):
        for i, p in enumerate(parameters):
            start = 7 * t + 1000 * i
            p.grad = normals()[start : start + p.numel()].to(p.device, p.dtype).view(p.shape)
        optimizer.step()


def bits(tensors):
    return [t.detach().cpu().view(torch.uint8) for t in tensors]


def equal(ones, others):
    return all(torch.equal(a, b) for a, b in zip(bits(ones), bits(others), strict=True))


# --- without a GPU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "meta"])
def test_only_a_cuda_device_has_managed_memory(device):
    with pytest.raises(
        ValueError, match=r"device: expected a CUDA device of this machine; got .* simulates one"
    ):
        ManagedMemory(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")
def test_without_cuda_the_error_says_so():
    with pytest.raises(ValueError, match="got 'cuda', and CUDA is not there"):
        ManagedMemory()


@pytest.mark.parametrize("page", [0, 63, 100, 4096.0, True])
def test_a_page_is_a_power_of_two(page):
    with pytest.raises(ValueError, match="page: expected"):
        ManagedMemory(page=page)


def test_what_the_driver_says_becomes_the_error(monkeypatch):
    class Driver:
        @staticmethod
        def cuMemFree_v2(pointer):
            return 2

        @staticmethod
        def cuGetErrorString(error, text):
            assert error == 2
            text._obj.value = b"out of memory"

    monkeypatch.setattr(managed, "_driver", lambda: Driver)
    with pytest.raises(RuntimeError, match=r"^cuMemFree_v2: out of memory$"):
        managed._call("cuMemFree_v2", ctypes.c_uint64(1))


@pytest.fixture
def stand_in(monkeypatch):
    """The class on the CPU, with ordinary tensors in the place of managed ones: its bookkeeping without its driver."""
    monkeypatch.setattr(managed, "_managed_tensor", lambda n, device: torch.empty(n, dtype=torch.uint8))
    moved = []
    monkeypatch.setattr(ManagedMemory, "_move", lambda self, pages, to: moved.append((len(pages), to)))
    memory = object.__new__(ManagedMemory)
    memory.device, memory.page, memory.limit, memory._blocks = torch.device("cpu"), PAGE, 1_000_000, {}
    memory.moved = moved
    return memory


@pytest.mark.parametrize("prefetch", [False, True])
def test_the_bookkeeping_gives_adamw_its_numbers(stand_in, monkeypatch, prefetch):
    monkeypatch.setattr(ManagedMemory, "prefetch", lambda self, *pages: self._move(pages, 0))
    ours, theirs = network(device="cpu"), network(device="cpu")
    optimizer = PagedAdamW(ours, stand_in, min_numel=1000, prefetch=prefetch, **OPTIONS)
    steps(optimizer, ours, 0, 4)
    steps(torch.optim.AdamW(theirs, foreach=False, **OPTIONS), theirs, 0, 4)
    assert equal(ours, theirs)
    assert bool(stand_in.moved) == prefetch
    assert stand_in.allocated == 8 * sum(SIZES)
    kept = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(kept)
    assert stand_in.allocated == 8 * sum(SIZES), "the old blocks are given back"


def test_the_bookkeeping_of_blocks(stand_in):
    block = stand_in.allocate(2 * PAGE + 1, "states")
    assert block.pages == 3 and not stand_in.read(block).any()
    assert [len(page) for page in stand_in.touch(*((block, i) for i in range(3)))] == [PAGE, PAGE, 1]
    stand_in.write(block, torch.ones(2 * PAGE + 1, dtype=torch.uint8))
    assert stand_in.touch((block, 2))[0].item() == 1
    with pytest.raises(ValueError, match=r"data: expected uint8 \(8193,\)"):
        stand_in.write(block, torch.ones(3))
    with stand_in.holding(0), stand_in.holding(10):
        assert stand_in.allocated == block.nbytes + 10
    with pytest.raises(OutOfMemory, match="would pass the limit of 1,000,000"):
        stand_in.allocate(1_000_000, "more")
    with pytest.raises(IndexError, match="page: expected 0 to 2 of 'states'; got 3"):
        stand_in.touch((block, 3))
    stand_in.free(block)
    with pytest.raises(ValueError, match="block: expected one that this memory has allocated and not freed"):
        stand_in.read(block)


# --- on a GPU ------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("page", [64, PAGE, 64 * 1024 * 1024])
def test_the_numbers_are_those_of_adamw_on_the_same_gpu(dtype, prefetch, page):
    ours, theirs = network(dtype), network(dtype)
    memory = ManagedMemory(page=page)
    optimizer = PagedAdamW(ours, memory, min_numel=1000, prefetch=prefetch, **OPTIONS)
    reference = torch.optim.AdamW(theirs, foreach=False, **OPTIONS)
    for t in range(5):
        steps(optimizer, ours, t, t + 1)
        steps(reference, theirs, t, t + 1)
        memory.evict(
            *((b, i) for b in memory._blocks for i in range(b.pages))
        )  # and they come back as they were
    assert equal(ours, theirs)
    for p, q in zip(ours, theirs, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert equal([optimizer.tensors(p)[name]], [reference.state[q][name]])
    assert [optimizer.state[p]["exp_avg"].resident for p in ours] == [n < 1000 for n in SIZES]


@pytest.mark.cuda
def test_a_run_goes_on_between_gpu_torch_and_the_simulation():
    whole = network()
    steps(torch.optim.AdamW(whole, foreach=False), whole, 0, 6)
    cut = network()
    begun = PagedAdamW(cut, ManagedMemory(page=PAGE), min_numel=0)
    steps(begun, cut, 0, 3)
    kept = copy.deepcopy(begun.state_dict())
    assert {state["exp_avg"].device.type for state in kept["state"].values()} == {"cuda"}
    for make in (
        lambda p: torch.optim.AdamW(p, foreach=False),
        lambda p: PagedAdamW(p, ManagedMemory(page=64), min_numel=0),
    ):
        going = [torch.nn.Parameter(p.detach().clone()) for p in cut]
        optimizer = make(going)
        optimizer.load_state_dict(copy.deepcopy(kept))  # torch would go on in the tensors that it is given
        optimizer.param_groups[0]["foreach"] = False  # a loaded group says nothing of it: torch would choose
        steps(optimizer, going, 3, 6)
        assert equal(going, whole)
    on_cpu = [torch.nn.Parameter(p.detach().cpu()) for p in cut]
    simulated = PagedAdamW(on_cpu, UnifiedMemory(64 * 1024, PAGE), min_numel=0)
    simulated.load_state_dict(kept)
    steps(simulated, on_cpu, 3, 6)
    for a, b in zip(
        on_cpu, whole, strict=True
    ):  # another processor rounds roots and quotients alike, but not all
        torch.testing.assert_close(a, b.cpu(), rtol=1e-5, atol=1e-7)


@pytest.mark.cuda
def test_pages_keep_what_was_written_wherever_they_are():
    memory = ManagedMemory(page=PAGE)
    block = memory.allocate(10 * PAGE + 1, "a block")
    assert block.pages == 11 and not memory.read(block).any()
    data = torch.arange(block.nbytes).to(torch.uint8)
    memory.write(block, data)
    pages = [(block, i) for i in range(block.pages)]
    for move in (memory.evict, memory.prefetch, memory.evict):
        move(*pages)
        assert torch.equal(torch.cat(memory.touch(*pages)).cpu(), data)
    assert torch.equal(memory.read(block).cpu(), data)
    (view,) = memory.touch((block, 3))
    view.fill_(9)
    assert (memory.read(block)[3 * PAGE : 4 * PAGE] == 9).all()
    assert view.data_ptr() == memory.touch((block, 3))[0].data_ptr()


@pytest.mark.cuda
def test_managed_memory_is_not_torchs_and_a_view_keeps_it_alive():
    memory = ManagedMemory()
    before = torch.cuda.memory_allocated()
    block = memory.allocate(8_000_000)
    assert torch.cuda.memory_allocated() == before and memory.allocated == 8_000_000
    (view,) = memory.touch((block, 0))
    view.fill_(5)
    memory.free(block)
    assert memory.allocated == 0 and (view == 5).all()
    with pytest.raises(ValueError, match="block: expected one that this memory has allocated and not freed"):
        memory.touch((block, 0))
    with memory.holding(1_000_000):
        assert torch.cuda.memory_allocated() >= before + 1_000_000


@pytest.mark.cuda
def test_the_limit_is_kept_and_resident_blocks_do_not_count():
    memory = ManagedMemory(page=PAGE, limit=10_000)
    first = memory.allocate(6_000)
    memory.allocate(20_000, resident=True)
    with pytest.raises(
        OutOfMemory, match=r"exp_avg: 4,001 bytes would pass the limit of 10,000 .* 6,000 are taken"
    ):
        memory.allocate(4_001, "exp_avg")
    memory.free(first)
    memory.allocate(10_000)
    with pytest.raises(OutOfMemory, match="do not fit on cuda:0"):
        memory.allocate(10**15, resident=True)
    for index in (-1, 3, True, None):
        with pytest.raises(IndexError, match="page: expected 0 to 2"):
            memory.touch((next(iter(b for b in memory._blocks if not b.resident)), index))


@pytest.mark.cuda
def test_parameters_must_be_where_the_memory_is():
    with pytest.raises(ValueError, match="params: expected contiguous float tensors on cuda:0"):
        PagedAdamW(network(device="cpu"), ManagedMemory())
    with pytest.raises(ValueError, match="params: expected contiguous float tensors on the CPU"):
        PagedAdamW(network(), UnifiedMemory(64 * 1024))
