"""What the command line prints: results on stdout, progress and where files went on stderr, JSON where asked for."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from vitq_kernels.distributed import process_group, rank
from vitq_kernels.files import discarded, write_text

console = Console(stderr=True)


@contextmanager
def one_voice() -> Iterator[None]:
    """The processes that torchrun started, if it did, as one job: the first alone prints and writes files."""
    with process_group():
        if rank() == 0:
            yield
            return
        console.quiet = True
        try:
            with redirect_stdout(io.StringIO()), discarded():
                yield
        finally:
            console.quiet = False


# Label and format by key of a result; a key that is not here is printed as it is.
SHOWN = {
    "calibration_images": ("calibration images", "{}"),
    "top1": ("top-1", "{:.2f} %"),
    "float_top1": ("float top-1", "{:.2f} %"),
    "agreement": ("agreement", "{:.2f} %"),
    "cosine": ("cosine to float features", "{:.5f}"),
    "kl": ("KL from float", "{:.5f} nats"),
    "images_per_s": ("speed", "{:.1f} images/s"),
    "weight_bytes": ("packed weights", "{:,} bytes"),
    "float_bytes": ("in float32", "{:,} bytes"),
    "mean_weight_bits": ("mean weight bits", "{:.4g}"),
}


def shown(result: Mapping[str, Any]) -> str:
    """One line for each value that is known."""
    known = {key: SHOWN.get(key, (key, "{}")) for key, value in result.items() if value is not None}
    width = max(len(label) for label, _ in known.values())
    return "\n".join(f"{label:{width}}  {form.format(result[key])}" for key, (label, form) in known.items())


def finish(text: str, payload: Mapping[str, Any], json_file: Path | None) -> None:
    """Prints the result and writes it where --json says."""
    if text:
        print(text)
    if json_file is not None:
        write_text(json_file, json.dumps(payload, indent=1))


def wrote(what: str, path: Path) -> None:
    """Says where a file went; the path stays in one piece."""
    console.print(f"{what}: {path}", markup=False, highlight=False, soft_wrap=True)


class Bar:
    """A progress bar as a (done, total) callback; silent where stderr is no terminal."""

    def __init__(self, label: str, total: int | None) -> None:
        self.progress = Progress(console=console, transient=True, disable=not sys.stderr.isatty())
        self.task = self.progress.add_task(label, total=total)

    def __enter__(self) -> Callable[[int, int], None]:
        self.progress.start()
        return lambda done, total: self.progress.update(self.task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
