"""qlora-edu: LoRA, NF4 and QLoRA built from scratch, equal bit for bit to bitsandbytes and PEFT."""

import logging

__version__ = "0.1.0"

# On CPUs with AVX512-BF16, bitsandbytes warns at import that an optional package is missing. The path that it would
# serve is the one that `qlora_edu.reference` switches off, so the advice would only mislead.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
