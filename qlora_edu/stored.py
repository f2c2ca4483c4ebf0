"""Random numbers that are the same on every machine: stored, since one seed gives different bits on different CPUs."""

from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


@cache
def normals() -> Tensor:
    """65,536 numbers from N(0, 1), float32. They are shared: do not write to them."""
    return load_file(Path(__file__).parent / "data" / "normals.safetensors")["normals"]
