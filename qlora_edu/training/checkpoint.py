"""A run on disk: everything that the next step depends on, so that a killed run goes on as if nothing had happened.

    run/step-000020/run.safetensors    A, B and AdamW's two states of each, and torch's random state
    run/step-000020/run.json           config, hashes of data and base model, losses so far
    run/step-000020/adapter_*          the adapter as of that step, in PEFT's format

A checkpoint is written under another name and renamed when it is complete: a folder named step-... is whole.
"""

import json
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

KEEP = 2  # the newest checkpoints; older ones are deleted


class CheckpointError(RuntimeError):
    """A run cannot be resumed from this folder."""


@dataclass
class Progress:
    """How far a run has come: steps done, and the loss and seconds of each."""

    step: int
    losses: list[float]
    seconds: list[float]


def base_hash(model: nn.Module) -> str:
    """SHA-256 over every tensor of the model that is not trained."""
    digest = sha256()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, tensor in sorted(model.state_dict().items()):
        if name not in trained:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save(
    folder: Path, model: nn.Module, optimizer, progress: Progress, identity: dict, write_adapter
) -> Path:
    """Write a checkpoint of the step that was just finished, then delete old ones. Returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{progress.step:06d}"
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".unfinished-"))
    try:
        save_file(_tensors(model, optimizer), temporary / "run.safetensors")
        facts = {
            "identity": identity,
            "step": progress.step,
            "losses": progress.losses,
            "seconds": progress.seconds,
            "threads": torch.get_num_threads(),
        }
        (temporary / "run.json").write_text(json.dumps(facts))
        write_adapter(temporary)
        if target.exists():
            shutil.rmtree(target)
        os.chmod(temporary, 0o755)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in complete(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def restore(folder: Path, model: nn.Module, optimizer, identity: dict) -> Progress:
    """Put model, optimizer and random state back to the newest checkpoint. Without one, nothing changes.

    Raises:
        CheckpointError: if the checkpoint belongs to another model, data or config, or cannot be read.
    """
    for leftover in folder.glob(".unfinished-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    found = complete(folder)
    if not found:
        return Progress(0, [], [])
    try:
        facts = json.loads((found[-1] / "run.json").read_text())
        tensors = load_file(found[-1] / "run.safetensors")
    except Exception as error:
        raise CheckpointError(
            f"{found[-1].name} cannot be read ({error}). Delete it to go on from the one before."
        ) from error
    changed = [key for key in identity if facts["identity"].get(key) != identity[key]]
    if changed:
        was, now = facts["identity"].get(changed[0]), identity[changed[0]]
        if isinstance(was, dict) and isinstance(now, dict):  # name only what differs
            was = {key: value for key, value in was.items() if now.get(key) != value}
            now = {key: now.get(key) for key in was}
        raise CheckpointError(
            f"this folder holds a run with another {', '.join(changed)} ({changed[0]} was {was!r}, is {now!r}). "
            "Resume it with the old settings, or choose another folder."
        )
    named = _trained(model)
    if {name for name in tensors if not name.startswith(("exp_avg", "random"))} != set(named):
        raise CheckpointError(f"{found[-1].name} holds other parameters than the model trains")
    then, now = facts.get("threads"), torch.get_num_threads()
    if then not in (None, now):
        warnings.warn(
            f"this run was computed with {then} threads and goes on with {now}: last digits will differ. "
            f"torch.set_num_threads({then}) before you train keeps every bit.",
            stacklevel=3,
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[name])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(facts["step"])),
                "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
            }
    torch.set_rng_state(tensors["random"])
    return Progress(facts["step"], facts["losses"], facts["seconds"])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _tensors(model: nn.Module, optimizer) -> dict[str, Tensor]:
    tensors = {"random": torch.get_rng_state()}
    for name, parameter in _trained(model).items():
        state = optimizer.state[parameter]
        tensors[name] = parameter.detach().contiguous()
        tensors[f"exp_avg.{name}"] = state["exp_avg"].contiguous()
        tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"].contiguous()
    return tensors
