"""From the GGUF file to the folder that transformers loads: bf16 safetensors, tokenizer, chat template.

The file holds the linear layers as Q4_1 (blocks of 32 weights: 4-bit codes, a scale, a minimum), the
embedding as Q8_0, the norms as fp32. They are dequantized once, here. transformers reads the file; what it
does not take from it (how digits are split, the length limit) or takes with a rounding error is set as the
published model has it.
"""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
from transformers.utils import logging

from qlora_edu.models import tokens
from qlora_edu.models.source import ModelError, Source

VERSION = 1  # of the result: raise it when folders that an older version made must not be used any more


def convert(gguf: Path, folder: Path, source: Source, progress: bool = True) -> None:
    """Write the model in a GGUF file to a folder for `from_pretrained`; takes about half a minute.

    Raises:
        ModelError: the result is not the model that `source` pins. Then nothing is written.
    """
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
    for file in folder.iterdir():  # safetensors makes its file readable by its owner alone
        file.chmod((folder / "config.json").stat().st_mode)


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
    facts = {  # what: (found, expected)
        "parameters": (sum(p.numel() for p in model.parameters()), source.parameters),
        "tied embeddings": (model.lm_head.weight is model.model.embed_tokens.weight, True),
        "weights": (weights_digest(model), source.weights_sha256),
        "special tokens": (tokenizer.convert_ids_to_tokens(specials), tokens.SPECIAL_TOKENS),
        "their roles": ({role: getattr(tokenizer, role) for role in tokens.ROLES}, tokens.ROLES),
        "chat template": (tokenizer.chat_template, tokens.CHAT_TEMPLATE),
    }
    wrong = [f"{what}: {found!r} instead of {due!r}" for what, (found, due) in facts.items() if found != due]
    if wrong:
        raise ModelError(
            f"Converting {source.requirement} gave another model than the pinned one ({'; '.join(wrong)}). "
            f"The installed transformers or gguf reads it differently: install what constraints.txt pins."
        )


def weights_digest(model) -> str:
    """SHA-256 over every parameter's name, dtype, shape and bytes, sorted by name; tied ones count once."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy())
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
