"""`fuse` puts the fused functions into transformers' LLaMA model."""

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama

from qlora_edu.fused.causal_attention import attention
from qlora_edu.fused.elementwise import rms_norm, swiglu


def fuse(model: nn.Module) -> nn.Module:
    """Let the blocks of a LLaMA model run `attention`, `rms_norm` and `swiglu`, in place. Returns the model.

    Its modules, their names and weights stay what they are (each becomes an instance of a class below, which inherits
    from its own), and what they compute is rounded where it was before; gradients are rounded less often. What these
    functions do not do is done as before: a step with a cache, attention with dropout, with its weights asked for or
    with a mask unlike those that transformers makes, norms that are trained, autocast. Second derivatives are refused.

    Raises:
        ValueError: if the model has no block of transformers' LLaMA, or its attention is not the eager one.
    """
    blocks = [module for module in model.modules() if type(module) is llama.LlamaDecoderLayer]
    if not blocks:
        raise ValueError(f"model: expected one with transformers' LLaMA blocks; got {type(model).__name__}")
    kind = blocks[0].self_attn.config._attn_implementation
    if kind != "eager":
        raise ValueError(
            f"model: expected eager attention, as models.load gives it; got {kind!r}. "
            "Call model.set_attn_implementation('eager')."
        )
    for module in model.modules():
        module.__class__ = _FUSED.get(type(module), type(module))
    return model


class FusedNorm(llama.LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.weight.requires_grad or _is_autocast(hidden_states):
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class FusedMLP(llama.LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.act_fn, SiLUActivation) or _is_autocast(x):
            return super().forward(x)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class FusedAttention(llama.LlamaAttention):
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        **options,
    ) -> tuple[Tensor, Tensor | None]:
        if (
            past_key_values is not None
            or (self.training and self.attention_dropout)
            or options.get("output_attentions", self.config.output_attentions)
            or self.config._attn_implementation != "eager"
            or not _is_usual(attention_mask, hidden_states)
            or _is_autocast(hidden_states)
        ):
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **options
            )
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (project(hidden_states).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        y = attention(q, k, v, *position_embeddings, attention_mask, self.scaling)
        return self.o_proj(y.flatten(-2)), None


def _is_usual(mask: Tensor | None, hidden_states: Tensor) -> bool:
    """Whether `attention` takes a mask. Somebody's own may be of another dtype, or differ between heads."""
    if mask is None:
        return True
    b, t = hidden_states.shape[:2]
    shapes = (1, 1, t, t), (b, 1, t, t)
    return mask.shape in shapes and mask.dtype == hidden_states.dtype and not mask.requires_grad


def _is_autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


_FUSED = {
    llama.LlamaRMSNorm: FusedNorm,
    llama.LlamaMLP: FusedMLP,
    llama.LlamaAttention: FusedAttention,
}
