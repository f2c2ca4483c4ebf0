"""bitsandbytes as the oracle: the one place that touches its switches, and why.

Two faults of bitsandbytes 0.50.2 on CPUs with AVX512 would make it a wrong oracle:

1. With AVX512-BF16, the first forward pass in eval mode repacks a layer's weights in place and rounds its scales to
   bfloat16. Training after that loses the gradient through the base, and merging is wrong. `bitsandbytes()` switches
   that path off before any layer is made.
2. The AVX512 decoder finds a block's scale by row, which is wrong where a row does not end with a block.
   `dequantize` decodes the tensor as one row.

Three harmless differences remain, which a comparison of bits has to know. AVX512-BF16 rounds subnormal results to
zero (`dequantize` decodes to float32 and lets torch round, which gives the same bits everywhere else). FP4's
second zero, code 8, comes back as -0 or +0, depending on the path. And the backward pass of `Linear4bit` decodes
to the dtype of the original weight before it converts to the dtype of the computation.
"""

from functools import cache
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor, nn

from qlora_edu.models.convert import quiet_transformers


@cache
def bitsandbytes() -> ModuleType:
    """The bitsandbytes module, with in-place repacking switched off for layers made from now on.

    Its plain kernels go through `torch.compile`, which takes a C++ compiler and seconds for each new shape. Here they
    run as they are written, even if something else, such as PEFT, has imported bitsandbytes before.
    """
    with mock.patch.object(torch, "compile", lambda function=None, **_: function):
        import bitsandbytes as bnb
        from bitsandbytes.backends.default import ops
    for name, function in list(vars(ops).items()):
        setattr(ops, name, getattr(function, "__wrapped__", function))
    bnb.nn.modules.has_avx512bf16 = lambda: False
    return bnb


def repacks_in_place() -> bool:
    """Whether bitsandbytes would repack weights in place on this CPU, were it not switched off (fault 1)."""
    return bool(bitsandbytes().functional.has_avx512bf16())


def quantize(weight: Tensor, block_size: int = 64, codebook: str = "nf4", double_quant: bool = False):
    """bitsandbytes' `quantize_4bit`. Returns its packed tensor, uint8 (ceil(n / 2), 1), and its QuantState."""
    return bitsandbytes().functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=codebook, compress_statistics=double_quant
    )


def dequantize(packed: Tensor, state, dtype: torch.dtype | None = None) -> Tensor:
    """bitsandbytes' `dequantize_4bit`, decoded as one row (fault 2). Returns a tensor of the original shape."""
    functional = bitsandbytes().functional
    flat = functional.QuantState(
        absmax=scales(state),
        shape=torch.Size([state.shape.numel()]),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=torch.float32,
    )
    decoded = functional.dequantize_4bit(packed.view(-1, 1), flat)
    return decoded.reshape(state.shape).to(dtype or state.dtype)


def scales(state) -> Tensor:
    """The float32 scales of a QuantState, second level undone. Returns float32 (blocks,)."""
    if not state.nested:
        return state.absmax
    return bitsandbytes().functional.dequantize_blockwise(state.absmax, state.state2) + state.offset


def linear4bit(linear: nn.Linear, compute_dtype: torch.dtype, double_quant: bool = True) -> nn.Module:
    """bitsandbytes' `Linear4bit` (NF4) holding the weights of `linear`, which is left as it was."""
    bnb = bitsandbytes()
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        compress_statistics=double_quant,
        quant_type="nf4",
    )
    layer.load_state_dict(linear.state_dict())
    layer.weight = bnb.nn.Params4bit(
        linear.weight.detach().clone(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=double_quant,
        module=layer,
    )
    return layer.to(linear.weight.device)


def leave_switch_on(layer: nn.Module) -> nn.Module:
    """Let this one `Linear4bit` repack its weights in its first eval forward, if this CPU can (fault 1).

    For looking at the fault: such a layer is not to be compared with anything. Returns it.
    """
    layer.support_avx512bf16_for_cpu = repacks_in_place()
    return layer


def load_4bit(
    folder,
    compute_dtype: torch.dtype = torch.bfloat16,
    double_quant: bool = True,
    device: str = "cpu",
    frozen: bool = True,
):
    """A causal language model loaded by transformers with bitsandbytes' NF4 layers.

    Args:
        folder: local folder or hub id.
        compute_dtype: also the dtype of everything that stays unquantized.
        frozen: freeze all parameters; otherwise transformers leaves trainable what is not quantized.

    Returns:
        The transformers model, in train mode.
    """
    bitsandbytes()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=config,
            dtype=compute_dtype,
            device_map=device,
            attn_implementation="eager",
            use_safetensors=True,
        )
    return (model.requires_grad_(False) if frozen else model).train()
