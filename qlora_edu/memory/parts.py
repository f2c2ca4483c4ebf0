"""What stands still during a step: weights, adapter, gradients, optimizer states. One formula each."""

from qlora_edu.blockwise import BLOCK_SIZES
from qlora_edu.double_quantization import BLOCK_SIZE as SCALES_PER_BLOCK
from qlora_edu.memory.shapes import Shape

OPTIMIZER_BITS = (32, 16, 8)
_SMALLEST_IN_8_BITS, _STATES_PER_BLOCK = 4096, 256  # bitsandbytes' 8-bit Adam


def blocks_of(count: int, size: int) -> int:
    """Blocks of `size` that `count` numbers fill, the last one perhaps in part."""
    return -(-count // size)


def quantized(shape: Shape, block_size: int = 64, double_quant: bool = True) -> dict[str, int]:
    """Bytes of the linear layers in 4 bits, for each matrix of n weights:

        codes                n / 2
        scales               4 n/b, in float32; with double quantization n/b, in 8 bits
        second-level scales  4 n/(256 b) + 4: one float32 for 256 scales, and their mean

    with b weights to a block, and each quotient rounded up. Not modelled: the tables of levels, 1 KB in all.

    >>> from qlora_edu.memory.shapes import shape_of
    >>> {name: round(size / 1e9, 3) for name, size in quantized(shape_of("llama-65b")).items()}
    {'codes': 32.38, 'scales': 1.012, 'second-level scales': 0.016}
    """
    if isinstance(block_size, bool) or block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size: expected one of {BLOCK_SIZES}; got {block_size!r}")
    sizes = [out * inn for _, out, inn in shape.linears]
    if not sizes:
        raise ValueError(f"model: {shape.name!r} has no nn.Linear to quantize but its output layer")
    scales = [blocks_of(n, block_size) for n in sizes]
    return {
        "codes": sum(blocks_of(n, 2) for n in sizes),
        "scales": sum(scales) * (1 if double_quant else 4),
        "second-level scales": sum(4 * blocks_of(m, SCALES_PER_BLOCK) + 4 for m in scales)
        if double_quant
        else 0,
    }


def adapter_sizes(shape: Shape, rank: int, targets) -> list[int]:
    """Numbers in each A (r, in) and each B (out, r)."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank: expected a whole number of at least 1; got {rank!r}")
    return [size for _, out, inn in shape.targets(targets) for size in (rank * inn, rank * out)]


def optimizer(sizes: list[int], bits: int = 32, master: bool = False) -> int:
    """Bytes of Adam's two states for each trained number: its running mean and mean square.

        32 bits  8 n      16 bits  4 n (what torch's AdamW keeps of 16-bit parameters)
        8 bits   2 n + 2 · 4 n/256, one float32 scale for 256 states; tensors below 4,096 numbers stay at 32 bits

    and 4 n more with a float32 master copy of 16-bit parameters. Not modelled: the step counters.
    """
    if bits not in OPTIMIZER_BITS or isinstance(bits, bool):
        raise ValueError(f"optimizer_bits: expected one of {OPTIMIZER_BITS}; got {bits!r}")
    total = 4 * sum(sizes) if master else 0
    for n in sizes:
        small = bits == 8 and n >= _SMALLEST_IN_8_BITS
        wide = 4 if bits == 8 else bits // 8
        total += 2 * (n + 4 * blocks_of(n, _STATES_PER_BLOCK)) if small else 2 * wide * n
    return total
