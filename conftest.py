"""pytest's set-up, for the tests and, under nbval, for the notebooks."""

import os

import pytest
import torch
from nbval.kernel import RunningKernel

from qlora_edu.notebooks import BATCH_ENVIRONMENT

os.environ.update(BATCH_ENVIRONMENT)  # notebooks are compared under what they were executed under
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton; its kernels then run on the CPU


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")


def execute_as_a_reader_would(self, cell_input, allow_stdin=None):
    """nbval asks the kernel not to store a cell in the history, and then a `;` at its end hides no output."""
    return self.kc.execute(cell_input, store_history=True, allow_stdin=allow_stdin, stop_on_error=False)


RunningKernel.execute_cell_input = execute_as_a_reader_would
