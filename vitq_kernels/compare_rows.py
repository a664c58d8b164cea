"""What a comparison of methods found: rows, verdicts against controls, and both as text, Markdown and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

from torch import Tensor

SURE = 2.0  # standard errors beyond which a difference counts


@dataclass(frozen=True)
class Verdict:
    """A method against its control, image by image: a difference counts where it is beyond 2 standard errors.

    The error is that of the images alone. What another permutation or other calibration images would change is not in
    it.
    """

    control: str  # "uniform"
    difference: float  # mean over images of KL(method) - KL(control), in nats; below 0 the method is better
    error: float  # standard error of that mean

    @classmethod
    def of(cls, kl: Tensor, control_kl: Tensor, control: str) -> Verdict:
        """From the KL of the same images, float64 [n] each, n at least 2."""
        difference = kl - control_kl
        return cls(control, float(difference.mean()), standard_error(difference))

    @property
    def beats(self) -> bool:
        """Whether the method is better than its control, and surely so."""
        return self.difference < -SURE * self.error

    @property
    def loses(self) -> bool:
        """Whether the method is worse than its control, and surely so."""
        return self.difference > SURE * self.error

    def __str__(self) -> str:
        word = "beats" if self.beats else "loses to" if self.loses else "does not beat"
        return f"{word} {self.control} ({self.difference:+.2g} ± {self.error:.1g})"


def standard_error(values: Tensor) -> float:
    """Of the mean of float64 [n], n at least 2."""
    return float(values.std() / math.sqrt(len(values)))


@dataclass(frozen=True)
class ComparisonRow:
    """One method at one pair of widths. The numbers are None where they are not known, all of them in a failed row."""

    method: str  # "lrp-qvit allocation", "lrp-qvit (preset, simulated)"
    weight_bits: float  # of every weight in the blocks, or their mean
    activation_bits: int  # of every activation in the blocks
    executes: str  # "integers" or "simulated"
    top1: float | None = None  # percent, None without labels
    drop: float | None = None  # points below the float model, None without labels
    agreement: float | None = None  # percent of images with the float model's first class
    kl: float | None = None  # mean KL(float, quantized) in nats
    kl_error: float | None = None  # standard error of that mean
    weight_bytes: int | None = None  # packed weights with their row orders
    mean_weight_bits: float | None = None  # over the linears of the blocks
    seconds: float | None = None  # from calibration images to the model, with all that it shares with other rows
    verdicts: tuple[Verdict, ...] = ()
    failure: str | None = None  # why there are no numbers

    @property
    def widths(self) -> str:
        """ "W3A8"."""
        return f"W{self.weight_bits:g}A{self.activation_bits}"

    @property
    def judgement(self) -> str:
        """The last column: what came out against the controls, or why nothing did."""
        if self.failure is not None:
            return f"failed: {self.failure}"
        if not self.verdicts:
            return "" if self.method == "uniform" else "no control"
        return "; ".join(map(str, self.verdicts))


# Heading, and a row's cell under it; "-" stands for None.
COLUMNS: tuple[tuple[str, Callable[[ComparisonRow], str]], ...] = (
    ("widths", lambda row: row.widths),
    ("method", lambda row: row.method),
    ("executes", lambda row: row.executes),
    ("top-1 %", lambda row: _number(row.top1, ".2f")),
    ("drop", lambda row: _number(row.drop, ".2f")),
    ("agreement %", lambda row: _number(row.agreement, ".2f")),
    ("KL", lambda row: _number(row.kl, ".4g")),
    ("bytes", lambda row: _number(row.weight_bytes, ",")),
    ("mean bits", lambda row: _number(row.mean_weight_bits, ".3f")),
    ("seconds", lambda row: _number(row.seconds, ".1f")),
    ("against its control", lambda row: row.judgement),
)
TEXT = ("widths", "method", "executes", "against its control")  # columns that stand to the left


@dataclass(frozen=True)
class Comparison:
    """Methods on one model and its images."""

    images: int  # evaluated
    calibration_images: int
    seed: int
    float_top1: float | None  # percent, None without labels
    float_bytes: int  # the quantized weights in float32
    rows: tuple[ComparisonRow, ...] = ()

    def table(self) -> str:
        """Plain text, a line a row, and the notes that the numbers need."""
        cells = self._cells()
        widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
        lines = [
            "  ".join(
                text.ljust(width) if heading in TEXT else text.rjust(width)
                for text, width, (heading, _) in zip(line, widths, COLUMNS, strict=True)
            ).rstrip()
            for line in cells
        ]
        return "\n".join([*lines, "", *self._notes()])

    def markdown(self) -> str:
        """The same as a Markdown table."""
        head, *body = ([text.replace("|", "\\|") for text in line] for line in self._cells())
        rule = ["---" if heading in TEXT else "---:" for heading, _ in COLUMNS]
        lines = [f"| {' | '.join(line)} |" for line in (head, rule, *body)]
        return "\n".join([*lines, "", *(f"- {note}" for note in self._notes())]) + "\n"

    def _cells(self) -> list[list[str]]:
        return [[heading for heading, _ in COLUMNS], *([cell(row) for _, cell in COLUMNS] for row in self.rows)]

    def _notes(self) -> Sequence[str]:
        top1 = "" if self.float_top1 is None else f", top-1 {self.float_top1:.2f} %"
        images = f"{self.images} images evaluated, {self.calibration_images} for calibration, seed {self.seed}"
        judged = "mean difference in KL over the same images ± its standard error; it counts beyond"
        return (
            f"float32: {self.float_bytes:,} bytes{top1}; {images}",
            f"against its control: {judged} {SURE:g} of them",
        )

    def to_json(self) -> str:
        """JSON text that ``from_json`` reads back to an equal object."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Reads ``to_json`` text; raises ValueError that says what is wrong with it."""
        try:
            data = json.loads(text)
            rows = tuple(
                ComparisonRow(**{**row, "verdicts": tuple(Verdict(**verdict) for verdict in row["verdicts"])})
                for row in data["rows"]
            )
            return cls(**{f.name: data[f.name] for f in fields(cls)} | {"rows": rows})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a comparison: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        return self.table()


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def image_kl(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(float, quantized) of every image in nats, float64 [n], of logits and the float model's, [n, classes]."""
    answer, truth = (x.double().log_softmax(-1) for x in (logits, reference))
    return (truth.exp() * (truth - answer)).sum(-1)
