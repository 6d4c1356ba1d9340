"""What Triton's own compiler makes of our kernels for a GPU that isn't here: its code, registers, spills, memory."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from densemixer_core.kernel import at_once, triton_kernel

REGISTERS, THREADS, BLOCKS = 65536, 2048, 32
"""Of a multiprocessor."""
SHARED_KIB = {80: (163, 164), 90: (227, 228), 100: (227, 228)}
"""By compute capability: of a block at most, and of a multiprocessor."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel for one GPU.

    Attributes:
        capability: The GPU's, 90 for 9.0.
        ptx: Its code, for the assembler.
        cubin: The same, assembled.
        registers: Of a thread.
        spilled: Bytes of a thread's registers that go to memory and back.
        shared: Bytes of shared memory of a block.
        threads: Of a block.
    """

    capability: int
    ptx: str
    cubin: bytes
    registers: int
    spilled: int
    shared: int
    threads: int

    @property
    def blocks(self) -> int:
        """How many run on a multiprocessor at the same time."""
        of_block, of_all = (kib << 10 for kib in SHARED_KIB[self.capability])
        if self.shared > of_block:
            return 0
        a_warp = -(-self.registers * 32 // 256) * 256  # they are given out in units of 256
        return min(
            BLOCKS,
            THREADS // self.threads,
            REGISTERS // (a_warp * self.threads // 32),
            of_all // (self.shared + 1024),  # 1 KiB of each block is the system's
        )


def compile_kernel(
    kernel: Any, fixed: dict[str, Any], dtypes: dict[str, str], capability: int, **options: Any
) -> Compiled:
    """Compile one with its constants; other arguments than pointers are 32-bit integers, and divide by 16.

    Args:
        kernel: As `triton.jit` makes it.
        fixed: The constants.
        dtypes: Of what pointers point to, in Triton's names.
        capability: Of the GPU.
        options: Of the compiler, such as the number of warps of a block.
    """
    names = kernel.arg_names
    signature = {
        name: f"*{dtypes[name]}" if name in dtypes else "constexpr" if name in fixed else "i32" for name in names
    }
    odd = {
        *fixed,
        *(kernel.params[index].name for index in range(len(names)) if kernel.params[index].do_not_specialize),
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in odd}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in fixed.items()}, aligned)
    with contextlib.ExitStack() as stack:
        for knobs in (triton.knobs.cache, triton.knobs.nvidia):
            stack.enter_context(knobs.scope())
        # What is cached isn't assembled, and it is the assembler that says what is used.
        triton.knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        triton.knobs.nvidia.dump_ptxas_log = True
        log = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptxas = log.getvalue()
    found = (re.findall(pattern, ptxas) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    registers, spilled = (max(map(int, numbers)) for numbers in found)
    shared, threads = compiled.metadata.shared, 32 * options["num_warps"]
    return Compiled(capability, compiled.asm["ptx"], compiled.asm["cubin"], registers, spilled, shared, threads)


def fused_kernel(
    layer: dict[str, Any],
    tile: Any,
    capability: int,
    weights: str = "bf16",
    transposed: bool = False,
    options: dict[str, Any] = triton_kernel.OPTIONS,
) -> Compiled:
    """With one of its tiles, for x in bfloat16; with biases where the weights are transposed, as gpt-oss has them."""
    unit = ("up_out", "down_out") if transposed else ("up_in", "down_in")
    fixed = triton_kernel.constants(**layer, biased=transposed) | tile.kwargs | dict.fromkeys(unit, 1)
    dtypes = {"x": "bf16", "g": "bf16", "up": weights, "down": weights, "up_bias": weights, "out": "fp32"}
    options = options | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return compile_kernel(triton_kernel._dots.fn, fixed, dtypes, capability, **options)


def epilogue(layer: dict[str, Any], capability: int, biased: bool = False) -> Compiled:
    """What follows the products over all experts at once, in bfloat16."""
    fixed = triton_kernel.formula_constants(layer["ffn"], layer["activation"], biased) | at_once.BLOCKS
    dtypes = {"inner": "bf16", "outer": "bf16", "up_bias": "bf16", "out": "fp32"}
    return compile_kernel(at_once._epilogue, fixed, dtypes, capability, num_warps=4, **triton_kernel.OPTIONS)
