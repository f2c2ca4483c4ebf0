"""`fuse` puts the fused functions into transformers' LLaMA model."""

from types import MethodType

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama

from qlora_edu.fused.causal_attention import attention
from qlora_edu.fused.elementwise import rms_norm, swiglu


def fuse(model: nn.Module) -> nn.Module:
    """Let the blocks of a LLaMA model run `attention`, `rms_norm` and `swiglu`, in place. Returns the model.

    Its modules, their names and weights stay what they are, and what they compute is rounded where it was before;
    gradients are rounded less often. What these functions do not do is done as before: a step with a cache, attention
    with dropout or with its weights asked for, norms that are trained, autocast.

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
        if type(module) in _FORWARD:
            module.forward = MethodType(_FORWARD[type(module)], module)
    return model


def _norm(self: llama.LlamaRMSNorm, hidden_states: Tensor) -> Tensor:
    if self.weight.requires_grad or _is_autocast(hidden_states):
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _mlp(self: llama.LlamaMLP, x: Tensor) -> Tensor:
    if not isinstance(self.act_fn, SiLUActivation) or _is_autocast(x):
        return type(self).forward(self, x)
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _attention(
    self: llama.LlamaAttention,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values=None,
    **options,
) -> tuple[Tensor, None]:
    if (
        past_key_values is not None
        or (self.training and self.attention_dropout)
        or options.get("output_attentions", self.config.output_attentions)
        or self.config._attn_implementation != "eager"
        or (attention_mask is not None and attention_mask.shape[1] != 1)  # another for each head
        or _is_autocast(hidden_states)
    ):
        return type(self).forward(
            self, hidden_states, position_embeddings, attention_mask, past_key_values, **options
        )
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (project(hidden_states).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
    y = attention(q, k, v, *position_embeddings, attention_mask, self.scaling)
    return self.o_proj(y.flatten(-2)), None


def _is_autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


_FORWARD = {llama.LlamaRMSNorm: _norm, llama.LlamaMLP: _mlp, llama.LlamaAttention: _attention}
