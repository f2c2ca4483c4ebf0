"""Fresh inputs for a check: the same seed draws the same, and every check draws another seed."""

import random

import torch
from torch import Tensor


class Draw:
    """Random inputs. `hidden` is True where an instructor grades: a check may then draw larger or stranger ones."""

    def __init__(self, seed: int, hidden: bool = False):
        self.hidden = hidden
        self._torch = torch.Generator().manual_seed(seed % 2**63)
        self._python = random.Random(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers from N(0, 1)."""
        return torch.randn(shape, generator=self._torch, dtype=torch.float32).to(dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32 numbers from [low, high)."""
        return low + (high - low) * torch.rand(shape, generator=self._torch, dtype=torch.float32)

    def integers(self, *shape: int, low: int, high: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Whole numbers from low to high, both included."""
        return torch.randint(low, high + 1, shape, generator=self._torch).to(dtype)

    def permutation(self, count: int) -> Tensor:
        """0 to count - 1, shuffled."""
        return torch.randperm(count, generator=self._torch)

    def whole(self, low: int, high: int) -> int:
        """One whole number from low to high, both included."""
        return self._python.randint(low, high)

    def number(self, low: float, high: float) -> float:
        """One number between low and high."""
        return self._python.uniform(low, high)

    def choice(self, options):
        """One of the options."""
        return self._python.choice(list(options))
