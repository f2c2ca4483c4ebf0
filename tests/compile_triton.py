"""Compile the Triton kernels to GPU machine code, which needs no GPU: `python tests/compile_triton.py 80 90`.

Prints a line for each kernel, dtype and compute capability. The interpreter accepts code that the compiler refuses.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qlora_edu.kernels import triton_decode, triton_product

TENSORS = {"packed": "*u8", "w": "*u8", "scales": "*fp32", "levels": "*fp32"}
FLOATS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TILES = {"BLOCK_SIZE": 64, "PIECE": 1024, "BM": 16, "BN": 64, "BK": 64}


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for kernel in (triton_decode._decode, triton_product._forward, triton_product._backward):
            for short, name in FLOATS.items():
                types, constants = {}, {}
                for argument in kernel.arg_names:
                    types[argument] = TENSORS.get(argument, f"*{short}" if argument.islower() else "i32")
                    types[argument] = "i32" if argument == "count" else types[argument]
                    if argument in TILES or argument == "FACTORS":
                        types[argument] = "constexpr"
                        constants[argument] = TILES.get(argument) or getattr(triton.language, name)
                source = ASTSource(kernel, types, constants)
                made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
                print(capability, kernel.__name__, short, len(made.asm["cubin"]))


if __name__ == "__main__":
    main()
