"""Is it the real thing? Every bit that this package computes, against bitsandbytes, PEFT and transformers.

    python -m qlora_edu.parity

prints one row for each comparison: how many values were compared, and how many differ in any bit. The inputs are made
from numbers stored in the package and from the weights of the real model, not from a seed: one seed gives other
numbers on another CPU.
"""

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_edu import adapters, blockwise, codebooks, lora, models, qlora, reference
from qlora_edu.stored import normals as stored_normals

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 256, 4096)
TARGETS = list(lora.LLAMA_LINEARS)
ODD_SIZES = (1, 2, 3, 5, 31, 32, 33, 63, 64, 65, 127, 1_000, 4_097, 99_999, 1_000_001)
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Row:
    """One comparison: how many values, and in how many any bit differs."""

    what: str
    compared: int
    mismatches: int


def differing(ours: Tensor, theirs: Tensor) -> tuple[int, int]:
    """How many values were compared, and how many differ in any bit. Another shape or dtype counts as all."""
    ours, theirs = ours.detach().contiguous(), theirs.detach().contiguous()
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return max(ours.numel(), theirs.numel(), 1), max(ours.numel(), theirs.numel(), 1)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    return ours.numel(), int((ours.view(width) != theirs.view(width)).sum())


def row(what: str, *pairs: tuple[Tensor, Tensor]) -> Row:
    """One Row for several pairs of tensors (ours, theirs)."""
    counts = [differing(ours, theirs) for ours, theirs in pairs]
    return Row(what, sum(compared for compared, _ in counts), sum(mismatches for _, mismatches in counts))


def stored_weights(count: int, start: int = 0) -> Tensor:
    """`count` bell-shaped numbers with some outliers, float32, the same bits on every machine.

    They are products of two stored numbers: IEEE multiplication has one right answer.
    """
    normals = stored_normals()
    i = torch.arange(start, start + count)
    return normals[i % len(normals)] * normals[
        (i * 31 + i // len(normals) * 4099 + 7) % len(normals)
    ].abs().add(0.5)


def compare_codebooks() -> Iterator[Row]:
    functional = reference.bitsandbytes().functional
    yield row("NF4 codebook", (codebooks.nf4(), functional.get_4bit_type("nf4", device="cpu")))
    yield row("FP4 codebook", (codebooks.fp4(), functional.get_4bit_type("fp4", device="cpu")))
    yield row("8-bit dynamic map", (codebooks.dynamic_map(), functional.create_dynamic_map()))


def _pairs(weight: Tensor, block_size: int, codebook: str, double_quant: bool) -> list[tuple[Tensor, Tensor]]:
    """(ours, theirs) for the packed codes, the scales, what stores the scales, and the decoded weights."""
    ours = blockwise.quantize(weight, block_size, codebook, double_quant)
    packed, state = reference.quantize(weight, block_size, codebook, double_quant)
    decoded = [ours.dequantize(), reference.dequantize(packed, state)]
    if codebook == "fp4":  # its code 8 is a second zero, decoded to -0 or +0 depending on the path
        decoded = [tensor + 0.0 for tensor in decoded]
    pairs = [(ours.packed, packed.view(-1)), (ours.scales(), reference.scales(state)), tuple(decoded)]
    if double_quant:
        stored = ours.stored_scales
        pairs += [
            (stored.codes, state.absmax),
            (stored.absmax, state.state2.absmax),
            (stored.offset, state.offset),
        ]
    return pairs


def compare_quantization() -> Iterator[Row]:
    weight = stored_weights(1_000_000)
    for codebook in ("nf4", "fp4"):
        for dtype in DTYPES:
            for block_size in BLOCK_SIZES:
                what = f"{codebook}, 1e6 weights, {_name(dtype)}, blocks of {block_size}"
                yield row(what, *_pairs(weight.to(dtype), block_size, codebook, False))
    for dtype in DTYPES:
        for block_size in (64, 256):
            what = f"nf4 + double quant, 1e6 weights, {_name(dtype)}, blocks of {block_size}"
            yield row(what, *_pairs(weight.to(dtype), block_size, "nf4", True))


def compare_sizes() -> Iterator[Row]:
    for double_quant in (False, True):
        for dtype in DTYPES:
            pairs = []
            for n in ODD_SIZES:
                pairs += _pairs(stored_weights(n, start=n).to(dtype), 64, "nf4", double_quant)
            how = "nf4 + double quant" if double_quant else "nf4"
            yield row(f"{how}, {len(ODD_SIZES)} sizes from 1 to 1,000,001, {_name(dtype)}", *pairs)


def compare_extremes() -> Iterator[Row]:
    normal = stored_weights(1_000)
    for dtype in DTYPES:
        largest = torch.finfo(dtype).max
        cases = {
            "all zero": torch.zeros(1_000),
            "+0 and -0": torch.zeros(1_000) * normal.sign(),
            "a zero block among others": torch.cat([torch.zeros(128), normal]),
            "subnormal": normal * 1e-39,
            "+-max": normal.sign() * largest,
            "max among small": torch.cat([normal, torch.tensor([largest, -largest])]),
        }
        for what, case in cases.items():
            yield row(f"nf4, {what}, {_name(dtype)}", *_pairs(case.to(dtype), 64, "nf4", False))
    ties = (codebooks.nf4()[:-1] + codebooks.nf4()[1:]) / 2  # exactly halfway between two levels
    yield row(
        "nf4, ties between levels, float32", *_pairs(torch.cat([ties, torch.ones(1)]), 64, "nf4", False)
    )


def compare_linear4bit() -> Iterator[Row]:
    for stored in DTYPES:
        for compute in (torch.float32, torch.bfloat16):
            for double_quant in (False, True):
                linear = nn.Linear(576, 192, dtype=stored)
                linear.weight.data = stored_weights(192 * 576).view(192, 576).to(stored)
                linear.bias.data = stored_weights(192, start=5).to(stored)
                ours = qlora.NF4Linear.of(linear, compute, double_quant=double_quant)
                theirs = reference.linear4bit(linear, compute, double_quant).requires_grad_(False)
                pairs = []
                for mode in (True, False, True):  # train, eval, train again
                    outputs, gradients = zip(
                        *(_run(layer.train(mode)) for layer in (ours, theirs)), strict=True
                    )
                    pairs += [outputs, gradients]
                how = f"{_name(stored)} weight, {_name(compute)} compute{', double quant' * double_quant}"
                yield row(f"NF4Linear forward and input gradient, {how}", *pairs)
                stored_names = {**theirs.state_dict()}
                same = [
                    (t.to(stored_names[name].dtype), stored_names[name])
                    for name, t in ours.state_dict().items()
                ]
                yield row(f"NF4Linear checkpoint, {how}", *same)


def _run(layer: nn.Module) -> tuple[Tensor, Tensor]:
    x = stored_weights(2 * 33 * layer.in_features, start=11).view(2, 33, -1).requires_grad_()
    y = layer(x)
    y.backward(stored_weights(y.numel(), start=17).view_as(y))
    return y, x.grad


def compare_lora() -> Iterator[Row]:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    for dtype in (torch.float32, torch.bfloat16):
        for rank_stabilized in (False, True):
            model = LlamaForCausalLM(LlamaConfig(vocab_size=320, tie_word_embeddings=True, **SMALL))
            for i, parameter in enumerate(model.parameters()):
                parameter.data = stored_weights(parameter.numel(), start=i).view_as(parameter) / 20
            model, mine = model.to(dtype), copy.deepcopy(model).to(dtype)
            options = {"r": 6, "lora_alpha": 16, "use_rslora": rank_stabilized, "target_modules": TARGETS}
            torch.manual_seed(1)
            theirs = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
            torch.manual_seed(1)
            lora.add_lora(mine, r=6, alpha=16, rank_stabilized=rank_stabilized)
            how = f"{_name(dtype)} base{', rank-stabilized' * rank_stabilized}"
            yield from _compare_adapted(mine, theirs, how, vocabulary=320)

            with tempfile.TemporaryDirectory() as folder:
                adapters.save_adapter(mine, folder)
                loaded = PeftModel.from_pretrained(copy.deepcopy(theirs).unload(), folder)
                yield row(
                    f"adapter saved here, loaded by PEFT: logits, {how}",
                    (_logits(mine, 320), _logits(loaded, 320)),
                )
            with tempfile.TemporaryDirectory() as folder:
                theirs.save_pretrained(folder)
                for layer in lora.lora_layers(mine).values():
                    nn.init.zeros_(layer.lora_b)
                adapters.load_adapter(mine, folder)
                yield row(
                    f"adapter saved by PEFT, loaded here: logits, {how}",
                    (_logits(mine, 320), _logits(theirs, 320)),
                )

            theirs.merge_adapter()
            for layer in lora.lora_layers(mine).values():
                layer.merge()
            yield row(f"LoRALinear merged weight, {how}", *_bases(mine, theirs))
            theirs.unmerge_adapter()
            for layer in lora.lora_layers(mine).values():
                layer.unmerge()
            yield row(f"LoRALinear unmerged weight, {how}", *_bases(mine, theirs))


def compare_real_model() -> Iterator[Row]:
    from peft import LoraConfig, get_peft_model

    folder = models.fetch()
    mine, _ = models.load(dtype=torch.bfloat16)
    theirs = reference.load_4bit(folder)
    torch.manual_seed(1)
    theirs = get_peft_model(theirs, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    torch.manual_seed(1)
    qlora.add_qlora(mine.train())
    yield row("SmolLM2-135M: packed codes of 210 layers", *_bases(mine, theirs))
    yield from _compare_adapted(
        mine, theirs, "SmolLM2-135M, QLoRA against transformers + PEFT + bitsandbytes", 49_152
    )
    theirs.merge_adapter()
    for layer in lora.lora_layers(mine).values():
        layer.merge()
    yield row("SmolLM2-135M: packed codes after merging into 4 bits", *_bases(mine, theirs))


def _compare_adapted(mine: nn.Module, theirs: nn.Module, how: str, vocabulary: int) -> Iterator[Row]:
    adapters = [
        (ours, getattr(module, name).default.weight)
        for layer, module in _layers(mine, theirs)
        for ours, name in ((layer.lora_a, "lora_A"), (layer.lora_b, "lora_B"))
    ]
    yield row(f"initial A and B, {how}", *adapters)
    for i, (ours, weight) in enumerate(adapters):  # B = 0 would hide every mistake behind it
        if not ours.any():
            ours.data = stored_weights(ours.numel(), start=i).view_as(ours) / 100
            weight.data = ours.data.clone()
    losses = [_loss(model, vocabulary) for model in (mine, theirs)]
    yield row(
        f"logits and loss, {how}", (losses[0].logits, losses[1].logits), (losses[0].loss, losses[1].loss)
    )
    for result in losses:
        result.loss.backward()
    yield row(f"gradients of A and B, {how}", *[(ours.grad, weight.grad) for ours, weight in adapters])


def _layers(mine: nn.Module, theirs: nn.Module) -> list[tuple[lora.LoRALinear, nn.Module]]:
    inner = theirs.base_model.model
    return [(layer, inner.get_submodule(name)) for name, layer in lora.lora_layers(mine).items()]


def _bases(mine: nn.Module, theirs: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [
        (a.base.weight, b.base_layer.weight.data.view_as(a.base.weight)) for a, b in _layers(mine, theirs)
    ]


def _tokens(vocabulary: int) -> Tensor:
    return (torch.arange(2 * 40) * 7_919 % vocabulary).view(2, 40)


def _loss(model: nn.Module, vocabulary: int):
    return model(input_ids=_tokens(vocabulary), labels=_tokens(vocabulary))


@torch.no_grad()
def _logits(model: nn.Module, vocabulary: int) -> Tensor:
    return model.eval()(input_ids=_tokens(vocabulary)).logits


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


COMPARISONS: tuple[Callable[[], Iterator[Row]], ...] = (
    compare_codebooks,
    compare_quantization,
    compare_sizes,
    compare_extremes,
    compare_linear4bit,
    compare_lora,
    compare_real_model,
)


def main() -> int:
    """Print every row. Returns 0 if no bit differs, else 1."""
    warnings.filterwarnings(
        "ignore", module="peft|transformers"
    )  # they would stand in the midst of the table
    print(f"{'what is compared':<100} {'values':>12} {'mismatches':>11}")
    compared = mismatches = 0
    for comparison in COMPARISONS:
        for result in comparison():
            print(f"{result.what:<100} {result.compared:>12,} {result.mismatches:>11,}", flush=True)
            compared += result.compared
            mismatches += result.mismatches
    print(f"{'total':<100} {compared:>12,} {mismatches:>11,}")
    return 1 if mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
