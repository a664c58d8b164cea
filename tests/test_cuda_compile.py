"""The compiled CUDA kernels: no spill, the products they are meant to have, wide accesses, and the committed tables."""

from __future__ import annotations

import csv
import gzip
import itertools
import os
import pickle
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import (
    cuda_attention_model,
    cuda_cost_model,
    cuda_epilogue,
    cuda_mixed_loops,
    cuda_resources,
    cuda_wgmma_model,
)
from benchmarks.cuda_sass import ARCHITECTURES, Kernel, class_of, count, extension_path, kernels, parse, resources
from vitq_kernels.ops.cuda.tiles import MOST_NORM_TOKENS, TILES

LISTING = """
	code for sm_80
		Function : _ZN4vitq13finish_kernelILNS_8EpilogueE0EEEvNS_13GemmArgumentsEPKii
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x00 */
                                                                     /* 0x00 */
        /*0010*/              @!PT LDS RZ, [RZ] ;                    /* 0x00 */
        /*0020*/                   LDS.128 R4, [R2+0x10] ;           /* 0x00 */
        /*0030*/              @P0  IMMA.16832.S8.S8 R8, R4.ROW, R6.COL, R8 ;
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.128 [R20], [R5.64], P4 ;
        /*0050*/              @P1  BRA 0x20 ;
        /*0060*/                   LDL.64 R4, [R1] ;
        /*0070*/                   BRA 0x70;
"""


def test_a_listing_is_read() -> None:
    (kernel,) = parse(LISTING.splitlines(), "sm_80")
    assert kernel.name == "finish_kernel<codes>"
    assert [i.name for i in kernel.instructions[:3]] == ["MOV", "NOP", "LDS.128"]
    first, last = kernel.loops()
    assert count(first) == {"LDS.128": 1, "IMMA.16832": 1, "LDGSTS.128": 1, "other": 1}
    assert len(last) == 1
    assert local_accesses(kernel) == ["LDL.64"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LDSM.16.M88.4", "LDSM.16"),
        ("IMMA.16864.S4.S4", "IMMA.16864"),
        ("STG.E.128", "STG.128"),
        ("STG.E.U8", "STG"),
        ("IADD3.X", "ALU"),
        ("IMAD.MOV.U32", "FMA"),
        ("BAR.SYNC", "other"),
    ],
)
def test_classes(name: str, expected: str) -> None:
    assert class_of(name) == expected


def local_accesses(kernel: Kernel) -> list[str]:
    return [i.name for i in kernel.instructions if i.name.startswith(("LDL", "STL"))]


@pytest.fixture(scope="module")
def binary() -> Path:
    path = extension_path()
    if path is None:
        pytest.skip("cuda not built")
    return path


@pytest.fixture(scope="module")
def compiled(binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Kernel]]:
    """The kernels of an architecture, which take 25 s to disassemble: the workers of a run lend them to each other."""
    found: dict[str, list[Kernel]] = {}
    own = tmp_path_factory.mktemp("sass")
    shared = tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def of(arch: str) -> list[Kernel]:
        known = shared / f"sass-{arch}"
        if arch not in found and known.exists():
            found[arch] = pickle.loads(gzip.decompress(known.read_bytes()))
        elif arch not in found:
            found[arch] = list(kernels(binary, arch))
            (own / "made").write_bytes(gzip.compress(pickle.dumps(found[arch]), 1))
            (own / "made").replace(known)
        return found[arch]

    return of


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_spills(binary: Path, arch: str) -> None:
    found = resources(binary, arch)
    assert {
        "attention_kernel<2, 4>",
        "window_attention_kernel<1, 1>",
        "gemm_kernel<codes, s8, 256x128>",
        "row_kernel<32, 3>",
    } <= found.keys()
    of_wgmma = sum(tile.wgmma for tile in TILES)
    assert len([name for name in found if name.startswith("gemm_kernel")]) == 4 * 2 * (len(TILES) - of_wgmma)
    with_norm = sum(tile.wgmma and tile.tokens <= MOST_NORM_TOKENS for tile in TILES)
    names = Counter(name.split(",")[0] for name in found if name.startswith("wgmma_kernel"))
    plain = {f"wgmma_kernel<{kind}": of_wgmma for kind in ("codes", "gelu", "real")}  # no partial sums
    assert names == plain | {"wgmma_kernel<norm": with_norm}
    assert {name: (stack, local) for name, (_, stack, _, local) in found.items() if stack or local} == {}


def compile_for_hopper(name: str, *options: str) -> str:
    """What nvcc says while it compiles a source of wgmma kernels."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("cuda not built")
    source = Path(__file__).parents[1] / "csrc" / f"{name}.cu"
    command = [nvcc, "-std=c++17", "-O3", "-fmad=false", "-arch=sm_90a", *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemm_sm90_codes", "gemm_sm90_real", "gemm_sm90_norm", "attention_sm90"])
def test_products_of_wgmma_are_not_serialised(tmp_path: Path, name: str) -> None:
    """ptxas says so (C7508 to C7519) where it cannot let products run while registers are written."""
    said = compile_for_hopper(name, "-Xptxas=-v", "-cubin", "-o", str(tmp_path / "cubin"))
    assert "registers" in said
    assert re.findall(r"C75\d\d[^\n]*", said) == []


def written_after_the_fence(ptx: str) -> list[str]:
    """Registers of a wgmma that are written between the fence and it, which PTX ISA 9.7.15.7 leaves undefined."""
    found, written = [], None
    for line in ptx.splitlines():
        if "wgmma.fence" in line:
            written = set()
        elif "wgmma.mma_async" in line and written is not None:
            found += sorted(written & set(re.findall(r"%r\d+", line.split("{", 1)[1])))
            written = None  # the next one of the chain needs no fence of its own
        elif written is not None:
            written |= set(re.findall(r"^\s*[a-z][\w.]*\s+\{?(%r\d+)", line))
    return found


def test_a_register_written_after_the_fence_is_seen() -> None:
    product = "wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {%r1, %r2}, {%r3, %r4, %r5, %r6}, %rd1, 1;"
    assert written_after_the_fence(f"mov.u32 %r1, 0;\nwgmma.fence.sync.aligned;\nadd.s64 %rd1, 1;\n{product}") == []
    assert written_after_the_fence(f"wgmma.fence.sync.aligned;\nmov.u32 %r1, 0;\n{product}") == ["%r1"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fences"), [("gemm_sm90_codes", 4 * 8 * 2), ("attention_sm90", 5 * 4 * 2)])
def test_registers_of_wgmma_are_written_before_the_fence(tmp_path: Path, name: str, fences: int) -> None:
    compile_for_hopper(name, "-ptx", "-o", str(tmp_path / "ptx"))
    ptx = (tmp_path / "ptx").read_text()
    assert ptx.count("wgmma.fence") >= fences
    assert written_after_the_fence(ptx) == []


def test_every_kernel_fits_an_sm() -> None:
    with cuda_resources.RESULTS.open(encoding="utf-8") as file:
        held = {(row["kernel"], row["arch"]): int(row["blocks_per_sm"]) for row in csv.DictReader(file)}
    # 8-bit stages of the largest tiles exceed sm_86 and sm_89; tiles.py asks what a GPU holds.
    assert {name for (name, arch), blocks in held.items() if blocks == 0 and arch in ("sm_80", "sm_90a")} == set()


@pytest.mark.parametrize(
    ("threads", "registers", "blocks"), [(288, 224, 0), (288, 168, 1), (384, 168, 1), (544, 120, 0), (640, 96, 1)]
)
def test_registers_are_those_of_sub_partitions(threads: int, registers: int, blocks: int) -> None:
    """9 warps of 224 registers are 64512, but three of them in one quarter of the SM."""
    assert cuda_resources.occupancy(threads, registers, 0, "sm_90a")[0] == blocks


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_are_what_they_are_meant_to_be(compiled: Callable[[str], list[Kernel]], arch: str) -> None:
    for kernel in compiled(arch):
        names = Counter(instruction.name for instruction in kernel.instructions)
        assert local_accesses(kernel) == [], kernel.name
        products = {name for name in names if name.startswith(("IMMA", "HMMA", "IGMMA"))}
        if kernel.name.startswith("wgmma_kernel"):
            tokens = kernel.name.split("x")[1].strip(">")
            assert products == ({f"IGMMA.64x{tokens}x32.S8.S8"} if arch == "sm_90a" else set()), kernel.name
            assert len(cuda_wgmma_model.slices(kernel)) == (8 if arch == "sm_90a" else 0), kernel.name
        elif kernel.name.startswith("attention_wgmma_kernel"):
            dim, keys = re.findall(r"\d+", kernel.name)
            both = {f"IGMMA.64x{keys}x32.S8.S8", f"IGMMA.64x{dim}x32.U8.S8"}
            assert products == (both if arch == "sm_90a" else set()), kernel.name
            assert count(kernel.instructions)["STG.128"] >= (dim == "64") * (arch == "sm_90a"), kernel.name
        elif kernel.name.startswith(("attention_kernel", "window_attention_kernel")):
            assert products == {"IMMA.16832.S8.S8", "IMMA.16832.U8.S8"}, kernel.name
        elif "s4" in kernel.name:
            assert products == (set() if arch == "sm_90a" else {"IMMA.16864.S4.S4"}), kernel.name
        else:
            assert products == ({"IMMA.16832.S8.S8"} if "s8" in kernel.name else set()), kernel.name
        if kernel.name.startswith("gemm_kernel") and products:
            classes = count(kernel.instructions)
            assert classes["STG.128"] >= 4, kernel.name
            check_loops(kernel)
        if kernel.name.startswith(("row_kernel", "quantize_kernel")):
            assert count(kernel.instructions)["LDG.128"] >= 2, kernel.name


ACCESS = re.compile(r"(LDG|STG|LDGSTS|LD|ST|RED|REDG|ATOM|ATOMG|UBLKCP|UBLKRED|UTMALDG|UTMASTG|UTMAREDG)(\.|$)")
# A loading thread asks for settled weights: where they lie, and their bytes.
OF_WEIGHTS = re.compile(r"LDG\.|UBLKCP")


def reached_before_the_wait(kernel: Kernel) -> list[str]:
    """Accesses of memory that some way from the begin comes to without griddepcontrol.wait; also calls, free jumps."""
    graph = cuda_epilogue.blocks(kernel)
    found, seen, waiting = [], set(), [kernel.instructions[0].address]
    while waiting:
        block = graph[waiting.pop()]
        for instruction in block.body:
            if instruction.name == "ACQBULK" and not instruction.predicate:
                break
            if ACCESS.match(instruction.name) or instruction.name.startswith(("BRX", "CALL")):
                found.append(instruction.name)
        else:
            waiting += [address for address in block.following if address not in seen]
            seen |= set(block.following)
    return found


EARLY = """
		Function : _ZN4vitq13finish_kernelILNS_8EpilogueE0EEEvNS_13GemmArgumentsEPKii
        /*0000*/              @P0  BRA 0x40 ;
        /*0010*/                   ACQBULK ;
        /*0020*/                   LDG.E R4, [R2.64] ;
        /*0030*/                   EXIT ;
        /*0040*/                   STS [R2], R3 ;
        /*0050*/                   LDG.E.128 R4, [R2.64] ;
        /*0060*/                   BRA 0x10 ;
        /*0070*/                   BRA 0x70;
"""


def test_an_access_that_a_branch_leads_to_is_seen() -> None:
    (kernel,) = parse(EARLY.splitlines(), "sm_90a")
    assert reached_before_the_wait(kernel) == ["LDG.E.128"]
    (kernel,) = parse(EARLY.replace("@P0  BRA 0x40", "     NOP").splitlines(), "sm_90a")
    assert reached_before_the_wait(kernel) == []


@pytest.mark.slow
def test_no_kernel_touches_memory_before_the_wait(compiled: Callable[[str], list[Kernel]]) -> None:
    """For Hopper, whose kernels start while the one in front ends (csrc/launch.cuh)."""
    assert sum(kernel.name.startswith("wgmma_kernel") for kernel in compiled("sm_90a")) == 4 * 3 + 3
    for kernel in compiled("sm_90a"):
        names = [instruction.name for instruction in kernel.instructions]
        if "BPT.TRAP" in names and len(names) < 20:
            continue  # 4-bit products, which Hopper has not
        assert "PREEXIT" in names, kernel.name
        early = reached_before_the_wait(kernel)
        if kernel.name.startswith("wgmma_kernel"):
            early = [name for name in early if not OF_WEIGHTS.match(name)]
        assert early == [], kernel.name


def check_loops(kernel: Kernel) -> None:
    """Each width has its loop, and there is one that asks; copies and loads of tokens are of 16 bytes a lane.

    So are loads of weights, but for the planes of two bits and of one: 8 and 4 bytes, side by side.
    """
    loops = [count(loop) for loop in cuda_cost_model.main_loops(kernel)]
    widths = [2, 3, 4] if "s4" in kernel.name else [2, 3, 4, 5, 6, 7, 8]
    found = sorted(map(cuda_cost_model.width, loops))
    assert found == [*widths, sum(widths)], kernel.name
    for body in loops:
        narrow = [n for n in body if re.match(r"(STS|LDG|STG|LDGSTS)(\.64)?$", n)]
        assert narrow == [], (kernel.name, body)
        bits = cuda_cost_model.width(body)
        if bits <= 8:
            assert (body["LDS.64"], body["LDS"]) == (4 * (bits >> 1 & 1), 4 * (bits & 1)), (kernel.name, body)


def test_the_committed_resources_are_those_of_the_build(binary: Path) -> None:
    with cuda_resources.RESULTS.open(encoding="utf-8") as file:
        committed = list(csv.DictReader(file))
    assert committed == [{k: str(v) for k, v in row.items()} for row in cuda_resources.rows(binary)]


def table_after(page: str, head: str) -> list[list[str]]:
    """The cells of the table whose first line is ``head``."""
    lines = page[page.index(head) :].splitlines()[2:]
    return [line.strip("| ").split(" | ") for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]


def percent(cell: str) -> float:
    """Of "shared 75 %", 75."""
    return float(cell.removesuffix(" %").split()[-1])


@pytest.mark.slow
def test_the_committed_cost_model_is_that_of_the_build(compiled: Callable[[str], list[Kernel]]) -> None:
    with cuda_cost_model.RESULTS.open(encoding="utf-8") as file:
        committed = list(csv.DictReader(file))
    made = [row for arch in ARCHITECTURES for row in cuda_cost_model.rows(compiled(arch))]
    assert committed == [{k: str(v) for k, v in row.items()} for row in made]
    page = cuda_cost_model.page(made, {arch: compiled(arch) for arch in ("sm_80", "sm_90a")})
    assert cuda_cost_model.REPORT.read_text(encoding="utf-8") == page
    large = [r for r in made if r["operands"] == "s8" and r["bits"] == 8 and r["tile"] in cuda_cost_model.SHOWN]
    assert len(large) == len(ARCHITECTURES) * 3
    assert all(row["next_pct"] < 90 for row in large)
    # Rows of several widths, as benchmarks/README.md says: in large tiles the tensor cores set the pace whatever the
    # widths are; on wgmma no pipe is fuller than with 8 bits, and nothing is added on the way out.
    asking = table_after(page, cuda_mixed_loops.HEAD[-2])
    assert len(asking) == 12 + 6 + 4
    for arch, operands, tile, *_, most, alone in asking:
        if operands == "wgmma":
            assert percent(most) <= percent(alone), tile
        elif operands == "s8" and tile in cuda_cost_model.SHOWN:
            assert percent(most) < 100, (arch, tile)
    assert [percent(row[-1]) for row in table_after(page, cuda_wgmma_model.MIXED_HEAD[-2])] == [0] * 12
    # What tiles.py counts for LayerNorm is what it takes; the issue slots set the pace.
    norms = table_after(page, cuda_wgmma_model.NORM_HEAD[-2])
    assert [row[3] for row in norms] == ["issue"] * 3
    assert all(abs(float(taken) - float(counted)) < 1 for *_, taken, counted in norms)


@pytest.mark.slow
def test_the_committed_attention_model_is_that_of_the_build(compiled: Callable[[str], list[Kernel]]) -> None:
    made = cuda_attention_model.rows(compiled("sm_90a"))
    assert cuda_attention_model.load() == [{name: float(value) for name, value in row.items()} for row in made]
    assert len(made) == 5 * 4 + 3
    for row in made:  # the tensor cores never set the pace, nor does shared memory
        assert max(row["alu_clk"], row["fma_clk"], row["shared_clk"], row["tensor_clk"]) < row["issue_clk"]


def test_clocks_of_a_head() -> None:
    row = dict.fromkeys(cuda_attention_model.COLUMNS, 1.0) | {"dim": 64, "issue_clk": 256.0, "tensor_clk": 10.0}
    made = [row | {"keys": 128, "passes": 1, "values_clk": 64.0}, row | {"keys": 144, "passes": 2, "values_clk": 72.0}]
    # 7 of 8 sixteenths of 128 keys; 112 queries are 7 warps' of two tiles of 4.
    one = cuda_attention_model.head_clocks(made, 112, 64)
    assert one["issue"] == 256 * 7 / 8 * 7 / 4 + 64 * 112 / 128
    assert one["tensor"] == 10 * 2
    two = cuda_attention_model.head_clocks(made, 288, 64)
    assert two["issue"] == 256 * 2 * 18 / 4 + 72 * 2
    assert two["tensor"] == 10 * 5 * 2
    # 3 heads on 2 SMs: whole ones would take two rounds of 2 tiles, halves two rounds of one and another.
    assert cuda_attention_model.estimate_us(made, 112, 64, 3, 2, 1.0) == 1.5 * one["issue"] / 1e3


WAYS_FORWARD = """
		Function : _ZN4vitq13finish_kernelILNS_8EpilogueE0EEEvNS_13GemmArgumentsEPKii
        /*0000*/                   FADD R1, R1, R1 ;
        /*0010*/                   BRA.DIV UR4, 0x50 ;
        /*0020*/              @P0  BRA 0x40 ;
        /*0030*/                   LDS.U8 R2, [R3] ;
        /*0040*/                   IGMMA.64x64x32.U8.S8 R4 ;
        /*0050*/                   BRA 0x20 ;
"""


def test_a_way_forward_is_found() -> None:
    """Past a branch for lanes that diverge, and not by the table of many levels."""
    (kernel,) = parse(WAYS_FORWARD.splitlines(), "sm_90a")
    way = cuda_attention_model.forward(cuda_epilogue.blocks(kernel), 0, 0x40)
    assert [i.address for i in way] == [0, 0x10, 0x20, 0x40]
    with pytest.raises(ValueError, match="no way forward"):
        cuda_attention_model.forward(cuda_epilogue.blocks(kernel), 0x50, 0x40)


BRANCHES = """
		Function : _ZN4vitq13finish_kernelILNS_8EpilogueE0EEEvNS_13GemmArgumentsEPKii
        /*0000*/              @P0  BRA 0x40 ;
        /*0010*/                   STS [R2], R3 ;
        /*0020*/                   BAR.SYNC 0x0 ;
        /*0030*/                   BRA 0x60 ;
        /*0040*/              @!P1 BRA P2, 0x60 ;
        /*0050*/                   STG.E.128 [R2.64], R4 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
"""


def test_the_ways_out_of_a_kernel_are_told_apart() -> None:
    (kernel,) = parse(BRANCHES.splitlines(), "sm_80")
    graph = cuda_epilogue.blocks(kernel)
    assert graph[0].following == (0x40, 0x10)
    assert graph[0x40].following == (0x60, 0x50)
    direct = cuda_epilogue.best_path(graph, 0, cuda_epilogue.direct_value, 16)
    assert [i.name for i in direct] == ["BRA", "BRA", "STG.E.128", "EXIT"]
    without_stores = cuda_epilogue.best_path(graph, 0, lambda i: 1 if i.name == "STS" else -5, 0)
    assert [i.name for i in without_stores] == ["BRA", "BRA", "EXIT"]
    reordered = cuda_epilogue.best_path(graph, 0, lambda i: 2000 * i.name.startswith("STS"), 0)
    assert [i.name for i in reordered] == ["BRA", "STS", "BAR.SYNC", "BRA", "EXIT"]


STAGED = """
		Function : _ZN4vitq13finish_kernelILNS_8EpilogueE0EEEvNS_13GemmArgumentsEPKii
        /*0000*/                   STS [R2], R3 ;
        /*0010*/                   BAR.SYNC 0x0 ;
        /*0020*/                   MOV R6, R7 ;
        /*0030*/                   LDS R4, [R2] ;
        /*0040*/                   STG.E.64 [R2.64], R4 ;
        /*0050*/              @P1  BRA 0x30 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
"""


def test_a_loop_that_stores_is_gone_through_until_all_is_stored() -> None:
    (kernel,) = parse(STAGED.splitlines(), "sm_80")
    graph = cuda_epilogue.blocks(kernel)
    way = [i.name for i in cuda_epilogue.best_path(graph, 0, cuda_epilogue.reordered_value, 24)]
    assert Counter(way) == {"STS": 1, "BAR.SYNC": 1, "MOV": 1, "LDS": 3, "STG.E.64": 3, "BRA": 1, "EXIT": 1}
    with pytest.raises(ValueError, match=r"^a lane has 12 bytes of outputs, the way stores 16$"):
        cuda_epilogue.best_path(graph, 0, cuda_epilogue.reordered_value, 12)


# --- bank conflicts, by the addresses of csrc/gemm_sm80.cuh (token_offset) and csrc/attention_rows.cuh (swizzled) -----


def token_offset(token: int, chunk: int) -> int:
    line = token // 2
    return line * 128 + token % 2 * 64 + (chunk ^ (line & 3)) * 16


def swizzled(row_bytes: int, row: int, chunk: int) -> int:
    shift, mask = {128: (0, 7), 64: (1, 3)}.get(row_bytes, (2, 1))
    return row * row_bytes + (chunk ^ (row >> shift & mask)) * 16


def all_banks(addresses: list[int]) -> bool:
    """Whether 16 bytes at each of 8 addresses, which are moved in one clock, lie in different banks."""
    return len({address // 16 % 8 for address in addresses}) == len(addresses) == 8


@pytest.mark.parametrize("chunk", range(4))
@pytest.mark.parametrize("first", [0, 8, 16, 56])
def test_matrices_of_tokens_have_no_conflicts(first: int, chunk: int) -> None:
    assert all_banks([token_offset(first + i, chunk) for i in range(8)])


def test_copies_of_tokens_have_no_conflicts() -> None:
    for thread in range(0, 256, 8):
        assert all_banks([token_offset((thread + i) // 4, (thread + i) % 4) for i in range(8)])
    assert sorted(token_offset(t, c) for t in range(128) for c in range(4)) == list(range(0, 128 * 64, 16))


@pytest.mark.parametrize("row_bytes", [32, 64, 96, 128])
def test_matrices_of_attention_have_no_conflicts(row_bytes: int) -> None:
    chunks = range(row_bytes // 16)
    assert all(all_banks([swizzled(row_bytes, 8 * f + n, c) for n in range(8)]) for f in range(8) for c in chunks)
    assert sorted(swizzled(row_bytes, r, c) for r in range(64) for c in chunks) == list(range(0, 64 * row_bytes, 16))
