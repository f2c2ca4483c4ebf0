"""How many numbers an adapter trains, and what share of the model that is. Counted on the meta device.

A is (r, in) and B is (out, r), so an adapter of rank r on a layer (out, in) has r · (in + out) numbers.
"""

import torch
from torch import nn

from qlora_edu.lora import LLAMA_LINEARS
from qlora_edu.memory.shapes import Shape, shape_of

QUERY_VALUE = ("q_proj", "v_proj")  # where the LoRA paper attaches (arXiv 2106.09685, section 4.2)
ALL_LINEAR = LLAMA_LINEARS  # where the QLoRA paper attaches
GPT3 = 175_255_800_000  # parameters of GPT-3 as the LoRA paper counts them (table 4)
GPT3_LAYERS, GPT3_WIDTH = 96, 12_288  # arXiv 2005.14165, table 2.1


def adapter(model, r: int, targets=ALL_LINEAR) -> int:
    """Numbers in an adapter of rank r.

    Args:
        model: whatever `memory.shapes.shape_of` takes: "llama-7b", a config, a transformers model.
        targets: the layers whose name ends in one of these.

    Raises:
        ValueError: if r is no whole number of at least 1, or no layer has one of these names.

    >>> adapter("llama-7b", 8, QUERY_VALUE)
    4194304
    """
    _check_rank(r)
    return sum(r * (out + inn) for _, out, inn in shape_of(model).targets(targets))


def gpt3_adapter(r: int) -> int:
    """Numbers in an adapter of rank r on the query and value matrices of GPT-3, each (12,288, 12,288).

    >>> gpt3_adapter(4)
    18874368
    """
    _check_rank(r)
    return GPT3_LAYERS * 2 * r * (GPT3_WIDTH + GPT3_WIDTH)


def share(model, r: int, targets=ALL_LINEAR) -> float:
    """The adapter's numbers, in percent of the model's own."""
    return 100 * adapter(model, r, targets) / shape_of(model).parameters


def as_packed(shape: Shape) -> int:
    """What `sum(p.numel())` says of a 4-bit model: two codes share a byte, and a byte counts as one number.

    The output layer and the embedding stay unquantized, as transformers leaves them.
    """
    return sum(shape.other) + sum(-(-out * inn // 2) for _, out, inn in shape.linears)


def counted(model: nn.Module) -> tuple[int, int]:
    """(numbers that are trained, all numbers) of a model, each parameter tensor taken as it is stored."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def on_meta(model) -> nn.Module:
    """The model itself on the meta device: every layer is there, with its shape and no memory."""
    from transformers import AutoModelForCausalLM

    from qlora_edu.memory.shapes import config_of

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(model), trust_remote_code=False)


def _check_rank(r: int) -> None:
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r: expected a whole number of at least 1; got {r!r}")
