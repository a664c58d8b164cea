"""What follows from measured rows: the targets of ../shared/docs/kernels.md 5 and means of ratios.

All rows here are ViT-B/16's, on uniform codes, with cold buffers where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.microbench import Row, geometric_mean, select, target

CUBLAS, INT_MM = "bf16 F.linear", "torch._int_mm alone"
UNFUSED = "quantize + _int_mm + dequantize (eager torch)"
TORCH_LAYERNORM, TORCH_QUANTIZE = "LayerNorm + quantize (eager torch)", "quantize (eager torch)"
FLASH, CUDNN, EFFICIENT = "SDPA flash fp16", "SDPA cudnn fp16", "SDPA efficient fp16"
WITH_NORM = " + LayerNorm"  # ends the name of a layer with it, whose rows are beside the layer's own
FOUR_BIT = "four_bit"  # ``data`` of rows whose activations have 4 bits

TRITON_OVER_CUBLAS = 1.2  # kernels.md 5.1, Triton tier, batch 64 and more
MIXED_OVER_WIDEST = 1.05  # kernels.md 5.1, widths
# kernels.md 5.1, row "floor", by the least batch that it holds for.
FLOOR_64 = {CUBLAS: 1.5, INT_MM: 1.0, UNFUSED: 1.7}
FLOOR_64_PCT_OF_PEAK = 51.0
FLOOR_8 = {CUBLAS: 1.4}
FLOOR_8_OF_TABLE = 0.75
TABLE_8_TOPS = {"qkv": 729.0, "proj": 389.0, "fc1": 797.0, "fc2": 748.0}  # of an H200
FLOOR_1_US = 5.0  # a layer, inside a graph
FLOOR_WIDTHS = {"2": 0.95, "4": 0.95, "3": 0.85, "5": 0.85, "6": 0.85, "7": 0.85}
FLOOR_WIDTHS_1 = 0.95  # any width at batch 1
# kernels.md 5.2 and 5.3, rows "floor".
FLOOR_ATTENTION = {"S=197": 1.2, "S=577": 1.1}  # batch 8 and more, over flash
FLOOR_ATTENTION_OTHER = 1.0  # over cuDNN; over flash at batch 1
FLOOR_LAYERNORM_GBPS = 0.8 * 4300  # of an H200's copy, at batch 64: 29 MB lie in L2
FLOOR_LAYERNORM_US = 2.8  # batch 8 and less
FLOOR_OVER_LAYERNORM = 2.0
HOPPER = 90  # the numbers that are no ratios are of its first GPUs


def triton_targets(rows: Sequence[Row], gpu: Any) -> list[Row]:
    """The Triton tier's; means over the four layers."""
    cold = select(_without_norm(rows), cache="cold", data="uniform")
    largest = max((row["batch"] for row in cold), default=0)
    found = []
    for bits in dict.fromkeys(row["bits_w"] for row in select(cold, baseline=CUBLAS, batch=largest)):
        name = f"W{bits} over {CUBLAS} at batch {largest}"
        found.append(target(name, _speedup(cold, CUBLAS, batch=largest, bits_w=bits), TRITON_OVER_CUBLAS, True))
    return found + mixed_over_widest(cold)


def cuda_targets(rows: Sequence[Row], gpu: Any) -> list[Row]:
    """The CUDA tier's rows "floor": on Hopper too, mma.sync reaches no more. Means over the four layers."""
    plain = _without_norm(rows)
    cold, found = select(plain, cache="cold", data="uniform"), []
    for batch in dict.fromkeys(row["batch"] for row in cold):
        here, at = select(cold, batch=batch), f"at batch {batch}"
        for name, bound in (FLOOR_64 if batch >= 64 else FLOOR_8 if batch >= 8 else {}).items():
            found.append(_floor(f"W8 over {name} {at}", _speedup(here, name, bits_w="8"), bound))
        if gpu.cc == HOPPER:
            found += _hopper_floors(here, select(plain, cache="hot", batch=batch), batch)
        found += [
            _floor(f"speed of W{bits} over W8 {at}", ratio, FLOOR_WIDTHS[bits] if batch >= 8 else FLOOR_WIDTHS_1)
            for bits, ratio in _over_w8(here).items()
        ]
        for case, bound in FLOOR_ATTENTION.items():
            if select(here, op="attention", case=case):
                bounds = {FLASH: bound if batch >= 8 else FLOOR_ATTENTION_OTHER, CUDNN: FLOOR_ATTENTION_OTHER}
                for name, least in bounds.items():
                    found.append(_floor(f"attention {case} over {name} {at}", _speedup(here, name, case=case), least))
        if select(here, op="layernorm"):
            value = _speedup(here, TORCH_LAYERNORM, op="layernorm")
            found.append(_floor(f"layernorm over {TORCH_LAYERNORM} {at}", value, FLOOR_OVER_LAYERNORM))
    return found + mixed_over_widest(cold)


def _without_norm(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not row["case"].endswith(WITH_NORM)]


def _hopper_floors(cold: Sequence[Row], hot: Sequence[Row], batch: int) -> list[Row]:
    layers, at = select(cold, baseline=CUBLAS, bits_w="8"), f"at batch {batch}"
    norms, found = select(hot, op="layernorm", baseline=TORCH_LAYERNORM), []
    if batch >= 64:
        parts = [row["pct_of_peak"] for row in layers if row["pct_of_peak"]]
        found.append(_floor(f"W8, % of the int8 peak {at}", geometric_mean(parts), FLOOR_64_PCT_OF_PEAK))
        rates = [row["gbps"] for row in norms]
        found.append(_floor(f"layernorm, GB/s from L2 {at}", geometric_mean(rates), FLOOR_LAYERNORM_GBPS))
    elif batch >= 8:
        parts = [row["tops"] / TABLE_8_TOPS[row["case"]] for row in layers]
        found.append(_floor(f"W8, TOPS over those of the table {at}", geometric_mean(parts), FLOOR_8_OF_TABLE))
    elif batch == 1:
        slowest = max((row["us"] for row in layers), default=None)
        found.append(_floor(f"W8, us of the slowest layer {at}", slowest, FLOOR_1_US, at_least=False))
    if batch <= 8:
        slowest = max((row["us"] for row in norms), default=None)
        found.append(_floor(f"layernorm, us {at}", slowest, FLOOR_LAYERNORM_US, at_least=False))
    return found


def _floor(name: str, value: float | None, bound: float, at_least: bool = True) -> Row:
    return target(f"floor: {name}", value, bound, at_least)


def _speedup(rows: Sequence[Row], baseline: str, **wanted: Any) -> float | None:
    group = select(rows, baseline=baseline, **wanted)
    return geometric_mean([row["speedup_x"] for row in group if row["speedup_x"]])


def _times(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Microseconds of the linear layers by layer and widths."""
    return {(row["case"], row["bits_w"]): row["us"] for row in rows if row.get("N")}


def _over_w8(rows: Sequence[Row]) -> dict[str, float | None]:
    """Time of W8 over that of each other width."""
    times = _times(rows)
    return {
        width: geometric_mean([times[layer, "8"] / us for (layer, bits), us in times.items() if bits == width])
        for width in FLOOR_WIDTHS
        if any(bits == width for _, bits in times) and any(bits == "8" for _, bits in times)
    }


def mixed_over_widest(cold: Sequence[Row]) -> list[Row]:
    """Layers of several widths beside the same layers at the widest of them."""
    found = []
    for batch in dict.fromkeys(row["batch"] for row in cold):
        here = _times(select(cold, batch=batch))
        ratios = [
            us / here[layer, bits.split("/")[-1]]
            for (layer, bits), us in here.items()
            if "/" in bits and (layer, bits.split("/")[-1]) in here
        ]
        name = f"time of mixed widths over that of the widest alone, batch {batch}"
        found.append(target(name, geometric_mean(ratios), MIXED_OVER_WIDEST, at_least=False))
    return found


def _key(row: Row) -> tuple[Any, ...]:
    return row["op"], row["batch"], row["bits_w"], row["case"]


def _speed_over(rows: Sequence[Row], others: Sequence[Row], name: str) -> list[Row]:
    """Means of the others' times over ours of the same cases, by op, batch and width."""
    theirs = {_key(row): row["us"] for row in others}
    ours = {_key(row): row["us"] for row in rows if _key(row) in theirs}  # once, not once a baseline
    groups: dict[tuple[Any, ...], list[float]] = {}
    for key, us in ours.items():
        groups.setdefault(key[:3], []).append(theirs[key] / us)
    return [
        {"op": op, "batch": batch, "bits_w": bits, "cases": len(values), name: geometric_mean(values)}
        for (op, batch, bits), values in groups.items()
    ]


def four_bit(rows: Sequence[Row]) -> list[Row]:
    """Speed of W4A4 over that of W4A8, where W4A4 was measured."""
    cold = select(rows, cache="cold")
    return _speed_over(select(cold, data=FOUR_BIT), select(cold, data="uniform"), "w4a4_over_w4a8_x")


def over_triton(rows: Sequence[Row], triton: Sequence[Row]) -> list[Row]:
    """Speed over that of the Triton backend's rows of the same cases."""
    ours, theirs = (select(each, cache="cold", data="uniform") for each in (rows, triton))
    return _speed_over(ours, theirs, "over_triton_x")


def tile_choice(rows: Sequence[Row]) -> list[Row]:
    """What the model's first tile costs over the best that was measured of its five."""
    result = []
    for case, batch, bits in dict.fromkeys((row["case"], row["batch"], row["bits_w"]) for row in rows):
        group = select(rows, case=case, batch=batch, bits_w=bits)
        first, best = select(group, rank=1), min(group, key=lambda row: row["us"])
        cost = first[0]["us"] / best["us"] if first else None
        result.append({"case": case, "batch": batch, "bits_w": bits, "best": best["tile"], "cost_of_choice_x": cost})
    return result
