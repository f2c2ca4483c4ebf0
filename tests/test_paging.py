"""Unified memory against a model of ten lines and Python's own cache; PagedAdamW and 8-bit AdamW against libraries."""

import copy
import doctest
import functools
import importlib
import math
import pickle
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_edu import paging, reference
from qlora_edu.paging import (
    OutOfMemory,
    PagedAdamW,
    UnifiedMemory,
    policies,
    runs,
    scaled,
    spike,
    states8,
    thresholds,
)
from qlora_edu.stored import normals
from qlora_edu.training import Encoded

few = settings(deadline=None, max_examples=40)
PAGE = 64


# --- unified memory --------------------------------------------------------------------------------------


@few
@given(
    frames=st.integers(1, 9),
    pages=st.integers(1, 12),
    actions=st.lists(
        st.tuples(st.sampled_from(["touch", "touch", "prefetch", "hold"]), st.integers(0, 11)), max_size=60
    ),
)
def test_pages_are_where_a_model_of_ten_lines_says_and_hold_what_was_written(frames, pages, actions):
    memory = UnifiedMemory(frames * PAGE, PAGE)
    block = memory.allocate(pages * PAGE)
    written, resident, faults, moved = [0] * pages, OrderedDict(), 0, 0
    for kind, number in actions:
        page = number % pages
        if kind == "hold":
            held = number % (frames + 1)
            with memory.holding(held * PAGE):
                while len(resident) > frames - held:
                    resident.popitem(last=False)
            assert set(block.frames) == set(resident)
            continue
        if page not in resident:
            faults += kind == "touch"
            moved += PAGE
            if len(resident) == frames:
                resident.popitem(last=False)
            resident[page] = None
        resident.move_to_end(page)
        if kind == "touch":
            (view,) = memory.touch((block, page))
            assert (view == written[page]).all()
            view += 1
            written[page] += 1
        else:
            memory.prefetch((block, page))
        assert set(block.frames) == set(resident)
    assert (memory.faults, memory.bytes_in) == (faults, moved)
    assert memory.bytes_out == moved - PAGE * len(resident)
    assert memory.read(block).view(pages, PAGE)[:, 0].tolist() == written


@pytest.mark.parametrize("room", [1, 3, 10, 61])
def test_faults_are_the_misses_of_lru_cache(room):
    touches = [(int(abs(x) * 40) * 7) % 61 for x in normals()[:2000].tolist()]
    cached = functools.lru_cache(maxsize=room)(lambda page: None)
    memory = UnifiedMemory(room * PAGE, PAGE)
    block = memory.allocate(61 * PAGE)
    for page in touches:
        cached(page)
        memory.touch((block, page))
    assert memory.faults == cached.cache_info().misses == sum(policies.faults(touches, room))
    assert memory.hits == cached.cache_info().hits


def test_what_a_page_leaves_behind_is_nan():
    memory = UnifiedMemory(2 * PAGE, PAGE)
    block = memory.allocate(3 * PAGE)
    for page in range(3):
        memory.touch((block, page))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert block.host[1].view(dtype).isnan().all() and block.host[2].view(dtype).isnan().all()
    assert (block.host[0] == 0).all()
    memory.free(block)
    assert memory._device.view(torch.float32).isnan().all()


def test_resident_blocks_are_zero_never_leave_and_are_no_faults():
    memory = UnifiedMemory(3 * PAGE, PAGE)
    resident, managed = memory.allocate(PAGE + 1, "a", resident=True), memory.allocate(4 * PAGE, "b")
    assert memory.resident == 2 * PAGE
    for view in memory.touch((resident, 0), (resident, 1)):
        assert (view == 0).all()
        view += 7
    for page in range(4):
        memory.touch((managed, page), (resident, 0))
    assert (memory.faults, memory.hits, memory.managed) == (4, 0, PAGE)
    assert memory.read(resident).tolist() == [7] * (PAGE + 1)


def test_what_does_not_fit_changes_nothing():
    memory = UnifiedMemory(4 * PAGE, PAGE)
    block = memory.allocate(4 * PAGE, "states")
    memory.touch((block, 0), (block, 1), (block, 2))
    before = memory.read(block), dict(block.frames), list(memory.timeline), memory.bytes_out
    message = r"batch: 320 bytes do not fit: of a budget of 256, 0 are resident, and only the 192 bytes"
    with pytest.raises(OutOfMemory, match=message), memory.holding(5 * PAGE, "batch"):
        pass
    with memory.holding(2 * PAGE), pytest.raises(OutOfMemory, match="3 pages used together"):
        memory.touch((block, 0), (block, 1), (block, 3))
    assert torch.equal(before[0], memory.read(block))
    with pytest.raises(OutOfMemory):
        memory.allocate(5 * PAGE, resident=True)
    assert before[3] == 0 and memory.resident == 0


def test_the_timeline_says_what_happened():
    memory = UnifiedMemory(2 * PAGE, PAGE)
    block = memory.allocate(2 * PAGE, "m")
    memory.step = 3
    memory.touch((block, 0), (block, 1))
    memory.touch((block, 0))
    with memory.holding(PAGE, "x"):
        pass
    memory.prefetch((block, 1))
    kinds = [(e.step, e.kind, e.name, e.page, e.managed, e.resident) for e in memory.timeline]
    assert kinds == [
        (0, "allocate", "m", None, 0, 0),
        (3, "fault", "m", 0, 64, 0),
        (3, "fault", "m", 1, 128, 0),
        (3, "evict", "m", 1, 64, 0),
        (3, "allocate", "x", None, 64, 64),
        (3, "free", "x", None, 64, 0),
        (3, "prefetch", "m", 1, 128, 0),
    ]
    assert (memory.faults, memory.hits) == (2, 1)


def test_mru_evicts_the_last_touched_but_none_of_those_in_use():
    memory = UnifiedMemory(2 * PAGE, PAGE, policy="mru")
    block = memory.allocate(4 * PAGE)
    memory.touch((block, 0), (block, 1))
    memory.touch((block, 2))
    assert set(block.frames) == {0, 2}
    memory.touch((block, 3), (block, 1))
    assert set(block.frames) == {1, 3}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0,), "budget: expected a whole number of bytes"),
        ((1.5,), "budget: expected a whole number of bytes"),
        ((True,), "budget: expected a whole number of bytes"),
        ((1024, 100), "page: expected a power of two"),
        ((1024, 32), "page: expected a power of two"),
        ((1024, 64, "fifo"), "policy: expected one of lru, mru"),
        ((31,), "budget: expected at least one page of 65,536 bytes; got 31. It is in bytes"),
    ],
)
def test_a_wrong_memory_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        UnifiedMemory(*arguments)


def test_wrong_blocks_pages_and_data_are_refused():
    memory, other = UnifiedMemory(256, PAGE), UnifiedMemory(256, PAGE)
    block = memory.allocate(100)
    for nbytes in (0, None, False):
        with pytest.raises(ValueError, match="nbytes: expected"):
            memory.allocate(nbytes)
    for nbytes in (None, False, -1):
        with pytest.raises(ValueError, match="nbytes: expected"), memory.holding(nbytes):
            pass
    with pytest.raises(ValueError, match="resident: expected True or False; got 'no'"):
        memory.allocate(64, resident="no")
    for use in (memory.touch, memory.prefetch):
        with pytest.raises(ValueError, match=r"pages: expected \(block, index\) pairs; got Block"):
            use(block, 0)
    for page in (2, -1, 0.0, True):
        with pytest.raises(IndexError, match="page: expected 0 to 1"):
            memory.touch((block, page))
    with pytest.raises(ValueError, match="block: expected one that this memory"):
        other.touch((block, 0))
    memory.free(block)
    with pytest.raises(ValueError, match="not freed"):
        memory.free(block)
    again = memory.allocate(100)
    with pytest.raises(ValueError, match=r"data: expected uint8 \(100,\)"):
        memory.write(again, torch.zeros(99, dtype=torch.uint8))


@pytest.mark.parametrize("room", [1, 2, 5, 8])
def test_prefetching_stops_where_the_device_is_full(room):
    memory = UnifiedMemory(room * PAGE, PAGE)
    block = memory.allocate(8 * PAGE)
    memory.touch((block, 7))
    memory.prefetch(*((block, i) for i in range(8)))
    assert set(block.frames) == set(range(room)) and memory.bytes_in == (room + (room < 8)) * PAGE
    with memory.holding(room * PAGE):
        memory.prefetch((block, 0))
        assert not block.frames


# --- policies --------------------------------------------------------------------------------------------


@few
@given(st.lists(st.integers(0, 4), max_size=9), st.integers(1, 4))
def test_the_optimal_policy_is_not_beaten_by_any_choice_of_victims(touches, frames):
    """The oracle tries every victim at every fault."""

    def best(at, resident):
        if at == len(touches):
            return 0
        if touches[at] in resident:
            return best(at + 1, resident)
        if len(resident) < frames:
            return 1 + best(at + 1, resident | {touches[at]})
        return 1 + min(best(at + 1, resident - {victim} | {touches[at]}) for victim in resident)

    counts = {policy: sum(policies.faults(touches, frames, policy)) for policy in policies.POLICIES}
    assert counts["optimal"] == best(0, frozenset()) <= min(counts.values())


@pytest.mark.parametrize("pages", [2, 5, 64])
def test_a_sweep_that_lacks_one_page_faults_on_every_touch(pages):
    touches = policies.sweep(pages, 4)
    assert sum(policies.faults(touches, pages)) == pages
    if pages > 1:
        assert all(policies.faults(touches, pages - 1))


@pytest.mark.parametrize(("frames", "policy"), [(0, "lru"), (True, "lru"), (1.0, "lru"), (1, "random")])
def test_wrong_frames_and_policies_are_refused(frames, policy):
    with pytest.raises(ValueError, match=r"frames: expected|policy: expected"):
        policies.faults([1], frames, policy)


# --- PagedAdamW ------------------------------------------------------------------------------------------


def network(dtype=torch.float32, sizes=(1000, 1, 4096, 333)):
    """Parameters of stored numbers, of sizes that do not fill their last page."""
    return [torch.nn.Parameter(normals()[7 * n : 8 * n].clone().to(dtype)) for n in sizes]


def gradients(parameters, step):
    for i, p in enumerate(parameters):
        p.grad = normals().roll(31 * step + i)[: p.numel()].to(p.dtype).view_as(p)


def steps(optimizer, parameters, first, last):
    for step in range(first, last):
        gradients(parameters, step)
        optimizer.step()


def states(optimizer, p):
    own = optimizer.tensors(p) if isinstance(optimizer, PagedAdamW) else optimizer.state[p]
    return [own[name] for name in ("step", "exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0}])
@pytest.mark.parametrize("frames", [2, 3, 20, 1000])
def test_every_bit_is_that_of_torchs_adamw_whatever_the_budget(dtype, options, frames):
    mine, theirs = network(dtype), network(dtype)
    paged = PagedAdamW(
        mine, UnifiedMemory(frames * 1024, 1024), min_numel=0, prefetch=frames == 20, **options
    )
    plain = torch.optim.AdamW(theirs, foreach=False, **options)
    steps(paged, mine, 0, 5)
    steps(plain, theirs, 0, 5)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
        for state, expected in zip(states(paged, a), states(plain, b), strict=True):
            assert torch.equal(state, expected) and state.dtype == expected.dtype
    assert paged.memory.faults > 0 or paged.prefetch


def test_groups_schedules_and_missing_gradients_are_those_of_torch():
    runs_ = []
    for make in (
        lambda g: PagedAdamW(g, UnifiedMemory(4096, 1024), min_numel=0),
        lambda g: torch.optim.AdamW(g, foreach=False),
    ):
        p = network()
        optimizer = make([{"params": p[:2]}, {"params": p[2:], "lr": 0.01, "weight_decay": 0.5}])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        for step in range(5):
            gradients(p, step)
            p[step % 4].grad = None
            optimizer.step()
            schedule.step()
        runs_.append(p)
    assert all(torch.equal(a, b) for a, b in zip(*runs_, strict=True))


def test_small_states_are_resident_and_large_ones_paged():
    p = network()
    optimizer = PagedAdamW(p, UnifiedMemory(100 * 1024, 1024), min_numel=1000)
    steps(optimizer, p, 0, 1)
    assert [optimizer.state[q]["exp_avg"].resident for q in p] == [False, True, False, True]


@pytest.mark.parametrize(("first", "second"), [("paged", "torch"), ("torch", "paged"), ("paged", "paged")])
def test_a_run_goes_on_with_the_other_optimizers_state_dict(first, second):
    make = {
        "paged": lambda p: PagedAdamW(p, UnifiedMemory(3 * 1024, 1024), min_numel=0),
        "torch": lambda p: torch.optim.AdamW(p, foreach=False),
    }
    whole, cut = network(), network()
    steps(make["torch"](whole), whole, 0, 6)
    begun = make[first](cut)
    steps(begun, cut, 0, 3)
    kept = copy.deepcopy(begun.state_dict())
    going = make[second](cut)
    going.load_state_dict(kept)
    steps(going, cut, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


def test_a_state_dict_can_be_taken_over_twice_without_leaving_blocks_behind():
    p = network()
    optimizer = PagedAdamW(p, UnifiedMemory(3 * 1024, 1024), min_numel=0)
    assert optimizer.state_dict()["state"] == {}
    steps(optimizer, p, 0, 2)
    kept = optimizer.state_dict()
    for _ in range(2):
        optimizer.load_state_dict(kept)
    assert len(optimizer.memory._blocks) == 2 * len(p)


def test_a_state_dict_that_does_not_fit_leaves_the_old_states():
    p = network()
    optimizer = PagedAdamW(p, UnifiedMemory(1024, 64), min_numel=math.inf)
    with pytest.raises(OutOfMemory):
        steps(optimizer, p, 0, 1)
    assert optimizer.memory.resident == 0 and optimizer.state_dict()["state"] == {}
    p = network()
    paged = PagedAdamW(p, UnifiedMemory(3 * 1024, 1024), min_numel=0)
    steps(paged, p, 0, 2)
    before = [states(paged, q) for q in p]
    for spoil in ("shape", "amsgrad", "missing"):
        kept = copy.deepcopy(paged.state_dict())
        if spoil == "shape":
            kept["state"][2]["exp_avg_sq"] = torch.zeros(5)
        elif spoil == "amsgrad":
            kept["param_groups"][0]["amsgrad"] = True
        else:
            del kept["state"][2]["exp_avg"]
        with pytest.raises(ValueError, match=r"expected exp_avg and exp_avg_sq of shape|amsgrad"):
            paged.load_state_dict(kept)
        after = [states(paged, q) for q in p]
        assert all(
            torch.equal(a, b)
            for one, two in zip(before, after, strict=True)
            for a, b in zip(one, two, strict=True)
        )
        assert len(paged.memory._blocks) == 2 * len(p)


def test_a_step_that_does_not_fit_leaves_each_parameter_whole():
    p = network(sizes=(4096, 4096))
    optimizer = PagedAdamW(p, UnifiedMemory(4 * 1024, 1024), min_numel=0)
    steps(optimizer, p, 0, 1)
    before = [q.detach().clone() for q in p], [states(optimizer, q) for q in p]
    gradients(p, 1)
    with optimizer.memory.holding(3 * 1024), pytest.raises(OutOfMemory, match="2 pages used together"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before[0], p, strict=True))
    assert all(
        torch.equal(a, b)
        for old, q in zip(before[1], p, strict=True)
        for a, b in zip(old, states(optimizer, q), strict=True)
    )
    optimizer.step()
    expected = network(sizes=(4096, 4096))
    steps(torch.optim.AdamW(expected, foreach=False), expected, 0, 2)
    assert all(torch.equal(a, b) for a, b in zip(expected, p, strict=True))


def test_a_closure_is_called_with_gradients_on():
    p = torch.nn.Parameter(torch.ones(10))
    optimizer = PagedAdamW([p], UnifiedMemory(4096, 1024))

    def closure():
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 10
    assert (p < 1).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"memory": 1000}, "memory: expected a UnifiedMemory or ManagedMemory; got int"),
        ({"lr": -1}, "lr: expected a number of at least 0"),
        ({"lr": math.nan}, "lr: expected a number of at least 0"),
        ({"betas": (0.9, 1.0)}, "betas: expected a number of at least 0 and below 1; got 1.0"),
        ({"eps": "0"}, "eps: expected a number"),
        ({"betas": 0.9}, "betas: expected two numbers"),
        ({"betas": (0.9, "0.999")}, "betas: expected a number of at least 0 and below 1"),
        ({"min_numel": math.nan}, "min_numel: expected a number of at least 0"),
        ({"prefetch": "no"}, "prefetch: expected True or False; got 'no'"),
        ({"params": [torch.nn.Parameter(torch.zeros(2, 3).T)]}, "params: expected contiguous float"),
        ({"params": [torch.nn.Parameter(torch.zeros(0))]}, "params: expected contiguous float"),
        ({"params": [torch.zeros(3, dtype=torch.int64)]}, "params: expected contiguous float"),
        (
            {"params": [torch.nn.Parameter(torch.zeros(3, device="meta"))]},
            "params: expected contiguous float",
        ),
        ({"params": []}, "empty parameter list"),
    ],
)
def test_wrong_arguments_of_the_optimizer_are_named(changes, says):
    options = {"params": network(), "memory": UnifiedMemory(65_536)} | changes
    with pytest.raises((TypeError, ValueError), match=says):
        PagedAdamW(**options)


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ({"lr": -1}, "lr: expected a number of at least 0"),
        ({"betas": (1.5, 0.9)}, "betas: expected a number of at least 0 and below 1; got 1.5"),
        ({"maximize": True}, "maximize: expected False"),
        ({"amsgrad": True}, "amsgrad: expected False"),
        ({"params": [torch.nn.Parameter(torch.zeros(2, 3).T)]}, "params: expected contiguous float"),
        ({"params": [torch.zeros(3, dtype=torch.int64)]}, "params: expected contiguous float"),
        ({"params": [torch.nn.Parameter(torch.zeros(0))]}, "params: expected contiguous float"),
    ],
)
def test_a_group_that_cannot_be_trained_is_refused_whenever_it_comes(group, says):
    group = {"params": [torch.nn.Parameter(torch.zeros(3))]} | group
    with pytest.raises(ValueError, match=says):
        PagedAdamW([group], UnifiedMemory(65_536))
    optimizer = PagedAdamW(network(), UnifiedMemory(65_536))
    with pytest.raises(ValueError, match=says):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_the_state_dict_of_another_optimizer_is_refused_and_the_run_goes_on(other):
    mine, theirs = network(), network()
    paged = PagedAdamW(mine, UnifiedMemory(3 * 1024, 1024), min_numel=0)
    plain = torch.optim.AdamW(theirs, foreach=False)
    steps(paged, mine, 0, 2)
    steps(plain, theirs, 0, 2)
    message = "a group lacks .*betas|decoupled_weight_decay: expected True"
    with pytest.raises(ValueError, match=message):
        paged.load_state_dict(other(network()).state_dict())
    steps(paged, mine, 2, 4)
    steps(plain, theirs, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    "change",
    [lambda p: p.bfloat16(), lambda p: p[:50].clone(), lambda p: p.repeat(2)],
    ids="dtype less more".split(),
)
def test_a_parameter_that_changed_after_its_first_step_is_refused_before_any_update(change):
    p = network()
    optimizer = PagedAdamW(p, UnifiedMemory(4096, 1024), min_numel=0)
    steps(optimizer, p, 0, 1)
    p[3].grad, p[3].data = None, change(p[3].data)
    gradients(p, 1)
    before = [q.detach().clone() for q in p]
    message = "a parameter changed size or dtype since its states were made: 333 torch.float32 then"
    for use in (optimizer.step, optimizer.state_dict):
        with pytest.raises(ValueError, match=message):
            use()
    assert all(torch.equal(a, b) for a, b in zip(before, p, strict=True))


def test_a_gradient_of_another_dtype_is_refused_before_any_update():
    p = network()
    optimizer = PagedAdamW(p, UnifiedMemory(4096, 1024), min_numel=0)
    gradients(p, 0)
    before = [q.detach().clone() for q in p]
    p[3].data = p[3].data.bfloat16()
    with pytest.raises(
        ValueError, match=r"gradient: expected torch.bfloat16 \(333,\), .*; got torch.float32"
    ):
        optimizer.step()
    assert torch.equal(before[0], p[0])


def test_an_optimizer_is_not_copied_or_pickled_without_its_memory():
    optimizer = PagedAdamW(network(), UnifiedMemory(65_536))
    for take in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"Save state_dict\(\) instead"):
            take(optimizer)


@pytest.mark.parametrize(
    ("pages", "frames", "faults"), [(64, 64, 64), (64, 63, 192), (64, 62, 320), (96, 95, 288), (96, 94, 480)]
)
def test_with_one_page_too_few_half_of_the_touches_of_an_update_fault(pages, frames, faults):
    """m and v are used together, and neither is evicted for the other; in a sweep one by one, all would fault."""
    p = [torch.nn.Parameter(torch.zeros(pages // 2 * PAGE // 4))]
    optimizer = PagedAdamW(p, UnifiedMemory(frames * PAGE, PAGE), min_numel=0)
    steps(optimizer, p, 0, 5)
    assert optimizer.memory.faults == faults


# --- the little training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [60, 48, 36, 31, 28])
def test_the_training_is_torchs_bit_for_bit_under_each_budget(pages):
    model = runs.network()
    plain = torch.optim.AdamW(model.parameters(), foreach=False)
    for x, y in runs.batches():
        runs.forward_backward(model, x, y)
        plain.step()
        plain.zero_grad()
    result = runs.run(pages * 65_536)
    assert result.failed is None
    for a, b in zip(result.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_unpaged_optimizer_fails_at_the_spike_and_the_paged_one_does_not():
    activations = [runs.forward_backward(runs.network(), x, y) for x, y in runs.batches()]
    long_, short = -(-max(activations) // 65_536), -(-min(activations) // 65_536)
    pages = runs.STATES // 65_536
    fits = runs.run((pages + long_) * 65_536, min_numel=math.inf)
    less = runs.run((pages + long_ - 1) * 65_536, min_numel=math.inf)
    assert fits.failed is None and less.failed == 5 and "activations" in less.error
    assert runs.run((pages + short - 1) * 65_536, min_numel=math.inf).failed == 2
    assert runs.run(long_ * 65_536).failed is None and runs.run((long_ - 1) * 65_536).failed == 5


def test_prefetching_moves_the_same_bytes_without_faults():
    plain, early = runs.run(48 * 65_536), runs.run(48 * 65_536, prefetch=True)
    assert plain.memory.faults > early.memory.faults == 0
    assert plain.memory.bytes_in == early.memory.bytes_in


def test_prefetching_more_than_there_is_room_for_moves_no_more_than_without():
    found = []
    for prefetch in (False, True):
        p = [torch.nn.Parameter(torch.zeros(16 * PAGE // 4))]
        optimizer = PagedAdamW(p, UnifiedMemory(8 * PAGE, PAGE), min_numel=0, prefetch=prefetch)
        steps(optimizer, p, 0, 5)
        found.append((optimizer.memory.faults, optimizer.memory.bytes_in // PAGE))
    assert found == [(160, 160), (120, 160)]


@pytest.mark.parametrize("rows", [(513,), (64, 512), (0,), (-1,), (1.0,), (True,)])
def test_batches_without_rows_or_beyond_the_stored_numbers_are_refused(rows):
    with pytest.raises(ValueError, match=r"rows: expected whole numbers from 1 to 51[12] in step"):
        runs.run(60 * 65_536, rows=rows)


def test_what_the_chapter_says_of_budget_d_and_answers_at_its_end():
    def faults(room, rows):
        events = runs.run(room * 65_536, rows=rows).memory.timeline
        return [sum((e.kind, e.step) == ("fault", step) for e in events) for step in range(1, 9)]

    assert faults(31, runs.ROWS) == [32, 19, 19, 19, 30, 19, 19, 19]
    assert sum(faults(31, (64,) * 8)) == 165 and sum(faults(32, (64,) * 8)) == 74
    again, mixed = "aabacadaeaf", [(int(abs(x) * 40) * 7) % 61 for x in normals()[:4000].tolist()]
    assert [sum(policies.faults(again, 3, policy)) for policy in ("lru", "mru")] == [6, 8]
    assert [sum(policies.faults(mixed, 30, policy)) for policy in ("lru", "mru")] == [1849, 1990]


def test_prefetching_saves_bytes_where_the_update_does_not_fit():
    for room in (31, 28):
        plain, early = runs.run(room * 65_536), runs.run(room * 65_536, prefetch=True)
        assert early.memory.faults == 0 and early.moved < 0.6 * plain.moved


def test_what_the_quiz_says_of_8_bit_states_beside_a_longer_row():
    from qlora_edu.memory import shape_of
    from qlora_edu.memory.parts import adapter_sizes, optimizer

    sizes = adapter_sizes(shape_of("smollm2-135m"), 8, thresholds.LLAMA_LINEARS)
    saved = optimizer(sizes, 32) - optimizer(sizes, 8)
    taken = [spike.moving(4, 256 + more, scored=337) - spike.moving(4, 256, scored=337) for more in (1, 2, 3)]
    assert round(saved / 1e6) == 14 and round(taken[0] / 1e6, 1) == 6.2 and taken[1] < saved < taken[2]


# --- a large model at a scale ----------------------------------------------------------------------------


def test_a_simulated_card_holds_what_was_predicted():
    out = scaled.simulate()
    still = scaled.step_of("llama-33b", 512)
    fullest = max(event.managed + event.resident for event in out.memory.timeline) * scaled.SCALE
    peak = scaled.step_of("llama-33b", 2048).peak
    assert out.failed is None and peak > 24 * scaled.GIB >= fullest
    evicted = out.memory.bytes_out * scaled.SCALE
    assert abs(evicted - (peak - 24 * scaled.GIB)) < 4 * 16 * 2**20  # but for the pages that are not full
    assert evicted < still.parts["optimizer"]
    assert scaled.simulate(paged=False).failed == 5
    assert scaled.simulate(spike=3072).failed == 5
    assert scaled.simulate("llama-65b").failed == 0
    assert scaled.simulate(prefetch=True).memory.faults == 0


@pytest.mark.parametrize(("model", "card"), [("llama-33b", 24), ("llama-65b", 48)])
def test_the_longest_row_is_the_longest_that_goes_through(model, card):
    for paged in (False, True):
        length = scaled.longest(model, card, paged)
        gone = paged * scaled.step_of(model, 512).parts["optimizer"]
        assert (
            scaled.step_of(model, length).peak - gone
            <= card * scaled.GIB
            < scaled.step_of(model, length + 32).peak - gone
        )


def test_what_moves_after_the_first_step_is_counted():
    out = scaled.simulate(card=22)
    first = [event.kind for event in out.memory.timeline if event.step <= 1]
    faults, into, back = out.after_first()
    page = 16 * 2**20 / 1e9
    assert faults == out.memory.faults - first.count("fault") > 0
    assert into == pytest.approx(faults * page)
    assert back == pytest.approx(out.memory.bytes_out * scaled.SCALE / 1e9 - first.count("evict") * page)
    assert scaled.simulate(card=22, prefetch=True).after_first()[1] >= into


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"card": "24"}, "card: expected GiB"),
        ({"card": math.inf}, "card: expected GiB"),
        ({"card": 0}, "card: expected GiB"),
        ({"page": 3}, "page: expected a power of two of MiB, at least 1; got 3"),
        ({"page": 16.0}, "page: expected a power of two of MiB, at least 1; got 16.0"),
        ({"prefetch": "no"}, "prefetch: expected True or False"),
        ({"paged": "no"}, "paged: expected True or False"),
    ],
)
def test_a_wrong_card_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        scaled.simulate(**options)


def test_where_ordinary_steps_begin_to_move_pages_and_where_the_long_row_fails():
    assert [scaled.simulate(card=card, spike=512).after_first()[0] > 0 for card in (22.25, 22)] == [
        False,
        True,
    ]
    assert [scaled.simulate(card=card).failed for card in (21.75, 21.5)] == [None, 5]
    found = scaled.step_of("llama-33b", 2048)
    assert round((found.peak - found.parts["optimizer"]) / scaled.GIB, 3) == 21.498


def test_the_longest_row_is_not_looked_for_without_end():
    with pytest.raises(ValueError, match="card: expected GiB, more than 0 and at most 1,024; got inf"):
        scaled.longest("llama-33b", math.inf, True)


# --- 8-bit states ----------------------------------------------------------------------------------------


@few
@given(st.integers(1, 3000), st.integers(0, 50_000), st.booleans(), st.sampled_from([1e-12, 1.0, 1e6]))
def test_codes_scales_and_decoded_states_are_those_of_bitsandbytes(n, start, signed, size):
    state = normals().roll(-start)[:n] * size
    state = state if signed else state.square()
    functional = reference.bitsandbytes().functional
    levels = functional.create_dynamic_map(signed=signed)
    theirs, quant = functional.quantize_blockwise(state, code=levels, blocksize=256)
    codes, scales = states8.encode(state, signed)
    assert torch.equal(codes, theirs.flatten()) and torch.equal(scales, quant.absmax)
    assert torch.equal(
        states8.decode(codes, scales, signed), functional.dequantize_blockwise(theirs, quant).flatten()
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("n", [4096, 5000])
def test_adamw_with_8_bit_states_is_bitsandbytes_bit_for_bit(n, weight_decay):
    mine, theirs = normals()[:n].clone(), torch.nn.Parameter(normals()[:n].clone())
    own = states8.AdamW8bit(mine, weight_decay=weight_decay)
    bnb = reference.bitsandbytes().optim.AdamW8bit([theirs], weight_decay=weight_decay)
    for t in range(10):
        theirs.grad = normals().roll(97 * t)[:n].clone()
        if t == 5:
            theirs.grad[:256] = 0
        own.step(theirs.grad)
        bnb.step()
    state = bnb.state[theirs]
    assert torch.equal(mine, theirs)
    assert torch.equal(own.m[0], state["state1"]) and torch.equal(own.v[0], state["state2"])
    assert torch.equal(own.m[1], state["absmax1"]) and torch.equal(own.v[1], state["absmax2"])
    assert own.nbytes == 2 * n + 8 * -(-n // 256)


@pytest.mark.parametrize(
    ("state", "signed"),
    [
        (torch.zeros(0), True),
        (torch.zeros(2, 2), True),
        (torch.zeros(3, dtype=torch.bfloat16), True),
        (torch.tensor([1.0, math.nan]), True),
        (torch.tensor([math.inf]), False),
        (torch.tensor([-1.0]), False),
    ],
)
def test_wrong_states_are_refused(state, signed):
    with pytest.raises(ValueError, match="state: expected"):
        states8.encode(state, signed)
    with pytest.raises(ValueError, match="at least 4096 numbers"):
        states8.AdamW8bit(torch.zeros(4095))


@pytest.mark.parametrize(
    ("gradient", "says"),
    [
        (torch.ones(1), r"gradient: expected float32 \(4096,\); got torch.float32, \(1,\)"),
        (torch.ones(4096, dtype=torch.float64), "gradient: expected float32"),
        (
            torch.full((4096,), math.nan),
            "gradient: expected finite numbers with finite squares in float32; got nan",
        ),
        (torch.full((4096,), -math.inf), "finite squares in float32; got inf"),
        (torch.full((4096,), 1e30), r"finite squares in float32; got 1e\+30"),
    ],
)
def test_a_wrong_gradient_changes_nothing(gradient, says):
    p = normals()[:4096].clone()
    own = states8.AdamW8bit(p)
    own.step(torch.ones(4096))
    before = p.clone(), own.m, own.v
    with pytest.raises(ValueError, match=says):
        own.step(gradient)
    assert torch.equal(p, before[0]) and own.t == 1 and (own.m, own.v) == before[1:]


def test_the_sign_is_a_flag():
    with pytest.raises(ValueError, match="signed: expected True or False; got 'no'"):
        states8.encode(torch.ones(3), "no")


# --- what bitsandbytes pages -----------------------------------------------------------------------------


def test_the_threshold_is_the_one_that_bitsandbytes_applies(monkeypatch):
    """Its own code decides, with an allocator that only notes what it is asked for."""
    module = reference.bitsandbytes().optim.optimizer
    asked = []
    monkeypatch.setattr(
        module.F, "get_paged", lambda *shape, **_: asked.append(math.prod(shape)) or torch.empty(shape)
    )
    monkeypatch.setattr(module.F, "fill", lambda *_: None)

    class OnGpu:
        """As much of a parameter as get_state_buffer looks at."""

        device = torch.device("cuda", 0)

        def __init__(self, n):
            self.shape = (n,)

        def numel(self):
            return self.shape[0]

    optimizer = reference.bitsandbytes().optim.PagedAdamW32bit([torch.nn.Parameter(torch.zeros(1))])
    monkeypatch.setattr(torch, "zeros_like", lambda p, **_: p)
    limit = int(thresholds.threshold())
    for n in (limit - 1, limit, limit + 1):
        optimizer.get_state_buffer(OnGpu(n))
    optimizer.page_mng.paged_tensors.clear()
    assert asked == [limit, limit + 1] and limit == 100_000


def test_pages_are_counted_on_a_real_adapter():
    from qlora_edu import lora, models

    model, _ = models.tiny()
    lora.add_lora(model, r=8)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    found = thresholds.paged(model, 8)
    assert (found.tensors, found.nbytes, found.paged) == (
        len(sizes),
        8 * sum(sizes),
        sum(n >= 1e5 for n in sizes),
    )


def test_only_optimizers_allocate_pages():
    assert thresholds.callers() == ("optim/ademamix.py", "optim/optimizer.py")


# --- the long row ----------------------------------------------------------------------------------------


def test_micro_batches_and_checkpointing_give_the_same_gradients_in_less_memory():
    from qlora_edu import memory, models
    from qlora_edu.memory import steps as of_memory

    model, _ = models.tiny()
    loss = of_memory.convert(model, "lora", dtype=torch.float32)
    rows = [Encoded((1,), tuple(range(2, 2 + n))) for n in (5, 6, 7, 60)]
    seen, peaks = [], []
    for micro, again in ((None, False), (1, False), (None, True)):
        kept = []
        original = torch.optim.AdamW.step
        try:
            torch.optim.AdamW.step = lambda self, kept=kept: kept.extend(
                p.grad.clone() for g in self.param_groups for p in g["params"]
            )
            stages = spike.steps(model, loss, [rows], micro, again)
            kept.clear()
            line = memory.timeline(stages)
        finally:
            torch.optim.AdamW.step = original
        seen.append(torch.cat([g.flatten() for g in kept]))
        peaks.append(spike.peaks(line)[0])
        assert peaks[-1] == line.peak
    assert seen[0].norm() > 0
    for other in seen[1:]:
        assert torch.allclose(other, seen[0], atol=1e-6 * seen[0].abs().max().item() + 1e-7, rtol=1e-4)
    assert peaks[1] < peaks[0] and peaks[2] < peaks[0]
    with pytest.raises(ValueError, match="expected at least one step"):
        spike.steps(model, loss, [])
    for micro in (1.5, 0, True):
        with pytest.raises(ValueError, match="micro: expected a whole number of rows"):
            spike.steps(model, loss, [rows], micro)


@pytest.mark.parametrize("module", ["adamw", "policies", "states8", "thresholds"])
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"qlora_edu.paging.{module}"))
    assert result.attempted > 0 and result.failed == 0


def test_the_package_shows_what_the_chapter_uses():
    assert {"UnifiedMemory", "PagedAdamW", "OutOfMemory", "adamw_"} <= set(paging.__all__)
