"""The inline PTX of the Triton kernels, which the interpreter passes over: executed here by PTX's definitions.

An instruction of these fragments is a line of ``STEPS``; operands are Python integers of their registers' widths.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

KERNELS = Path(next(iter(importlib.util.find_spec("vitq_kernels.ops").submodule_search_locations))) / "triton"
Memory = Callable[[int], int]


def prmt(a: int, b: int, selector: int) -> int:
    """PTX ISA, prmt, default mode without sign replication."""
    octets = (a | b << 32).to_bytes(8, "little")
    chosen = [octets[selector >> 4 * i & 7] for i in range(4)]
    assert not any(selector >> 4 * i & 8 for i in range(4)), "sign replication is not modelled"
    return int.from_bytes(bytes(chosen), "little")


def subtract_halves(a: int, b: int) -> int:
    """sub.rn.f16x2."""
    pair = np.array([a, b], "<u4").view("<f2").reshape(2, 2)
    return int((pair[0] - pair[1]).astype("<f2").view("<u4")[0])


STEPS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "xor.b32": lambda a, b: a ^ b,
    "prmt.b32": prmt,
    "sub.rn.f16x2": subtract_halves,
    "cvt.u64.u32": lambda a: a,
    "add.u64": lambda a, b: (a + b) % 2**64,
}


def fragments(name: str) -> list[str]:
    """The texts handed to tl.inline_asm_elementwise in a file."""
    tree = ast.parse((KERNELS / name).read_text(encoding="utf-8"))
    return [
        str(ast.literal_eval(node.args[0]))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and "inline_asm" in node.func.attr
    ]


def execute(text: str, outputs: int, inputs: list[int], memory: Memory | None = None) -> list[int]:
    """Runs a fragment: operands $0 to $(outputs - 1) are written, the following ones are ``inputs``."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for statement in filter(None, (part.strip() for part in text.strip("{}").split(";"))):
        opcode, rest = statement.split(maxsplit=1)
        target, *sources = (word.strip() for word in rest.split(","))
        if opcode == ".reg":
            continue
        if opcode == "ld.global.nc.u8":
            assert memory is not None
            registers[target] = memory(value(re.sub(r"[\[\]]", "", sources[0])))
        else:
            registers[target] = STEPS[opcode](*map(value, sources))
    return [registers[f"${i}"] for i in range(outputs)]


def test_all_fragments_are_known() -> None:
    found = {path.name: len(fragments(path.name)) for path in KERNELS.glob("*.py") if fragments(path.name)}
    assert found == {"attention_levels.py": 2}


@pytest.mark.parametrize("shift", range(4))
def test_bytes_become_halves(shift: int) -> None:
    to_half = next(text for text in fragments("attention_levels.py") if "f16x2" in text)
    every = np.roll(np.arange(-128, 128, dtype=np.int8), shift)
    for four in every.reshape(-1, 4):
        word = int(four.copy().view("<u4")[0])
        halves = np.array(execute(to_half, 2, [word]), "<u4").view("<f2")
        assert np.array_equal(halves, four.astype(np.float16))


def test_levels_are_gathered_and_are_halves_too() -> None:
    gather = next(text for text in fragments("attention_levels.py") if "ld.global" in text)
    base, bits = 0x7F00_1234_5678, 0x4B400000  # of 1.5 * 2^23, which every index carries
    table = np.roll(np.arange(256, dtype=np.uint8), 77)

    def memory(address: int) -> int:
        assert 0 <= address - base < 256, f"outside the table: {address:#x}"
        return int(table[address - base])

    pointer = (base - bits) % 2**64
    for i, j in [(0, 255), (255, 0), (3, 3), (17, 200), *((n, 255 - n) for n in range(256))]:
        first, second, both = execute(gather, 3, [bits + i, bits + j, pointer, pointer], memory)
        assert (first, second) == (int(table[i]), int(table[j]))
        halves = np.array([both], "<u4").view("<f2").astype(np.float64)
        assert (halves * 2**24).tolist() == [float(table[i]), float(table[j])]  # subnormals, exactly
