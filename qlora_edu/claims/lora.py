"""Chapter 02: what is said about LoRA, computed again."""

from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qlora_edu import counts, spectra
from qlora_edu.claims.ledger import recomputes
from qlora_edu.lora import LoRALinear
from qlora_edu.memory.shapes import shape_of
from qlora_edu.parity import stored_weights


@recomputes("lora-10000x")
def ten_thousand_times_fewer() -> dict[str, float]:
    """All parameters of GPT-3 over those of an adapter on q and v; the same for LLaMA-7B."""
    llama = shape_of("llama-7b").parameters / counts.adapter("llama-7b", 8, counts.QUERY_VALUE)
    return {
        "ratio": counts.GPT3 / counts.gpt3_adapter(4),
        "trained": counts.gpt3_adapter(4) / 1e6,
        "r8": counts.GPT3 / counts.gpt3_adapter(8),
        "llama": llama,
    }


@recomputes("lora-3000x-memory")
def memory_of_gpt3() -> dict[str, float]:
    """The paper's two sizes; and the most that a 16-bit base lets one save: 2 + 2 + 8 bytes against 2."""
    return {"ratio": 1200 / 350, "base": counts.GPT3 * 2 / 1e9, "most": (2 + 2 + 8) / 2}


@recomputes("lora-under-1mb")
def adapter_files() -> dict[str, float]:
    """Numbers of an adapter times two bytes; for LLaMA-7B the smallest one on the paper's targets."""
    gpt3, smallest = 2 * counts.gpt3_adapter(4), 2 * counts.adapter("llama-7b", 1, counts.QUERY_VALUE)
    return {
        "under": smallest < 1e6,
        "gpt3": gpt3 / 1e6,
        "gpt3_mib": gpt3 / 2**20,
        "smallest": smallest / 1e6,
        "guanaco": 2 * counts.adapter("llama-7b", 64) / 1e6,
    }


@recomputes("lora-few-million")
def adapters_of_7b() -> dict[str, float]:
    """The adapters of both papers on LLaMA-7B, and QLoRA's on 65B."""
    small, large = (8, counts.QUERY_VALUE), (64, counts.ALL_LINEAR)
    return {
        "always": counts.share("llama-7b", *large) < 1,
        "qv": counts.adapter("llama-7b", *small) / 1e6,
        "qv_share": counts.share("llama-7b", *small),
        "all": counts.adapter("llama-7b", *large) / 1e6,
        "all_share": counts.share("llama-7b", *large),
        "large": counts.adapter("llama-65b", *large) / 1e6,
        "large_share": counts.share("llama-65b", *large),
    }


@recomputes("lora-007")
def seven_hundredths_of_a_percent() -> dict[str, float]:
    """Shares on LLaMA-7B: q and v at rank 8, all linear layers at rank 8 and 64."""
    return {
        "qv": counts.share("llama-7b", 8, counts.QUERY_VALUE),
        "all8": counts.share("llama-7b", 8),
        "all64": counts.share("llama-7b", 64),
    }


@recomputes("lora-two-tenths")
def two_tenths_of_a_percent() -> dict[str, float]:
    """0.2% of LLaMA-7B's parameters at two bytes, in units of 2^20 bytes."""
    return {"mib": 0.002 * shape_of("llama-7b").parameters * 2 / 2**20}


@recomputes("lora-packed-count")
def packed_bytes_counted_as_parameters() -> dict[str, float]:
    """GPT-NeoX-20B on the meta device: its numbers, and its bytes once two codes share one."""
    from transformers import GPTNeoXConfig

    shape = shape_of(GPTNeoXConfig())
    trained = counts.adapter(shape, 8, ["query_key_value"])
    return {
        "share": 100 * trained / (shape.parameters + trained),
        "trained": trained,
        "packed": counts.as_packed(shape) + trained,
        "true": (shape.parameters + trained) / 1e9,
    }


@recomputes("lora-65k")
def one_square_matrix() -> dict[str, float]:
    """A and B of rank 8 beside a square matrix of 4,096 rows, counted as tensors."""
    layer = LoRALinear(nn.Linear(4096, 4096, bias=False, device="meta"), r=8)
    trained, total = layer.lora_a.numel() + layer.lora_b.numel(), layer.base.weight.numel()
    return {"trained": trained, "saved": 100 * (1 - trained / total), "above": trained < total / 100}


def _peft(adapters: tuple[str, ...] = ("default",)):
    """PEFT's LoRA, r = 4 and alpha = 16, on a layer (48, 64) of stored numbers, B not zero: (model, layer)."""
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    model[0].weight.data = stored_weights(48 * 64).view(48, 64)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["0"])
    model = get_peft_model(model, config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    layer = model.base_model.model[0]
    for i, name in enumerate(adapters):
        layer.lora_A[name].weight.data = stored_weights(4 * 64, 1000 * i + 10).view(4, 64)
        layer.lora_B[name].weight.data = stored_weights(48 * 4, 1000 * i + 500).view(48, 4)
    return model, layer


@recomputes("lora-formula")
def scaling_left_out() -> dict[str, float]:
    """PEFT's update over B A x, for alpha = 16 and r = 4."""
    _, layer = _peft()
    x = stored_weights(5 * 64, 77).view(5, 64)
    with torch.no_grad():
        update = layer(x) - layer.base_layer(x)
        plain = x @ layer.lora_A.default.weight.T @ layer.lora_B.default.weight.T
    return {"factor": ((update * plain).sum() / plain.square().sum()).item()}


@recomputes("lora-always-16-bit")
def dtype_of_peft() -> dict[str, float]:
    """Bits of A and B that PEFT puts beside a bfloat16 layer when told nothing."""
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential(nn.Linear(64, 48, dtype=torch.bfloat16))
    model = get_peft_model(base, LoraConfig(target_modules=["0"]))
    (bits,) = {torch.finfo(p.dtype).bits for p in model.parameters() if p.requires_grad}
    return {"bits": bits}


@recomputes("lora-zero-latency")
def operations_of_a_merged_layer() -> dict[str, float]:
    """Operations of one token through a layer (4,096, 4,096): base, with an adapter of rank 8, merged."""

    def operations(layer: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.ones(1, 4096, device="meta"))
        return counter.get_total_flops()

    base = nn.Linear(4096, 4096, bias=False, device="meta")
    layer = LoRALinear(base, r=8)
    plain, beside = operations(base), operations(layer)
    layer.merge()
    return {"added": 100 * (operations(layer) / plain - 1), "beside": 100 * (beside / plain - 1)}


@recomputes("lora-no-interference")
def merging_two_adapters() -> dict[str, float]:
    """PEFT's add_weighted_adapter against the sum of both updates: relative error in the Frobenius norm."""
    model, layer = _peft(adapters=("first", "second"))
    total = layer.get_delta_weight("first") + layer.get_delta_weight("second")
    errors = {}
    for kind, options in {"linear": {}, "cat": {}, "svd": {"svd_rank": 8}}.items():
        model.add_weighted_adapter(["first", "second"], [1.0, 1.0], kind, combination_type=kind, **options)
        errors[kind] = 100 * ((layer.get_delta_weight(kind) - total).norm() / total.norm()).item()
    return {
        "free": errors["linear"] < 1,
        "linear": errors["linear"],
        "cat_exact": errors["cat"] < 1e-3,
        "svd_exact": errors["svd"] < 1e-3,
    }


@cache
def _held(k: int) -> float:
    """Percent of the squared norm that rank k holds of a full update, mean over four real matrices."""
    pieces = [piece for (source, _), piece in spectra.stored().items() if source == "update"]
    return 100 * sum(piece.share(k) for piece in pieces) / len(pieces)


@recomputes("lora-rank-8-enough")
def what_a_rank_holds() -> dict[str, float]:
    """From the stored singular values of 8 steps of full fine-tuning, layer 15."""
    return {"held8": _held(8), "held16": _held(16), "held64": _held(64)}


#: QLoRA paper, table 3: RoBERTa-large on GLUE, then T5 of 80M to 11B on Super-NaturalInstructions.
FULL_16 = (88.6, 40.1, 42.1, 48.0, 54.3, 62.0)
LORA_16 = (88.8, 40.5, 42.6, 47.1, 55.4, 60.7)


@recomputes("lora-matches-full")
def lora_and_full_in_a_table() -> dict[str, float]:
    """How often LoRA is ahead, and the widest gaps both ways, in points."""
    gaps = [lora - full for lora, full in zip(LORA_16, FULL_16, strict=True)]
    return {"ahead": sum(gap > 0 for gap in gaps), "of": len(gaps), "best": max(gaps), "worst": -min(gaps)}


@recomputes("lora-attention-only")
def where_the_numbers_are() -> dict[str, float]:
    """Share of LLaMA-7B's linear layers that is not attention; the rank that makes adapters equally large."""
    shape = shape_of("llama-7b")
    attention = sum(o * i for _, o, i in shape.targets(["q_proj", "k_proj", "v_proj", "o_proj"]))
    per_rank = counts.adapter(shape, 1) / counts.adapter(shape, 1, counts.QUERY_VALUE)
    return {"forward": 100 * (1 - attention / shape.in_linears), "rank": 8 * per_rank}


@recomputes("lora-no-forgetting")
def adapters_kept_apart() -> dict[str, float]:
    """Numbers of a base weight that are changed by a step of AdamW over all that its LoRA layer trains."""
    base = nn.Linear(64, 48, bias=False)
    base.weight.data = stored_weights(48 * 64).view(48, 64)
    x, before = stored_weights(5 * 64, 9).view(5, 64), base.weight.detach().clone()
    layer = LoRALinear(base, r=4)
    layer.lora_b.data = stored_weights(48 * 4, 3).view(48, 4)
    layer(x).square().sum().backward()
    torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1).step()
    return {"changed": int((base.weight != before).sum())}


@recomputes("lora-2021")
def dates_in_the_identifiers() -> dict[str, float]:
    """An arXiv identifier begins with year and month: YYMM.number."""
    lora, qlora = "2106.09685", "2305.14314"
    return {
        "lora": 2000 + int(lora[:2]),
        "qlora": 2000 + int(qlora[:2]),
        "qlora_month": int(qlora[2:4]),
    }


@recomputes("lora-peft-defaults")
def defaults_of_peft() -> dict[str, float]:
    """What an empty LoraConfig says."""
    from peft import LoraConfig

    config = LoraConfig()
    return {"r": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
