"""What is said about the 4-bit layer and the parameters that train, recomputed. Texts: `data/claims/qlora.toml`."""

import importlib.metadata
import tempfile
from functools import cache
from unittest import mock

import torch
from torch import nn

from qlora_edu import counts, lora, memory, models, qlora, reference
from qlora_edu.claims.ledger import recomputes
from qlora_edu.memory.parts import adapter_sizes, quantized
from qlora_edu.memory.shapes import Shape, on_meta, shape_of
from qlora_edu.models.convert import quiet_transformers

MIB = 2**20
IDS = torch.arange(24).view(2, 12) * 7 % 250
#: Mistral-7B-v0.3's released config.
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32_768,
    "tie_word_embeddings": False,
}


def _tiny(checkpointing: dict | None = None) -> nn.Module:
    """A small random QLoRA model in train mode, with transformers' checkpointing if there are options for it."""
    model, _ = models.tiny()
    torch.manual_seed(0)
    qlora.add_qlora(model, r=4)
    if checkpointing is not None:
        model.activation_checkpointing_enable(checkpointing)
    return model.train()


def _step(model: nn.Module) -> int:
    """Forward and backward. Returns how many of the adapter's tensors have a gradient."""
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    if loss.requires_grad:
        loss.backward()
    return sum(p.grad is not None for p in lora.adapter_parameters(model))


def _loaded_4bit(**options) -> nn.Module:
    """The small random model as transformers and bitsandbytes load it."""
    model, _ = models.tiny(dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        with quiet_transformers():
            model.save_pretrained(folder)
        return reference.load_4bit(folder, **options)


def _decodes(model: nn.Module) -> int:
    """How often a matrix of the last block is decoded in a step."""
    layer = lora.lora_layers(model)["model.layers.1.mlp.up_proj"].base
    seen, decode = [], type(layer.quantized).dequantize

    def counting(quantized, *arguments, **options):
        seen.append(quantized is layer.quantized)
        return decode(quantized, *arguments, **options)

    with mock.patch.object(type(layer.quantized), "dequantize", counting):
        _step(model)
    return sum(seen)


@recomputes("qlora-forward-only")
def decoded_twice() -> dict[str, float]:
    """Calls of the decoder are counted in one step, without and with checkpointing."""
    return {"decodes": _decodes(_tiny()), "checkpointing": _decodes(_tiny({"use_reentrant": False}))}


@recomputes("qlora-through-frozen")
def gradients_through_the_base() -> dict[str, float]:
    """Two steps of AdamW on a small model; its bytes before and after."""
    model = _tiny()
    before = {name: t.clone() for name, t in model.state_dict().items() if "lora_" not in name}
    optimizer = torch.optim.AdamW(lora.adapter_parameters(model), lr=1e-2)
    for _ in range(2):
        reached = _step(model)
        moving = sum(p.grad.any().item() for p in lora.adapter_parameters(model))
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    changed = sum(int((after[name] != t).sum()) for name, t in before.items())
    whole = reached == moving == len(lora.adapter_parameters(model))
    return {"all": whole, "tensors": reached, "changed": changed}


@recomputes("qlora-without-adapter")
def what_is_left_trainable() -> dict[str, float]:
    """The parameters that a model loaded in 4 bits leaves trainable; their share is that of LLaMA-7B."""
    model = _loaded_4bit(frozen=False)
    packed = [p for p in model.parameters() if type(p).__name__ == "Params4bit"]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("norm" in name or "embed" in name for name in trained) and len(packed) == 14
    shape = shape_of("llama-7b")
    share = 100 * sum(shape.other) / shape.parameters
    return {"linear": 100 * sum(p.requires_grad for p in packed) / len(packed), "share": share}


@recomputes("qlora-halved")
def count_of_trained() -> dict[str, float]:
    """PEFT's own count on a 4-bit model against the numbers in A and B; and Guanaco-7B's."""
    model = _with_peft(_loaded_4bit())
    real = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    all64 = sum(adapter_sizes(shape_of("llama-7b"), 64, lora.LLAMA_LINEARS))
    whole = shape_of("llama-7b").parameters + all64
    packed = counts.as_packed(shape_of("llama-7b")) + all64
    return {
        "ratio": model.get_nb_trainable_parameters()[0] / real,
        "trained": all64,
        "half": all64 / 2,
        "share": 100 * all64 / whole,
        "printed": 100 * all64 / 2 / packed,
    }


def _with_peft(model: nn.Module, **options) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=list(lora.LLAMA_LINEARS)), **options)


@recomputes("qlora-autocast")
def dtype_of_peft_adapters() -> dict[str, float]:
    """The dtype of A and B that PEFT puts on a 4-bit model, asked and not asked."""
    bits = {}
    for name, options in (("asked", {"autocast_adapter_dtype": False}), ("default", {})):
        model = _with_peft(_loaded_4bit(), **options)
        found = {8 * p.itemsize for n, p in model.named_parameters() if "lora_" in n}
        (bits[name],) = found
    return bits


@recomputes("qlora-checkpointing")
def gradients_with_checkpointing() -> dict[str, float]:
    """Tensors of the adapter with a gradient: the old kind of checkpointing without and with the hook; the new kind."""
    found = {}
    for name, reentrant, hook in (("bare", True, False), ("hooked", True, True), ("new", False, False)):
        model = _tiny({"use_reentrant": reentrant})
        if not hook:
            model.disable_input_require_grads()
        with mock.patch("warnings.warn"):
            found[name] = _step(model)
    return {"needed": found["new"] == 0, **found}


class _Cast(nn.Module):
    """As Linear4bit treats dtypes: computes in bfloat16, returns that of its input."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.weight, self.bias = base.weight, None

    def forward(self, x):
        return self.base(x.to(torch.bfloat16)).to(x.dtype)


@cache
def kept_by_peft(name: str, rows: int, length: int, prepared: bool, adapter: torch.dtype) -> int:
    """Bytes that autograd keeps of a 16-bit or 4-bit model with PEFT's LoRA of rank 8, on the meta device.

    Args:
        prepared: embedding and norms are in float32, as `prepare_model_for_kbit_training` leaves them.
        adapter: dtype of A and B.
    """
    shape = shape_of(name)
    model = on_meta(shape.config).train()
    for layer, _, _ in shape.linears:
        model.set_submodule(layer, _Cast(model.get_submodule(layer)))
    with torch.device("meta"):
        lora.add_lora(model, r=8)
    for layer in lora.lora_layers(model).values():
        layer.lora_a.data, layer.lora_b.data = layer.lora_a.to(adapter), layer.lora_b.to(adapter)
    if prepared:
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "embed" in parameter_name:
                parameter.data = parameter.data.float()
    stream = torch.float32 if prepared else torch.bfloat16
    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    mask = torch.zeros(rows, 1, length, length, dtype=stream, device="meta")
    decoder = model.get_decoder()
    kept = memory.kept_by_forward(model, lambda: decoder(input_ids=ids, attention_mask=mask, use_cache=False))
    return sum(kept.values())


def _total(name: str, rows: int, length: int, four: bool, prepared: bool) -> float:
    """MB of weights, adapter in 16 bits, and what is kept for backward."""
    shape = shape_of(name)
    base = sum(quantized(shape).values()) if four else 2 * shape.in_linears
    other = (4 if prepared else 2) * sum(shape.other)
    adapter = 2 * sum(adapter_sizes(shape, 8, lora.LLAMA_LINEARS))
    return (base + other + adapter + kept_by_peft(name, rows, length, prepared, torch.bfloat16)) / 1e6


@recomputes("qlora-more-memory")
def four_bits_prepared() -> dict[str, float]:
    """Weights, 16-bit adapter and kept activations of SmolLM2-135M, 2 x 256 tokens; and of LLaMA-7B, 1 x 512."""
    small = ("smollm2-135m", 2, 256)
    lora16, plain, prepared = (
        _total(*small, four, prep) for four, prep in ((False, False), (True, False), (True, True))
    )
    large = {f"large{four + prep}": _total("llama-7b", 1, 512, four, prep) / 1000 for four, prep in _THREE}
    return {"more": prepared > lora16, "lora16": lora16, "plain": plain, "prepared": prepared, **large}


_THREE = ((False, False), (True, False), (True, True))


@recomputes("qlora-prepare-1gb")
def cast_to_float32() -> dict[str, float]:
    """Bytes in float32 of what is not quantized in Mistral-7B-v0.3: matrices, and vectors (the norms)."""
    shape = shape_of(MISTRAL)
    norms = sum(n for n in shape.other if n == shape.d)
    return {"mib": 4 * norms / MIB, "rest": 4 * (sum(shape.other) - norms) / MIB}


@recomputes("qlora-defaults")
def defaults_of_the_config() -> dict[str, float]:
    """BitsAndBytesConfig asked for 4 bits and nothing else."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True)
    same = [config.bnb_4bit_quant_type == "nf4", config.bnb_4bit_use_double_quant]
    same += [config.bnb_4bit_compute_dtype == torch.bfloat16]
    return {"same": sum(same), "bits": 8 * config.bnb_4bit_compute_dtype.itemsize}


def _bits(shape: Shape) -> float:
    return 8 * (sum(quantized(shape).values()) + 2 * sum(shape.other)) / shape.parameters


@recomputes("qlora-whole-base")
def bits_of_the_whole_model() -> dict[str, float]:
    """Bits a number, what is left in 16 bits included."""
    small, large, most = (shape_of(name) for name in ("smollm2-135m", "llama-7b", "llama-65b"))
    share = 100 * sum(small.other) / small.parameters
    return {"small": _bits(small), "share": share, "large": _bits(large), "most": _bits(most)}


@recomputes("qlora-sft-prepares")
def what_trl_calls() -> dict[str, float]:
    """Lines of TRL's SFTTrainer that name the function."""
    (file,) = [f for f in importlib.metadata.files("trl") if str(f) == "trl/trainer/sft_trainer.py"]
    text = file.locate().read_text(encoding="utf-8")
    assert "class SFTTrainer" in text
    lines = sum("prepare_model_for_kbit_training" in line for line in text.splitlines())
    return {"calls": lines > 0, "lines": lines}


@recomputes("qlora-training-slower")
def work_of_a_step() -> dict[str, float]:
    """Decoded weights for each token's multiplication: forward and input gradient take 2 products a weight."""
    decodes = decoded_twice()["decodes"]
    return {"decodes": decodes, "one": 100 * decodes / 2, "many": 100 * decodes / (2 * 1024)}
