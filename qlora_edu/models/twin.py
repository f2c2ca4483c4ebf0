"""A random model of SmolLM2's architecture, small enough for tests, and a tokenizer that knows only bytes."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_edu.models import tokens

HIDDEN = 128


def tiny(
    seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random twin of the default model, in eval mode, and its tokenizer.

    Grouped-query attention (4 heads, 2 of keys and values), SwiGLU, rotary positions, tied embeddings; 2
    layers and 428,800 parameters. Every row of a linear layer is a multiple of 64 long, as blocks of 64
    weights want it. The special tokens, their ids and the chat template are SmolLM2's. The same seed gives
    the same weights, and torch's global generator stays as it is.
    """
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tokens.MAX_LENGTH,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        initializer_range=HIDDEN**-0.5,  # SmolLM2's rule
        tie_word_embeddings=True,
        attn_implementation="eager",
        dtype=dtype,
        **tokens.IDS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        # transformers starts the row of the padding token at zero. It ends answers too, and must be learnable.
        model.model.embed_tokens.weight.data[config.pad_token_id].normal_(std=config.initializer_range)
    for (
        parameter
    ) in model.parameters():  # not model.to(dtype): the rotary frequencies stay fp32, as in a loaded model
        parameter.data = parameter.data.to(dtype)
    return model.eval(), tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """17 special tokens, then one token for each of the 256 bytes: any text comes out as it went in."""
    entries = [*tokens.SPECIAL_TOKENS, *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(entries)}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in tokens.SPECIAL_TOKENS])
    tokenizer.pre_tokenizer = tokens.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=tokens.MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=tokens.CHAT_TEMPLATE,
        **tokens.ROLES,
    )
