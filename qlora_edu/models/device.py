"""Which number format to use on a device: bf16 where it has it, else fp32 on a CPU and fp16 on a GPU."""

import torch

BF16_CPU_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"})  # the last two are ARM's


def cpu_features() -> frozenset[str]:
    """The CPU's instruction sets, by torch's names: "avx2", "avx512_bf16", "amx_bf16"; on ARM "neon", "bf16".

    Empty where the installed torch cannot tell.
    """
    if not hasattr(torch.cpu, "get_capabilities"):
        return frozenset()
    return frozenset(name for name, value in torch.cpu.get_capabilities().items() if value is True)


def pick_dtype(device: str | torch.device = "cpu") -> tuple[torch.dtype, str]:
    """The dtype to load a model in on `device`, and the reason as a sentence.

    Raises:
        ValueError: there is no such device on this machine.
    """
    device = find_device(device)
    if device.type == "cuda":
        return _pick_cuda(device)
    if device.type == "mps":
        if torch.backends.mps.is_macos_or_newer(14, 0):
            return torch.bfloat16, "Metal computes in bfloat16 from macOS 14 on."
        return torch.float32, "Metal has no bfloat16 before macOS 14, so float32."
    if device.type == "cpu":
        return _pick_cpu()
    return torch.float32, f"float32 works everywhere; of {device.type!r} devices the course knows no more."


def _pick_cuda(device: torch.device) -> tuple[torch.dtype, str]:
    name = torch.cuda.get_device_name(device)
    with torch.cuda.device(device):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, f"{name} computes in bfloat16."
    return torch.float16, f"{name} has no bfloat16 (that takes compute capability 8.0), so float16."


def _pick_cpu() -> tuple[torch.dtype, str]:
    """bf16 is right on every CPU, but slower than fp32 unless the CPU and oneDNN multiply in it."""
    found = sorted(cpu_features() & BF16_CPU_FEATURES)
    if found and torch.backends.mkldnn.is_available():
        return torch.bfloat16, f"This CPU multiplies in bfloat16 ({', '.join(found)})."
    return torch.float32, "This CPU has no fast bfloat16, so float32."


def find_device(device: str | torch.device) -> torch.device:
    """The device of this name, if this machine has it.

    Raises:
        ValueError: it is no device, or not one of this machine.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(
            f"device must be one that this machine has ({', '.join(here)}), not {device!r}."
        ) from error
    return found
