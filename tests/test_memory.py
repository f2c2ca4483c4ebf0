"""Measured bytes, against allocations of a known size."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

from qlora_edu import memory

PEAK = """
import time, torch
from qlora_edu import memory
with memory.PeakMemory() as peak:
    block = torch.ones(50_000_000)  # 200 MB
    time.sleep(0.1)  # long enough to be sampled when it is complete, on a busy machine too
    del block
print(peak.bytes - peak.before)
"""


def test_a_peak_is_seen_although_it_is_gone_at_the_end():
    """In a process of its own: this one may hold freed memory that a new tensor would reuse."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert 190e6 < int(done.stdout) < 300e6


def test_nothing_allocated_is_nothing_measured():
    with memory.PeakMemory() as peak:
        pass
    assert peak.bytes - peak.before < 20e6


def test_a_fresh_process_answers_with_a_dict():
    result = memory.in_fresh_process("platform:python_version_tuple")
    assert ".".join(result) == ".".join(map(str, sys.version_info[:3]))


def test_a_failure_in_a_fresh_process_is_told():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        memory.in_fresh_process("operator:truediv", 1, 0)


def test_rows_have_the_length_asked_for_and_score_all_but_the_first_token():
    rows = memory.random_rows(3, 17, vocabulary=100)
    assert [len(row) for row in rows] == [17] * 3
    assert all(len(row.prompt) == 1 and max(row.answer) < 100 for row in rows)
    assert len(set(rows)) == 3


def test_a_fresh_process_gets_the_variables_it_is_given():
    given = memory.in_fresh_process("os:getenv", "MALLOC_TRIM_THRESHOLD_", environment=memory.FAITHFUL)
    assert given == memory.FAITHFUL["MALLOC_TRIM_THRESHOLD_"]


def test_a_method_of_the_real_model_takes_more_than_its_weights():
    peak = memory.in_fresh_process(
        "qlora_edu.memory.steps:peak_of_method", "lora", 1, 16, environment=memory.FAITHFUL
    )
    weights = memory.predict("smollm2-135m", "lora").weights
    assert peak["peak"] - peak["base"] > weights


def test_what_was_asked_what_it_keeps_is_freed():
    """`exp` keeps its result: a result held by its own graph would live until the garbage collector finds it."""
    layer = nn.Linear(4, 4)
    seen = []

    def forward():
        y = layer(torch.ones(2, 4)).exp()
        seen.append(weakref.ref(y))
        return y

    gc.collect()
    gc.disable()
    try:
        assert sum(memory.kept_by_forward(layer, forward).values()) > 0
        assert seen[-1]() is None
    finally:
        gc.enable()
