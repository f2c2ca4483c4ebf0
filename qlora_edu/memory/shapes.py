"""The shape of a model: how many numbers it has, and where.

Counted on the meta device, where a tensor has a shape and no memory, so that any laptop counts 65 billion parameters.
"""

import copy
import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from qlora_edu.lora import check_targets

# d, f, L, h, kv, V, tied: width, width of the feed-forward layer, layers, heads, heads of keys and values, vocabulary,
# and whether the output layer is the embedding again. LLaMA: arXiv 2302.13971, table 2, and its released configs;
# f is 2/3 of 4d, rounded up to a multiple of 256.
_PUBLISHED = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 49_152, True),
    "llama-7b": (4096, 11_008, 32, 32, 32, 32_000, False),
    "llama-13b": (5120, 13_824, 40, 40, 40, 32_000, False),
    "llama-33b": (6656, 17_920, 60, 52, 52, 32_000, False),
    "llama-65b": (8192, 22_016, 80, 64, 64, 32_000, False),
}
_KEYS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size "
    "tie_word_embeddings"
).split()
#: Shapes that need no file, as settings of a LlamaConfig.
NAMED = {name: dict(zip(_KEYS, values, strict=True)) for name, values in _PUBLISHED.items()}

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Shape:
    """What the bytes of a model depend on.

    Attributes:
        name: as asked for.
        model_type: transformers' name of the architecture, such as "llama".
        layers, d, f: number of blocks, width, width of the feed-forward layer.
        heads, kv_heads, head_dim: of attention; kv_heads < heads where heads share keys and values.
        vocabulary: rows of the embedding. tied: whether the output layer is the embedding again.
        linears: (name, out, in) of each linear layer but the output layer, in the model's order: what QLoRA quantizes.
        other: sizes of the other parameters: embedding, output layer if it is not the embedding again, norms, biases.
        config: the whole config, as JSON.
    """

    name: str
    model_type: str
    layers: int
    d: int
    f: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    linears: tuple[tuple[str, int, int], ...]
    other: tuple[int, ...]
    config: str

    @property
    def in_linears(self) -> int:
        """Parameters of the linear layers, the output layer aside."""
        return sum(out * inn for _, out, inn in self.linears)

    @property
    def parameters(self) -> int:
        """All parameters; a matrix that is used twice counts once."""
        return self.in_linears + sum(self.other)

    @property
    def sizes(self) -> list[int]:
        """Size of each parameter tensor."""
        return [out * inn for _, out, inn in self.linears] + list(self.other)

    def targets(self, names) -> list[tuple[str, int, int]]:
        """The linear layers whose name ends in one of `names`.

        Raises:
            TypeError: if `names` is no list of names. ValueError: if one of them fits no layer.
        """
        check_targets(names)
        have = {name.split(".")[-1] for name, _, _ in self.linears}
        unknown = sorted(set(names) - have)
        if unknown:
            raise ValueError(
                f"targets: expected names among {', '.join(sorted(have))}; got {', '.join(unknown)}"
            )
        return [linear for linear in self.linears if linear[0].split(".")[-1] in set(names)]


def shape_of(model, download: bool = False) -> Shape:
    """The shape of a model, however it is given.

    Args:
        model: a name of NAMED; a transformers config; its dict, with "model_type"; a folder with a config.json; a
            transformers model, loaded or on the meta device; or a hub id "owner/name".
        download: whether a hub id may be asked for over the network (only its config.json is).

    Raises:
        TypeError, ValueError: if it is none of these, or its config cannot be read.
    """
    if isinstance(model, Shape):
        return model
    if isinstance(model, str | os.PathLike):
        name = os.fspath(model)
    else:
        name = getattr(model, "name_or_path", "") or type(model).__name__
    settings = json.dumps(config_of(model, download).to_dict(), sort_keys=True, default=str)
    return _count(Path(name).name, settings)


def config_of(model, download: bool = False):
    """A transformers config, a copy of its own. Arguments and errors as in `shape_of`."""
    from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

    if isinstance(model, nn.Module):
        model = getattr(model, "config", None)
        if not isinstance(model, PreTrainedConfig):
            raise TypeError(
                "model: expected a transformers model, which has a config; got a module without one."
            )
    if isinstance(model, PreTrainedConfig):
        return copy.deepcopy(model)
    if isinstance(model, Mapping):
        return _from_settings(model)
    if not isinstance(model, str | os.PathLike):
        raise TypeError(
            f"model: expected a name, a folder, a config, a dict or a transformers model; got {type(model).__name__}"
        )
    if not str(model):
        raise ValueError(f"model: expected one of {', '.join(NAMED)}, a folder or 'owner/name'; got ''")
    if model in NAMED:
        return LlamaConfig(**NAMED[model])
    folder = Path(os.path.expanduser(model))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"model: expected a folder with a config.json; {folder.name!r} has none.")
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not _HUB_ID.fullmatch(str(model)):
        raise ValueError(
            f"model: expected one of {', '.join(NAMED)}, a folder or 'owner/name'; got {str(model)!r}"
        )
    if not download:
        raise ValueError(f"model: {model!r} is a hub id. Pass download=True to fetch its config.json.")
    return AutoConfig.from_pretrained(model, trust_remote_code=False)


def _from_settings(settings: Mapping):
    """A transformers config from its dict. A mistyped setting, which transformers would let pass, is refused."""
    from transformers import CONFIG_MAPPING

    kind = settings.get("model_type")
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), CONFIG_MAPPING.keys(), n=3) or ["llama"]
        raise ValueError(f'model: expected a dict with "model_type", such as {", ".join(near)}; got {kind!r}')
    config = CONFIG_MAPPING[kind](**{name: value for name, value in settings.items() if name != "model_type"})
    known = {*CONFIG_MAPPING[kind]().to_dict(), *(config.attribute_map or {})}
    for name in set(settings) - known:
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            raise ValueError(f"model: {kind!r} has no setting {name!r}. Was {near[0]!r} meant?")
    return config


@lru_cache(maxsize=64)
def _count(name: str, settings: str) -> Shape:
    model = on_meta(settings)
    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    quantized = {id(module.weight) for module in linears.values()}
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return Shape(
        name,
        config.model_type,
        config.num_hidden_layers,
        config.hidden_size,
        getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        config.vocab_size,
        head is not None and head.weight is model.get_input_embeddings().weight,
        tuple((n, *m.weight.shape) for n, m in linears.items()),
        tuple(p.numel() for p in model.parameters() if id(p) not in quantized),
        settings,
    )


def on_meta(settings: str) -> nn.Module:
    """A model on the meta device from the JSON of its config, with eager attention and bfloat16 weights.

    The config is made afresh: `from_config(attn_implementation=...)` writes into the one that it is given.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**json.loads(settings))
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", dtype=torch.bfloat16, trust_remote_code=False
            )
    except (ValueError, TypeError) as error:
        raise ValueError(f"model: {config.model_type!r} is no causal language model: {error}") from error
