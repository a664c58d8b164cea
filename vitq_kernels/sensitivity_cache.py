"""Measurements in a file that grows line by line, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitq_kernels.distributed import from_first, rank
from vitq_kernels.files import write_text

FORMAT = "vitq sensitivity cache 1"  # raise it when the same settings come to mean other numbers

# Which sites are not at the baseline's width, in forward order, and at which width they are; () is the baseline itself.
Changes = tuple[tuple[str, int], ...]


def fingerprint(model: nn.Module, batches: Iterable[Tensor], settings: str) -> str:
    """Of all that a measurement depends on: architecture, weights, images and how they are cut into batches."""
    digest = hashlib.sha256(f"{settings}\n{model}".encode())
    for name, tensor in [*model.state_dict().items(), *(("images", batch) for batch in batches)]:
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class MeasurementCache:
    """Measured KLs by their changes: a header line with the fingerprint, then a JSON line for each measurement.

    The first process alone reads and writes the file; all processes know what is in it.
    """

    def __init__(self, path: Path | None, owner: str) -> None:
        """Reads what there is.

        Args:
            path: of the file, which is made if it does not exist; None: measurements are held in memory.
            owner: fingerprint of the measurements.

        Raises:
            ValueError: the file is something else, is damaged, or its measurements have another fingerprint.
        """
        self.path = path
        self.known: dict[Changes, float] = {}
        if path is None:
            return
        text = from_first(lambda: path.read_text(encoding="utf-8") if path.exists() else "")
        complete = text[: text.rfind("\n") + 1]  # a run that was killed may have left half a line at the end
        header = {"format": FORMAT, "fingerprint": owner}
        if complete:
            self._read(complete.splitlines(), header)
        if rank() == 0 and (not complete or complete != text):
            write_text(path, complete or json.dumps(header) + "\n")

    def _read(self, lines: list[str], header: dict[str, str]) -> None:
        found = _parsed(lines[0])
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"cache {self.path} is not a '{FORMAT}' file: name another file")
        if found != header:
            raise ValueError(
                f"cache {self.path} belongs to another model, other images or other settings (fingerprint "
                f"{str(found.get('fingerprint'))[:12]}, here {header['fingerprint'][:12]}): name another file"
            )
        for number, line in enumerate(lines[1:], start=2):
            try:
                entry = json.loads(line)
                self.known[tuple(entry["changed"].items())] = float(entry["kl"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"cache {self.path} is damaged in line {number}: {error}") from error

    def add(self, changes: Changes, kl: float) -> None:
        """Remembers a measurement; it is on the disk when this returns."""
        self.known[changes] = kl
        if self.path is not None and rank() == 0:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps({"changed": dict(changes), "kl": kl}) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
