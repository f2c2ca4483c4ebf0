"""Faster is still right: whatever quantizes or decodes is tested again with each kernel path forced, on one thread
and on two. The other modules run with the path that the machine itself would choose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_edu.kernels.choice import VARIABLE

HERE = Path(__file__).parent
SPINE = ("test_blockwise.py", "test_kernels.py", "test_qlora.py", "test_parity.py", "test_storage.py")
TAKES_A_MINUTE = "compare_real_model"  # runs once, elsewhere: its layers are those of the other comparisons


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kernels", ["torch", "numba", "triton"])
def test_the_spine_holds_with_each_path(kernels, threads):
    modules = [str(HERE / module) for module in SPINE]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not cuda", "-k", f"not {TAKES_A_MINUTE}", *modules],
        capture_output=True,
        text=True,
        env={**os.environ, VARIABLE: kernels, "OMP_NUM_THREADS": str(threads), "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout.splitlines()[-1]
