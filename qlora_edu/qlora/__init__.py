"""QLoRA: the 4-bit layer that gradients pass through (`layers`, `product`), and models made of it (`conversion`)."""

from qlora_edu.qlora.conversion import add_qlora, merge_into_dense, quantize_model
from qlora_edu.qlora.layers import NF4Linear, QLoRALinear

__all__ = ["NF4Linear", "QLoRALinear", "add_qlora", "merge_into_dense", "quantize_model"]
