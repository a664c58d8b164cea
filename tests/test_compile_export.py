"""Whole quantized models in torch's compilers: one graph, any batch, the same bits."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_swins import SWINS, quantized_swin, swin_images
from small_vits import mixed_allocation, small_vit, variant_images, variant_quantized
from torch import Tensor, nn

import vitq_kernels as vitq
from tests.conftest import BackendCase
from tests.numerics import assert_bitwise_equal
from vitq_kernels import ops
from vitq_kernels.data import digits_images, load_digits_vit
from vitq_kernels.ops.backends import BACKENDS

COUNTS = (5, 1, 7, 2)  # first not 3: torch would take it for the same size as the channels


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def model_and_images(case: str) -> tuple[nn.Module, Tensor]:
    """A quantized model and seven images that it takes."""
    if case == "mixed widths":
        return vitq.quantize(small_vit(), variant_images(), mixed_allocation(small_vit())), variant_images(count=7)
    if case == "W4A4":  # gelu levels
        return variant_quantized("class-token", 4, 4), variant_images(count=7)
    if case == "half":
        return copy.deepcopy(variant_quantized("class-token")).half(), variant_images(count=7).half()
    if case == "replace_linears":
        return vitq.replace_linears(load_digits_vit(), weight_bits=4), digits_images("test")[0][:7]
    if case == "digits":
        return vitq.quantize(load_digits_vit(), digits_images("calibration")[0][:16]), digits_images("test")[0][:7]
    if case in SWINS:
        return quantized_swin(case), swin_images(case, 7)
    return variant_quantized(case), variant_images(case, 7)


CASES = [
    "class-token",
    "shifted",
    "padded",
    "v2-padded",
    "distilled",
    "dynamic-pad",
    "mixed widths",
    "W4A4",
    "half",
    "replace_linears",
    "digits",
]


class Counted:
    """A compiler that counts its graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("case", ["class-token", "padded", "mixed widths", "W4A4", "half", "replace_linears"])
def test_a_model_compiles_into_one_graph_for_all_batches(case: str) -> None:
    model, images = model_and_images(case)
    backend = Counted()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for count in COUNTS:
        assert_bitwise_equal(compiled(images[:count]), model(images[:count]))
    assert backend.graphs == 2  # a batch of 1 is always a graph of its own


@pytest.mark.parametrize("case", ["class-token", "distilled"])
def test_a_model_compiles_through_aot_autograd(case: str) -> None:
    model, images = model_and_images(case)
    expected = model(images)
    assert_bitwise_equal(torch.compile(model, fullgraph=True, backend="aot_eager")(images), expected)


def test_inductor_gives_the_same_bits() -> None:
    """Of a model whose only float arithmetic is adding: inductor may contract what else there is."""
    model, images = model_and_images("no-final-norm")
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for count in (5, 7):
        assert_bitwise_equal(compiled(images[:count]), model(images[:count]))


def exported(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (images[:3],), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})


@pytest.mark.parametrize("case", CASES)
def test_an_exported_model_comes_back_from_its_file_and_takes_any_batch(case: str, tmp_path: Path) -> None:
    model, images = model_and_images(case)
    torch.export.save(exported(model, images), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    for count in COUNTS:
        assert_bitwise_equal(program.module()(images[:count]), model(images[:count]))
    called = {str(node.target) for node in program.graph.nodes}
    linear = {"replace_linears": "linear_per_token", "v2-padded": "linear_real"}.get(case, "linear_residual")
    assert f"vitq.{linear}.default" in called
    assert "aten.linear.default" not in called


def test_a_checkpoint_is_exported_before_its_first_call_and_runs_in_another_process(tmp_path: Path) -> None:
    model, images = variant_quantized("class-token"), variant_images(count=5)
    vitq.save(model, tmp_path / "model.safetensors")
    torch.export.save(exported(vitq.load(tmp_path / "model.safetensors"), images), tmp_path / "model.pt2")
    torch.save((images, model(images)), tmp_path / "expected.pt")
    program = """
import torch, vitq_kernels  # which registers the ops
images, expected = torch.load("expected.pt")
assert torch.equal(torch.export.load("model.pt2").module()(images), expected)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(vitq.__file__).parents[1])]))}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_an_exported_model_runs_on_the_backend_that_it_was_exported_with(triton: BackendCase) -> None:
    model, images = copy.deepcopy(variant_quantized("class-token")).to(triton.device), variant_images(count=3)
    images = images.to(triton.device)
    with ops.use_backend(triton.name):
        with pytest.raises(RuntimeError, match="is not prepared: run the model once before compiling it"):
            exported(model, images)
        model(images[:1])
        program = exported(model, images)
        assert_bitwise_equal(program.module()(images[:2]), model(images[:2]))
    layout = BACKENDS[triton.name].load().WEIGHT_LAYOUT
    message = f"backend reference reads weights in layout int8_rows, got {layout}; can: {triton.name}$"
    with ops.use_backend("reference"), pytest.raises(ops.BackendUnavailableError, match=message):
        program.module()(images[:2])


def test_a_captured_model_is_neither_compiled_nor_exported() -> None:
    fast = vitq.capture(variant_quantized("class-token"), (2,))
    with pytest.raises(RuntimeError, match="a captured model cannot be compiled or exported: do that to the model"):
        torch.export.export(fast, (variant_images(count=2),))
    with pytest.raises(Exception, match="a captured model cannot be compiled or exported: do that to the model"):
        torch.compile(fast, backend="eager", fullgraph=True)(variant_images(count=2))


def test_a_compiled_model_is_captured() -> None:
    model, images = variant_quantized("class-token"), variant_images(count=5)
    fast = vitq.capture(torch.compile(model, fullgraph=True, backend="eager"), (1, 4))
    assert_bitwise_equal(fast(images), model(images))
