"""A checkpoint in 16 bits made one in 4 bits, shard by shard, on a machine that could not load it.

    quantize_checkpoint("llama-7b", "llama-7b-nf4")      may be killed; the same call goes on where it was
    verify("llama-7b-nf4")                               every byte is still the one that was written

In memory are one tensor of the source and the 4-bit shard that it goes into, which is there twice while it is
written: SmolLM2-135M in shards of 60 MB, whose largest comes out with 57 MB, took 118 MB beyond the process. A
finished shard is listed in `quantizing.json` with its SHA-256 and that of its source: what is listed there and
still has that hash is not made again. The result is what `checkpoints.save_quantized` would write, in several
files.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from qlora_edu.adapters import write_whole
from qlora_edu.blockwise import quantize
from qlora_edu.checkpoints import quantization_config
from qlora_edu.memory.shapes import shape_of
from qlora_edu.models.source import sha256
from qlora_edu.storage import to_stored

LIST = "quantizing.json"
INDEX = "model.safetensors.index.json"


def quantize_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    codebook: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    progress: bool = True,
) -> Path:
    """Quantize every linear layer of a transformers checkpoint but the output layer.

    Args:
        source: a folder with config.json and *.safetensors.
        target: another folder, which is made if it is missing. What an earlier, interrupted call left there is used.
        codebook, block_size, double_quant: as in `blockwise.quantize`; "int4" has no place in the layout on disk.
        compute_dtype: what the config asks for.

    Returns:
        target, which loads with `checkpoints.load_quantized` and with transformers.

    Raises:
        FileNotFoundError: if the source holds no such model.
        ValueError: if a layer's weight is not in the source; if the target is the source, or holds something that
            this call would not have begun: another model, or one quantized with other options.
    """
    source, target = Path(source), Path(target)
    files = _shards(source)
    if target.exists() and target.samefile(source):
        raise ValueError(f"target: expected another folder than the source; got {str(target)!r} for both")
    options = {
        "codebook": codebook,
        "block_size": block_size,
        "double_quant": double_quant,
        "compute_dtype": str(compute_dtype),
        "source": {file.name: file.stat().st_size for file in files},
        "config": sha256(source / "config.json"),
    }
    target.mkdir(parents=True, exist_ok=True)
    done = _begun(target, options)
    linears = {f"{name}.weight" for name, _, _ in shape_of(source).linears}
    for file in tqdm(files, desc="shards", disable=not progress):
        listed = done["shards"].get(file.name)
        if listed and listed["source_sha256"] == sha256(file) and _is(target / file.name, listed["sha256"]):
            continue
        tensors = _quantized(file, linears, codebook, block_size, double_quant)
        write_whole(target / file.name, save(tensors, metadata={"format": "pt"}))
        done["shards"][file.name] = {
            "sha256": sha256(target / file.name),
            "source_sha256": sha256(file),
            "tensors": {name: tensor.nbytes for name, tensor in tensors.items()},
        }
        del tensors
        _write(target / LIST, done)
    there = {name for listed in done["shards"].values() for name in listed["tensors"]}
    if missing := sorted(linears - there):
        raise ValueError(f"source: {str(source)!r} lacks {missing[0]}, which its config.json speaks of")
    _finish(source, target, done, compute_dtype)
    return target


def verify(folder: str | os.PathLike) -> None:
    """Raise a ValueError that names the first shard which is missing, unfinished, or not as it was written."""
    folder = Path(folder)
    try:
        done = json.loads((folder / LIST).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"folder: {str(folder)!r} has no {LIST}, so it was not made here") from None
    for name in done["options"]["source"]:
        listed = done["shards"].get(name)
        if listed is None:
            raise ValueError(f"folder: {name} is not finished; call quantize_checkpoint again")
        if not _is(folder / name, listed["sha256"]):
            raise ValueError(
                f"folder: {name} is missing or not as it was written; call quantize_checkpoint again"
            )


def _shards(source: Path) -> list[Path]:
    files = sorted(source.glob("*.safetensors"))
    if not files or not (source / "config.json").is_file():
        raise FileNotFoundError(
            f"source: expected a folder with config.json and *.safetensors; {str(source)!r} has not both"
        )
    return files


def _begun(target: Path, options: dict) -> dict:
    """What an earlier call has finished."""
    if not (target / LIST).exists():
        if strangers := sorted(file.name for file in target.glob("*.safetensors")):
            raise ValueError(
                f"target: {str(target)!r} holds {strangers[0]}, which this function did not write"
            )
        done = {"options": options, "shards": {}}
        _write(target / LIST, done)  # before the first shard, which would else be a stranger after a kill
        return done
    done = json.loads((target / LIST).read_text())
    if differ := sorted(name for name in options if done["options"].get(name) != options[name]):
        raise ValueError(
            f"target: {str(target)!r} was begun with another {', '.join(differ)}; take an empty folder, or delete it"
        )
    return done


def _quantized(file: Path, linears: set[str], codebook: str, block_size: int, double_quant: bool) -> dict:
    tensors = {}
    with safe_open(file, framework="pt") as opened:
        for name in sorted(opened.keys()):
            tensor = opened.get_tensor(name)
            if name in linears:
                stored = to_stored(quantize(tensor, block_size, codebook, double_quant))
                tensors |= {name + ending: part for ending, part in stored.items()}
            else:
                tensors[name] = tensor.clone()  # out of the file's mapped memory
    return tensors


def _finish(source: Path, target: Path, done: dict, compute_dtype: torch.dtype) -> None:
    """The index where there are several shards, the files that come with a model, and last the config."""
    sizes = {file: listed["tensors"] for file, listed in sorted(done["shards"].items())}
    if len(sizes) > 1:
        total = sum(sum(tensors.values()) for tensors in sizes.values())
        places = {name: file for file, tensors in sizes.items() for name in tensors}
        _write(
            target / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        )
    for file in source.iterdir():
        if file.suffix in (".json", ".model", ".txt") and file.name not in ("config.json", INDEX):
            shutil.copyfile(file, target / file.name)
    options, config = done["options"], json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(
        options["codebook"], options["double_quant"], compute_dtype, ["lm_head"]
    )
    _write(target / "config.json", config)


def _write(path: Path, content: dict) -> None:
    write_whole(path, (json.dumps(content, indent=2, default=str) + "\n").encode())


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest
