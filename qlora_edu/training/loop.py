"""The loop: batches in, an adapter out.

It trains whatever parameters require a gradient, so the same loop serves the course's own layers and a PEFT model.
"""

import json
import math
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from qlora_edu.adapters import save_adapter, write_whole
from qlora_edu.lora import lora_layers
from qlora_edu.training import checkpoint
from qlora_edu.training.batches import Batch, Encoded, data_hash, steps
from qlora_edu.training.loss import answer_loss
from qlora_edu.training.schedule import cosine_with_warmup


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run, besides the model, the data and the loss.

    Attributes:
        steps: optimizer steps.
        batch_size: examples a step.
        micro_batch_size: examples that go through the model together; gradients are accumulated over the rest.
            None means all of them.
        learning_rate: at its peak. warmup: share of the steps in which it rises; it falls as a cosine.
        weight_decay: AdamW's, by which parameters shrink a little in each step.
        max_grad_norm: gradients are scaled down to this length, all parameters taken together.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        checkpoint_every: steps between two checkpoints, if a folder is given.
        seed: of the order of the data, and of dropout.
    """

    steps: int = 60
    batch_size: int = 8
    micro_batch_size: int | None = None
    learning_rate: float = 3e-3
    warmup: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    checkpoint_every: int = 20
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "checkpoint_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1; got {value!r}")
        for name in ("learning_rate", "warmup", "weight_decay", "max_grad_norm"):
            if not isinstance(getattr(self, name), (int, float)):
                raise ValueError(f"{name}: expected a number; got {getattr(self, name)!r}")
        if self.micro_batch_size is not None and not 1 <= self.micro_batch_size <= self.batch_size:
            raise ValueError(
                f"micro_batch_size: expected 1 to {self.batch_size}, or None; got {self.micro_batch_size!r}"
            )
        if not self.learning_rate > 0 or not self.max_grad_norm > 0 or not 0 <= self.warmup <= 1:
            raise ValueError(
                f"expected learning_rate > 0, max_grad_norm > 0 and warmup in [0, 1]; got {self}"
            )


@dataclass
class Run:
    """What a run did: for each step the loss (nats a scored token) and the seconds; all tokens, prompts included."""

    losses: list[float]
    seconds: list[float]
    tokens: int
    config: TrainConfig
    resumed_from: int = 0
    card: dict = field(default_factory=dict)


def train(
    model: nn.Module,
    rows: Sequence[Encoded],
    config: TrainConfig | None = None,
    folder: str | os.PathLike | None = None,
    loss: Callable[[nn.Module, Batch, int], Tensor] = answer_loss,
    pad_id: int = 0,
    progress: bool | None = None,
    after_step: Callable[[int, float], None] | None = None,
    notes: dict | None = None,
) -> Run:
    """Train the parameters of a model that require a gradient.

    Args:
        model: a transformers causal language model with an adapter.
        rows: the training data, from `encode_all`.
        folder: where to keep checkpoints, the adapter and the run card. If it holds checkpoints of the same run,
            training goes on from the newest one.
        loss: called as loss(model, batch, scored tokens of the whole step).
        pad_id: token that fills up short rows; it is masked, so any will do.
        progress: show a bar; None means yes, unless QLORA_STATIC is set.
        after_step: called with the number of steps done and the loss.
        notes: further facts for the run card.

    Returns:
        A Run. Interrupted (Ctrl-C, or "stop" in Jupyter), it finishes the step, writes a checkpoint if there is a
        folder, and raises KeyboardInterrupt; a second interrupt does not wait. Called again without a folder, it
        trains the same adapter further, with a new optimizer. A resumed run computes the bits of an uninterrupted one
        on the same machine with the same number of threads; where that number has changed, it warns.

    Raises:
        TypeError: if `config` is no TrainConfig, or a row is not encoded.
        ValueError: if nothing is trainable. CheckpointError: if the folder holds another run.
        FloatingPointError: if the loss is not finite; the last checkpoint is still good.
    """
    config = TrainConfig() if config is None else config
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config: expected a TrainConfig, such as TrainConfig(steps=60); got {config!r:.60}")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("model: no parameter requires a gradient; add an adapter first")
    folder = None if folder is None else Path(folder)
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, foreach=False
    )
    plan = steps(rows, config.batch_size, config.steps, config.seed)
    identity = {
        "config": asdict(config),
        "adapter": _adapter_settings(model),
        "loss": getattr(loss, "__name__", str(loss)),
        "data": data_hash(rows),
        "base": checkpoint.base_hash(model),
    }
    torch.manual_seed(config.seed)
    done = checkpoint.Progress(0, [], [])
    if folder is not None:
        done = checkpoint.restore(folder, model, optimizer, identity)
    started = done.step

    model.train()
    _set_checkpointing(model, config.gradient_checkpointing)
    tokens = sum(len(row) for step in plan for row in step)
    hidden = bool(os.environ.get("QLORA_STATIC")) if progress is None else not progress
    bar = tqdm(total=config.steps, initial=done.step, desc="training", unit="step", disable=hidden)
    with bar, _interrupts_wait() as interrupted:
        while done.step < config.steps:
            begin = time.perf_counter()
            value = _step(model, plan[done.step], optimizer, parameters, done.step, config, loss, pad_id)
            done.seconds.append(time.perf_counter() - begin)
            done.losses.append(value)
            done.step += 1
            speed = sum(map(len, plan[done.step - 1])) / done.seconds[-1]
            bar.set_postfix_str(f"loss {value:.3f}, {speed:.0f} tokens/s", refresh=False)
            bar.update()
            if after_step is not None:
                after_step(done.step, value)
            stopping = bool(interrupted)
            if folder is not None and (
                stopping or done.step % config.checkpoint_every == 0 or done.step == config.steps
            ):
                checkpoint.save(
                    folder, model, optimizer, done, identity, lambda at: _write_adapter(model, at)
                )
            if stopping:
                raise KeyboardInterrupt(
                    f"stopped after step {done.step}" + (f", kept in {folder.name}" if folder else "")
                )

    run = Run(done.losses, done.seconds, tokens, config, started)
    run.card = _card(run, identity, model, notes or {})
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        _write_adapter(model, folder)
        write_whole(folder / "run_card.json", (json.dumps(run.card, indent=2) + "\n").encode())
    return run


def _step(model, rows, optimizer, parameters, step, config, loss, pad_id) -> float:
    """One optimizer step over `rows`, in micro-batches. Returns the loss before the step."""
    size = config.micro_batch_size or config.batch_size
    batches = [Batch.of(rows[i : i + size], pad_id) for i in range(0, len(rows), size)]
    batches = [batch.to(parameters[0].device) for batch in batches]
    scored = sum(
        batch.scored for batch in batches
    )  # the mean is over the whole step, not over each micro-batch
    total = 0.0
    for batch in batches:
        part = loss(model, batch, scored)
        part.backward()
        total += part.item()
    if not math.isfinite(total):
        optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(f"loss is {total} in step {step + 1}: try a lower learning rate")
    nn.utils.clip_grad_norm_(parameters, config.max_grad_norm, foreach=False)
    warmup = round(config.warmup * config.steps)
    optimizer.param_groups[0]["lr"] = config.learning_rate * cosine_with_warmup(step, config.steps, warmup)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def _adapter_settings(model: nn.Module) -> list[str]:
    """What decides an adapter besides its numbers, once for each kind of layer."""
    if hasattr(model, "peft_config"):
        return sorted(
            str((c.r, c.lora_alpha, c.lora_dropout, c.use_rslora)) for c in model.peft_config.values()
        )
    kinds = {
        (layer.r, layer.alpha, layer.dropout.p, layer.rank_stabilized, str(layer.compute_dtype))
        for layer in lora_layers(model).values()
    }
    return sorted(map(str, kinds))


def _set_checkpointing(model: nn.Module, wanted: bool) -> None:
    if wanted:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()


def _write_adapter(model: nn.Module, folder: Path) -> None:
    if lora_layers(model):
        save_adapter(model, folder)
    elif hasattr(model, "peft_config"):
        model.save_pretrained(folder)


@contextmanager
def _interrupts_wait() -> Iterator[list]:
    """Until the end of the block, the first interrupt is only noted in the list; a second one acts at once."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number, frame):
        noted.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _card(run: Run, identity: dict, model: nn.Module, notes: dict) -> dict:
    """What someone needs to repeat or judge the run."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")
    return {
        **identity,
        "model": getattr(model.config, "name_or_path", "") and Path(model.config.name_or_path).name,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "first_loss": run.losses[0],
        "last_loss": run.losses[-1],
        "tokens": run.tokens,
        "seconds": round(sum(run.seconds), 1),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        **notes,
    }
