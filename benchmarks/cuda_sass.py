"""What nvcc made of csrc/: resources, instructions and loops of every kernel, read from the built extension.

The tools are cuobjdump and c++filt; the first comes with a CUDA toolkit and lies in Triton's wheel, so no GPU and no
toolkit is needed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a")
EPILOGUES = ("codes", "gelu", "real", "partial", "norm")  # launchers.h, Epilogue
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One line of SASS."""

    address: int
    name: str  # with its modifiers, such as LDS.128
    operands: str
    predicate: str = ""  # such as @!P0


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture."""

    name: str  # gemm_kernel<codes, s8, 256x128>, attention_wgmma_kernel<64, 208, whole>, ...
    arch: str
    instructions: tuple[Instruction, ...]

    def loops(self) -> Iterator[tuple[Instruction, ...]]:
        """Bodies of backward branches that hold no other, in the order of their ends."""
        found: list[tuple[int, int]] = []
        places = {instruction.address: place for place, instruction in enumerate(self.instructions)}
        for end, instruction in enumerate(self.instructions):
            target = re.search(r"0x([0-9a-f]+)", instruction.operands) if instruction.name.startswith("BRA") else None
            start = places.get(int(target.group(1), 16), end + 1) if target else end + 1
            if start <= end and not any(start <= inner for inner, _ in found):
                found.append((start, end))
        return (self.instructions[start : end + 1] for start, end in found)


def extension_path() -> Path | None:
    """The built extension of the installed package."""
    spec = find_spec("vitq_kernels._cuda")
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def tool(name: str) -> str:
    """A binary tool of CUDA: Triton's, else that on PATH.

    Raises:
        FileNotFoundError: there is none.
    """
    spec = find_spec("triton")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    for place in places:
        path = Path(place) / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return str(path)
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name}: neither in Triton's wheel nor on PATH")
    return found


def resources(binary: Path, arch: str) -> dict[str, tuple[int, int, int, int]]:
    """Registers, bytes of stack, of static shared memory and of local memory of each kernel."""
    text = _run(tool("cuobjdump"), "-arch", arch, "--dump-resource-usage", str(binary))
    found, name = {}, ""
    for line in text.splitlines():
        head = re.search(r"Function (\S+):", line)
        name = head.group(1) if head else name
        usage = _USAGE.search(line)
        if usage:
            found[name] = tuple(map(int, usage.groups()))
    names = short_names(found)
    return {names[mangled]: usage for mangled, usage in found.items()}  # type: ignore[misc]


def kernels(binary: Path, arch: str) -> Iterator[Kernel]:
    """Every kernel of an architecture, with its SASS."""
    command = [tool("cuobjdump"), "-arch", arch, "-sass", str(binary)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from parse(process.stdout, arch)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}")


def parse(lines: Iterable[str], arch: str) -> Iterator[Kernel]:
    """The kernels in cuobjdump's listing."""
    name, body = "", []
    for line in lines:
        if "Function :" in line:
            if body:
                yield Kernel(short_names([name])[name], arch, tuple(body))
            name, body = line.split("Function :")[1].strip(), []
            continue
        match = _INSTRUCTION.match(line)
        if match and name:
            address, predicate, opcode, operands = match.groups()
            # "@!PT LDS RZ" stands before barriers and does nothing.
            predicate = (predicate or "").strip()
            body.append(Instruction(int(address, 16), "NOP" if predicate == "@!PT" else opcode, operands, predicate))
    if body:
        yield Kernel(short_names([name])[name], arch, tuple(body))


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    """The kernels' names with their template arguments, as the tables have them."""
    given = list(mangled)
    if not given:
        return {}
    text = subprocess.run(["c++filt"], input="\n".join(given), capture_output=True, text=True, check=True).stdout
    return {name: _short(full) for name, full in zip(given, text.splitlines(), strict=True)}


def _short(demangled: str) -> str:
    name = re.sub(r"^void |\(anonymous namespace\)::|_GLOBAL__N__\w+::|vitq::", "", demangled)
    gemm = re.match(r"gemm_kernel<\(Epilogue\)(\d), (true|false), Tile<(\d), (\d), (\d), \d+, \d+>", name)
    if gemm:
        kind, native, rows, tokens, fragments = gemm.groups()
        size = f"{64 * int(rows)}x{16 * int(tokens) * int(fragments)}"
        return f"gemm_kernel<{EPILOGUES[int(kind)]}, {'s4' if native == 'true' else 's8'}, {size}>"
    wgmma = re.match(r"wgmma_kernel<\(Epilogue\)(\d), (?:AllRows<)?WgmmaTile<(\d+), \d+, \d+>", name)
    if wgmma:
        return f"wgmma_kernel<{EPILOGUES[int(wgmma.group(1))]}, 128x{wgmma.group(2)}>"
    attention = re.match(r"attention_wgmma_kernel<hopper_attention::Shape<(\d+), (\d+), (true|false), \d+> ?>", name)
    if attention:
        dim, keys, whole = attention.groups()
        return f"attention_wgmma_kernel<{dim}, {keys}, {'whole' if whole == 'true' else 'tiles'}>"
    finish = re.match(r"finish_kernel<\(Epilogue\)(\d)>", name)
    if finish:
        return f"finish_kernel<{EPILOGUES[int(finish.group(1))]}>"
    return name.split("(")[0]


def count(instructions: Iterable[Instruction]) -> Counter[str]:
    """Instructions by class: tensor core, shared memory by kind and width, arithmetic pipes, other."""
    return Counter(class_of(instruction.name) for instruction in instructions)


_ALU = (
    "LOP3",
    "SHF",
    "PRMT",
    "IADD3",
    "ISETP",
    "SEL",
    "LEA",
    "IMNMX",
    "VIMNMX",
    "FMNMX",
    "FSETP",
    "FSEL",
    "PLOP3",
    "VIADD",  # IADD3 of two, from sm_90 on
    "I2FP",  # of sm_86 on; sm_80's I2F is 16 lanes a clock
    "MOV",
)
_FMA = ("IMAD", "FFMA", "FMUL", "FADD", "IDP")


def class_of(name: str) -> str:
    """The class of an instruction: its pipe, or for memory its kind and width."""
    head = name.split(".")[0]
    if head in ("IMMA", "LDSM"):
        return ".".join(name.split(".")[:2])
    if head in ("LDS", "STS", "LDG", "STG", "LDGSTS", "LDL", "STL"):
        wide = re.search(r"\.(64|128)$|\.(64|128)\.", name)
        return f"{head}.{wide.group(1) or wide.group(2)}" if wide else head
    if head in _ALU:
        return "ALU"
    return "FMA" if head in _FMA else "other"


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
