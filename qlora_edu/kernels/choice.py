"""Which kernel does the work on a device. All of them give the same bits; they differ in speed alone."""

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache

import torch

VARIABLE = "QLORA_EDU_KERNELS"
CHOICES = ("auto", "torch", "triton")


def chosen(device: torch.device) -> tuple[str, str]:
    """The kernels for a device, "torch" or "triton", and the reason as a sentence.

    The environment variable QLORA_EDU_KERNELS forces one of them; "auto" is the default.

    Raises:
        ValueError: if the variable holds something else.
        RuntimeError: if it asks for Triton where it cannot run.
    """
    asked = os.environ.get(VARIABLE, "auto")
    if asked not in CHOICES:
        raise ValueError(f"{VARIABLE}: expected one of {', '.join(CHOICES)}; got {asked!r}")
    return _chosen(asked, device.type, _interpreted())


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _chosen(asked: str, device: str, interpreted: bool) -> tuple[str, str]:
    if device not in ("cuda", "cpu"):
        return "torch", f"Triton has no path for {device!r} devices here."
    missing = importlib.util.find_spec("triton") is None
    if asked == "torch":
        return "torch", f"{VARIABLE} asks for plain torch."
    if asked == "triton":
        if missing:
            raise RuntimeError(
                f"{VARIABLE}: Triton is asked for, and is not installed. Try: pip install triton"
            )
        if device != "cuda" and not interpreted:
            raise RuntimeError(
                f"{VARIABLE}: Triton is asked for on {device}, where only its interpreter runs: TRITON_INTERPRET=1"
            )
        return "triton", f"{VARIABLE} asks for Triton."
    if device != "cuda":
        return "torch", "Plain torch decodes at memory speed on a CPU."
    if missing:
        warnings.warn(
            "Triton is not installed, so 4-bit weights are decoded by plain torch: the same bits, many times slower.",
            stacklevel=4,
        )
        return "torch", "Triton is not installed."
    return "triton", "Triton is installed."


def decoder(device: torch.device) -> Callable:
    """The `decode_into` for tensors on this device."""
    if chosen(device)[0] == "triton":
        from qlora_edu.kernels.triton_decode import decode_into
    else:
        from qlora_edu.kernels.decode import decode_into
    return decode_into
