"""Which kernel does the work on a device. All of them give the same bits; they differ in speed alone."""

import importlib.util
import os
import warnings
from functools import cache
from types import ModuleType

import torch

VARIABLE = "QLORA_EDU_KERNELS"
CHOICES = ("auto", "torch", "numba", "triton")


def chosen(device: torch.device) -> tuple[str, str]:
    """The kernels for a device, "torch", "numba" or "triton", and the reason as a sentence.

    The environment variable QLORA_EDU_KERNELS forces one of them; "auto" is the default.

    Raises:
        ValueError: if the variable holds something else.
        RuntimeError: if it asks for kernels that cannot run there.
    """
    asked = os.environ.get(VARIABLE, "auto")
    if asked not in CHOICES:
        raise ValueError(f"{VARIABLE}: expected one of {', '.join(CHOICES)}; got {asked!r}")
    interpreted = asked == "triton" and os.environ.get("TRITON_INTERPRET", "0") == "1"
    return _chosen(asked, device.type, interpreted)


@cache
def _chosen(asked: str, device: str, interpreted: bool) -> tuple[str, str]:
    if device not in ("cuda", "cpu"):
        return "torch", f"Plain torch is all there is for {device!r} devices."
    if asked == "torch":
        return "torch", f"{VARIABLE} asks for plain torch."
    if asked in ("numba", "triton"):
        if importlib.util.find_spec(asked) is None:
            raise RuntimeError(
                f"{VARIABLE}: {asked} is asked for, and is not installed. Try: pip install {asked}"
            )
        if asked == "triton" and device == "cpu" and not interpreted:
            raise RuntimeError(
                f"{VARIABLE}: on a CPU only Triton's interpreter runs: set TRITON_INTERPRET=1 as well"
            )
        if asked == "numba" and device == "cuda":
            raise RuntimeError(f"{VARIABLE}: Numba's kernels are for a CPU; ask for triton, or for nothing")
        return asked, f"{VARIABLE} asks for {asked}." + (_numba_is_ready() if asked == "numba" else "")
    if device == "cpu":
        return _for_cpu()
    if importlib.util.find_spec("triton") is None:
        warnings.warn(
            "Triton is not installed, so 4-bit weights are decoded by plain torch: the same bits, many times slower.",
            stacklevel=4,
        )
        return "torch", "Triton is not installed."
    return "triton", "Triton is installed."


def _for_cpu() -> tuple[str, str]:
    try:
        from qlora_edu.kernels import numba_lookup

        if lanes := numba_lookup.lanes():
            return (
                "numba",
                f"One instruction of this CPU decodes {lanes} weights at once." + _numba_is_ready(),
            )
    except Exception as error:  # whatever went wrong, plain torch gives the same bits
        warnings.warn(
            f"Numba's kernels cannot run here ({error}), so 4-bit weights are decoded by plain torch: the same bits, "
            "more slowly. If it ran before, delete qlora_edu/kernels/__pycache__ and try again.",
            stacklevel=5,
        )
        return "torch", "Numba's kernels cannot run here."
    return (
        "torch",
        "This CPU has neither AVX-512 nor AVX2 with F16C, and without them compiled loops are hardly faster.",
    )


def _numba_is_ready() -> str:
    from qlora_edu.kernels import numba_codes

    return f" The kernels were ready after {numba_codes.ready():.1f} s (longer the first time, when they are compiled)."


def decoder(device: torch.device) -> ModuleType:
    """The module whose `decode_into` is for tensors on this device."""
    name = chosen(device)[0]
    if name == "triton":
        from qlora_edu.kernels import triton_decode as module
    elif name == "numba":
        from qlora_edu.kernels import numba_codes as module
    else:
        from qlora_edu.kernels import decode as module
    return module


def encoder(device: torch.device) -> ModuleType:
    """The module whose `encode_into` is for tensors on this device."""
    if chosen(device)[0] == "numba":
        from qlora_edu.kernels import numba_codes as module
    else:
        from qlora_edu.kernels import encode as module
    return module
