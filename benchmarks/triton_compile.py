"""Compiles a Triton kernel launch for a GPU that is not there, and reads what came of it.

Registers, spills, shared memory and the instructions come from the cubin, by ``cuobjdump`` and ``nvdisasm`` of Triton's
own wheel. A process that interprets Triton (TRITON_INTERPRET) cannot compile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vitq_kernels.ops.triton.launch import INTERPRETED, Launch

POINTERS = {
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# A line of nvdisasm: a label, or address, perhaps a predicate, the opcode with its modifiers, and operands.
LINE = re.compile(
    r"^(?:(?P<label>\.L_x_\d+):|\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)(?P<operands>[^;]*);)",
    re.MULTILINE,
)
MMA = ("IMMA", "IGMMA", "UTCIMMA")  # of SASS, with an integer accumulator


@dataclass(frozen=True)
class Compiled:
    """A kernel as it would run on compute capability ``cc``."""

    cc: int
    ptx: str
    opcodes: tuple[str, ...]  # of the SASS, with modifiers, in order
    loops: tuple[int, ...]  # instructions of each innermost loop that has an integer MMA in it, in order
    registers: int  # a thread
    shared_bytes: int  # a program
    threads: int  # a program

    @property
    def spills(self) -> int:
        """Instructions that move registers to local memory and back."""
        return sum(op.split(".")[0] in ("LDL", "STL") for op in self.opcodes)


def compile_launch(launch: Launch, cc: int) -> Compiled:
    """Compiles as the launch would be, with the specialisations that Triton makes of its arguments."""
    if INTERPRETED:
        raise RuntimeError("triton is interpreted in this process (TRITON_INTERPRET): it cannot compile")
    parameters = {parameter.name: parameter for parameter in launch.kernel.params}
    options = {key: value for key, value in launch.named.items() if key not in parameters}
    given = dict(zip(parameters, launch.args, strict=False)) | launch.named
    arguments = {name: given[name] for name in parameters}
    signature, constexprs, attrs = {}, {}, {}
    for index, (name, value) in enumerate(arguments.items()):
        signature[name] = "constexpr"
        if isinstance(value, torch.Tensor):
            signature[name], attrs[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif parameters[name].is_constexpr or value is None or value == 1:
            constexprs[name] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attrs[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    compiled = triton.compile(source, GPUTarget("cuda", cc, 32), {"enable_fp_fusion": False, **options})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass, usage = (_tool(tool, file.name) for tool in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage")))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    opcodes, loops = read_sass(sass)
    return Compiled(
        cc,
        compiled.asm["ptx"],
        tuple(opcodes),
        tuple(loops),
        int(registers.group(1)),
        compiled.metadata.shared,
        32 * compiled.metadata.num_warps,
    )


def read_sass(text: str) -> tuple[list[str], list[int]]:
    """Opcodes in order, and the number of instructions of each innermost loop that multiplies matrices."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []  # first instruction and length
    for line in LINE.finditer(text):
        if line["label"]:
            labels[line["label"]] = len(opcodes)
            continue
        opcodes.append(line["opcode"])
        target = re.search(r"\.L_x_\d+", line["operands"]) if line["opcode"].startswith("BRA") else None
        if target and target.group() in labels:
            first = labels[target.group()]
            # Code out of line jumps back too, into a loop or before it.
            apart = all(first >= start + length for start, length in loops)
            if apart and any(opcode.startswith(MMA) for opcode in opcodes[first:]):
                loops.append((first, len(opcodes) - first))
    return opcodes, [length for _, length in loops]


def _tool(command: tuple[str, ...], path: str) -> str:
    arguments: list[Any] = [TOOLS / command[0], *command[1:], path]
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
