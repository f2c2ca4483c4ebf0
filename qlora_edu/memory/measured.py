"""Bytes, measured.

The peak of a step can only be measured in a process that does nothing else: memory that was used once and given back
still counts, and a library that was imported for something else does too.
"""

import gc
import json
import os
import subprocess
import sys
import threading
import time

import psutil

#: glibc keeps freed memory for later, so that a process looks larger than what lives in it. With these variables it
#: gives back what is freed at once, at the price of time. Other systems ignore them.
FAITHFUL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident() -> int:
    """Bytes of RAM that this process occupies now, after a collection of garbage."""
    gc.collect()
    return psutil.Process().memory_info().rss


class PeakMemory:
    """Watches this process from entering to leaving: `bytes` is the largest resident size, `before` that at the start.

    Resident memory is what really occupies RAM. It is sampled every 2 ms, so that what lives for a shorter
    time can be missed, and read once more at the end.
    """

    def __enter__(self) -> "PeakMemory":
        self._process = psutil.Process()
        self.before = self.bytes = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.is_set():
            self.bytes = max(self.bytes, self._process.memory_info().rss)
            time.sleep(0.002)

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, self._process.memory_info().rss)


def in_fresh_process(
    function: str, *arguments, timeout: float = 600, environment: dict[str, str] | None = None
) -> dict:
    """Call a function in a new Python process, and return the dict that it returns.

    Args:
        function: "package.module:name".
        arguments: numbers, strings, lists: what JSON can carry.
        environment: variables to set there, such as FAITHFUL.

    Raises:
        RuntimeError: if the process fails, with the last line that it wrote.
    """
    done = subprocess.run(
        [sys.executable, "-m", "qlora_edu.memory", function, json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONWARNINGS": "ignore", **(environment or {})},
    )
    if done.returncode:
        raise RuntimeError(
            f"{function} failed in a fresh process: {(done.stderr.strip() or 'no message').splitlines()[-1]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def peak_of_step(
    stack: str, rows: int = 4, length: int = 256, checkpointing: bool = False, attention: str = "eager"
) -> dict:
    """Resident memory around one training step of a `stacks.Stack`: meant for `in_fresh_process`.

    Args:
        attention: transformers' name for an implementation of attention.

    Returns:
        "loaded": bytes once the model stands; "peak": the largest while two steps ran.
    """
    import torch
    from transformers import PreTrainedModel

    from qlora_edu import stacks
    from qlora_edu.training import TrainConfig, train

    chosen = stacks.build(stack)
    inside = next(module for module in chosen.model.modules() if isinstance(module, PreTrainedModel))
    inside.set_attn_implementation(attention)
    loaded = psutil.Process().memory_info().rss
    config = TrainConfig(steps=2, batch_size=rows, gradient_checkpointing=checkpointing)
    with PeakMemory() as peak:
        run = train(chosen.model, random_rows(rows, length), config, loss=chosen.loss, progress=False)
    return {"loaded": loaded, "peak": peak.bytes, "losses": run.losses, "threads": torch.get_num_threads()}


def random_rows(rows: int, length: int, vocabulary: int = 49_152) -> list:
    """Rows of `length` arbitrary tokens, all of them scored but the first."""
    from qlora_edu.training import Encoded

    numbers = [(i * 7_919 + i * i * 31) % vocabulary for i in range(rows * length)]
    return [
        Encoded(tuple(numbers[i : i + 1]), tuple(numbers[i + 1 : i + length]))
        for i in range(0, len(numbers), length)
    ]
