"""Tiles that ``vitq tune`` measured on this machine's GPUs: a JSON file, read once, that goes before the cost model.

The file is ``$XDG_CACHE_HOME/vitq_kernels/triton_tiles.json`` (``~/.cache`` where the variable is not set)::

    {"NVIDIA H100 80GB HBM3": {"197x768x3072-w4-residual": [64, 64, 4, 4, 2]}}

with tokens x rows x columns, the windows' widths and the epilogue as the key, and rows, tokens, warps, stages and
splits of the tile.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import astuple, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from vitq_kernels.ops.triton.launch import Device
from vitq_kernels.ops.triton.tiles import Problem, Tile, candidates, rank

_asked: ContextVar[list[Problem] | None] = ContextVar("vitq_triton_asked", default=None)
_forced: ContextVar[Tile | None] = ContextVar("vitq_triton_forced", default=None)


def path() -> Path:
    """Where the file is, or would be."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vitq_kernels" / "triton_tiles.json"


def key(problem: Problem) -> str:
    """A problem as the file names it."""
    widths = ",".join(map(str, problem.widths))
    return f"{problem.tokens}x{problem.rows}x{problem.cols}-w{widths}-{problem.epilogue}"


@contextlib.contextmanager
def asked() -> Iterator[list[Problem]]:
    """Inside the ``with`` block the problems that want a tile are noted in the list, in order."""
    problems: list[Problem] = []
    token = _asked.set(problems)
    try:
        yield problems
    finally:
        _asked.reset(token)


@contextlib.contextmanager
def forced(tile: Tile | None) -> Iterator[None]:
    """Inside the ``with`` block every linear layer gets this tile; None: its own."""
    token = _forced.set(tile)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(problem: Problem, device: Device) -> Tile:
    """The tile for a problem: the forced one, else as measured on this GPU, else the model's first."""
    noted = _asked.get()
    if noted is not None:
        noted.append(problem)
    return _forced.get() or _chosen(problem, device)


@lru_cache(maxsize=4096)  # batches of many sizes
def _chosen(problem: Problem, device: Device) -> Tile:
    measured = read().get(device.name, {}).get(key(problem))
    if measured is not None:
        if measured in candidates(problem, device):
            return measured
        warnings.warn(f"{path()}: {measured} for {key(problem)} is no legal tile; run `vitq tune`", stacklevel=2)
    return rank(problem, device)[0][0]


@cache
def read() -> dict[str, dict[str, Tile]]:
    """Tiles by GPU and key; what is not as ``vitq tune`` writes it is ignored, with a warning."""
    try:
        content = _content()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home directory
        warnings.warn(f"the table of tiles cannot be read and is ignored: {error}", stacklevel=2)
        return {}
    found: dict[str, dict[str, Tile]] = {}
    for gpu, table in content.items():
        for name, entry in table.items():
            if isinstance(entry, list) and len(entry) == len(fields(Tile)) and all(type(v) is int for v in entry):
                found.setdefault(gpu, {})[name] = Tile(*entry)
            else:
                warnings.warn(f"{path()}: {entry!r} for {name} is no tile and is ignored", stacklevel=2)
    return found


def _content() -> dict[str, dict[str, Any]]:
    content = json.loads(path().read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not all(isinstance(table, dict) for table in content.values()):
        raise ValueError("expected an object of objects")
    return content


def with_tiles(gpu: str, tiles: dict[str, Tile]) -> str:
    """The file's new text: what it holds now, and these tiles by their keys for this GPU.

    Raises:
        ValueError: there is a file that is no table of tiles; it is not overwritten.
    """
    try:
        content = _content()
    except FileNotFoundError:
        content = {}
    except ValueError as error:
        raise ValueError(f"{path()} is no table of tiles, move it away: {error}") from error
    content.setdefault(gpu, {}).update({name: list(astuple(tile)) for name, tile in tiles.items()})
    return json.dumps(content, indent=1) + "\n"


def forget() -> None:
    """Reads the file again at the next choice."""
    read.cache_clear()
    _chosen.cache_clear()
