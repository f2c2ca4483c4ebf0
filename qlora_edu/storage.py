"""A 4-bit tensor as named tensors: the layout of a bitsandbytes checkpoint, in both directions.

weight                                  uint8 (ceil(n / 2), 1), the packed codes
weight.absmax                           float32 (blocks,), or their uint8 codes if double-quantized
weight.quant_map                        float32 (16,), the codebook
weight.nested_absmax                    float32, second-level scales     } only if
weight.nested_quant_map                 float32 (256,), the 8-bit map    } double-quantized
weight.quant_state.bitsandbytes__nf4    uint8, a JSON text with everything that is no tensor
"""

import json
import math

import torch
from torch import Tensor

from qlora_edu import codebooks, double_quantization
from qlora_edu.blockwise import BLOCK_SIZES, FLOATS, QuantizedTensor
from qlora_edu.double_quantization import QuantizedScales

_STATE = ".quant_state.bitsandbytes__"


def to_stored(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a 4-bit tensor, by their names after "weight". Byte for byte what bitsandbytes writes.

    Raises:
        ValueError: for a codebook that bitsandbytes has no name for.
    """
    if quantized.codebook not in ("nf4", "fp4"):
        raise ValueError(f"quantized: bitsandbytes stores nf4 and fp4 only; got {quantized.codebook!r}")
    levels, _, _ = codebooks.table(quantized.codebook, quantized.packed.device)
    tensors = {"": quantized.packed.unsqueeze(1)}
    facts = {
        "quant_type": quantized.codebook,
        "blocksize": quantized.block_size,
        "dtype": str(quantized.dtype).removeprefix("torch."),
        "shape": list(quantized.shape),
    }
    scales = quantized.stored_scales
    if isinstance(scales, QuantizedScales):
        tensors[".absmax"] = scales.codes
        tensors[".nested_absmax"] = scales.absmax
        tensors[".nested_quant_map"] = codebooks.dynamic_map().to(scales.codes.device)
        facts |= {
            "nested_blocksize": double_quantization.BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": scales.offset.item(),
        }
    else:
        tensors[".absmax"] = scales
    tensors[".quant_map"] = levels.clone()
    tensors[_STATE + quantized.codebook] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    return tensors


def from_stored(stored: dict[str, Tensor]) -> QuantizedTensor:
    """The 4-bit tensor that `to_stored`, or bitsandbytes, wrote.

    Args:
        stored: tensors by their names after "weight".

    Raises:
        ValueError: if a tensor is missing, or they do not fit together.
    """
    states = [name for name in stored if name.startswith(_STATE)]
    if len(states) != 1 or "" not in stored or ".absmax" not in stored:
        raise ValueError(
            f'stored: expected a packed weight, ".absmax" and one "{_STATE}..."; got {sorted(stored)}'
        )
    try:
        facts = json.loads(bytes(stored[states[0]].tolist()))
        codebook, block_size, shape = facts["quant_type"], facts["blocksize"], tuple(facts["shape"])
        dtype = getattr(torch, facts["dtype"])
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"stored: {states[0]} does not describe a 4-bit tensor ({error})") from error
    if codebook not in codebooks.CODEBOOKS or block_size not in BLOCK_SIZES or dtype not in FLOATS:
        raise ValueError(f"stored: unknown quant_type, blocksize or dtype in {facts}")

    count = math.prod(shape)
    blocks = -(-count // block_size)
    packed = stored[""].flatten().view(torch.uint8)
    _check_tensor("packed codes", packed, torch.uint8, (count + 1) // 2)
    levels, _, _ = codebooks.table(codebook, packed.device)
    if not torch.equal(stored.get(".quant_map", levels), levels):
        raise ValueError(f"stored: .quant_map does not hold the levels of {codebook}")
    if "nested_offset" not in facts:
        scales = stored[".absmax"]
        _check_tensor(".absmax", scales, torch.float32, blocks)
    else:
        if ".nested_absmax" not in stored or facts.get("nested_blocksize") != double_quantization.BLOCK_SIZE:
            raise ValueError(
                "stored: double-quantized scales need .nested_absmax and a nested_blocksize of 256"
            )
        codes, absmax = stored[".absmax"], stored[".nested_absmax"]
        _check_tensor(".absmax", codes, torch.uint8, blocks)
        _check_tensor(".nested_absmax", absmax, torch.float32, -(-blocks // double_quantization.BLOCK_SIZE))
        offset = torch.tensor(facts["nested_offset"], dtype=torch.float32, device=codes.device)
        scales = QuantizedScales(codes, absmax, offset)
    return QuantizedTensor(packed, scales, codebook, block_size, shape, dtype)


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, count: int) -> None:
    if tensor.dtype != dtype or tensor.numel() != count:
        raise ValueError(
            f"stored: {name}: expected {count} of {dtype}; got {tensor.numel()} of {tensor.dtype}"
        )
