"""The choice of a backend: use_backend, VITQ_BACKEND, the default, and no silent fallback."""

from __future__ import annotations

import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch

import vitq_kernels.ops as ops
from tests.conformance import op_arguments
from tests.op_cases import SAMPLES
from vitq_kernels.ops import backends
from vitq_kernels.ops.backends import (
    BACKENDS,
    ENVIRONMENT_VARIABLE,
    Backend,
    BackendUnavailableError,
    chosen_backend,
    implementation,
    use_backend,
)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A backend ``recorder`` that has one op, quantize, and says when it is called."""
    calls: list[str] = []

    def quantize(x: torch.Tensor, *others: object) -> torch.Tensor:
        calls.append("quantize")
        return x.to(torch.int8)

    add_backend(monkeypatch, "recorder", ("cpu",), quantize=quantize)
    return calls


def add_backend(monkeypatch: pytest.MonkeyPatch, name: str, devices: tuple[str, ...], **functions: object) -> None:
    module = ModuleType(f"planted_{name}")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(BACKENDS, name, Backend(name, module.__name__, devices))


def run(op: str = "quantize") -> object:
    return getattr(torch.ops.vitq, op)(*op_arguments(SAMPLES[op]))


def test_the_default_on_a_cpu_is_the_cpu_backend() -> None:
    assert chosen_backend("linear_codes", "cpu").name == "cpu"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_the_default_elsewhere_is_the_first_that_runs_there(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", {name: BACKENDS[name] for name in ("cpu", "reference")})
    assert chosen_backend("linear_codes", device).name == "reference"


def test_the_default_passes_over_a_backend_that_lacks_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    add_backend(monkeypatch, "poor", ("cpu",))
    monkeypatch.setattr(backends, "BACKENDS", {name: BACKENDS[name] for name in ("poor", "reference")})
    assert chosen_backend("attention", "cpu").name == "reference"


@pytest.mark.parametrize("op", ops.OPS)
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_reference_and_cpu_have_every_op(name: str, op: str) -> None:
    with use_backend(name):
        assert implementation(op, "cpu") is getattr(BACKENDS[name].load(), op)


def test_use_backend_decides_what_runs(recorder: list[str]) -> None:
    run()
    assert recorder == []
    with use_backend("recorder"):
        run()
    assert recorder == ["quantize"]
    run()
    assert recorder == ["quantize"]


def test_use_backend_nests_and_restores() -> None:
    with use_backend("reference"):
        with use_backend("cpu"):
            assert chosen_backend("attention", "cpu").name == "cpu"
        assert chosen_backend("attention", "cpu").name == "reference"
    assert chosen_backend("attention", "cpu").name == "cpu"


def test_use_backend_restores_after_an_exception() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert chosen_backend("attention", "cpu").name == "cpu"


def test_use_backend_holds_in_its_own_thread_only() -> None:
    seen: dict[str, str] = {}
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(10)
        seen["while the first holds reference"] = chosen_backend("attention", "cpu").name
        with use_backend("cpu"):
            done.set()
            seen["its own"] = chosen_backend("attention", "cpu").name

    thread = threading.Thread(target=other)
    thread.start()
    with use_backend("reference"):
        inside.set()
        assert done.wait(10)
        assert chosen_backend("attention", "cpu").name == "reference"
        thread.join(10)
    assert seen == {"while the first holds reference": "cpu", "its own": "cpu"}


def test_the_environment_variable_decides(recorder: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "recorder")
    run()
    assert recorder == ["quantize"]


def test_use_backend_wins_over_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
    with use_backend("reference"):
        assert chosen_backend("attention", "cpu").name == "reference"


def test_an_empty_environment_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert chosen_backend("attention", "cpu").name == "cpu"


def test_an_unknown_name_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ", ".join(BACKENDS)
    with pytest.raises(ValueError, match=rf"^use_backend must be one of {known}, got 'cudnn'$"), use_backend("cudnn"):
        pass
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cudnn")
    with pytest.raises(ValueError, match=rf"^{ENVIRONMENT_VARIABLE} must be one of {known}, got 'cudnn'$"):
        run()


def test_a_missing_op_raises_and_names_who_has_it(recorder: list[str]) -> None:
    message = r"^vitq::attention on cpu: backend recorder lacks this op; can: cpu, (triton, )?(cuda, )?reference"
    with use_backend("recorder"), pytest.raises(BackendUnavailableError, match=message):
        run("attention")


def test_the_environment_variable_does_not_fall_back_either(
    recorder: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "recorder")
    with pytest.raises(BackendUnavailableError, match="backend recorder lacks this op"):
        run("attention")


def test_a_backend_of_another_device_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    add_backend(monkeypatch, "elsewhere", ("cuda", "xpu"), quantize=None)
    able = "cpu, (triton, )?(cuda, )?reference"
    message = rf"^vitq::quantize on cpu: backend elsewhere runs on cuda and xpu, not on cpu; can: {able}"
    with use_backend("elsewhere"), pytest.raises(BackendUnavailableError, match=message):
        run()


def test_a_backend_that_does_not_import_raises_with_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "broken", Backend("broken", "vitq_kernels.no_such_backend", ()))
    message = (
        r"^vitq::quantize on cpu: backend broken does not load: No module named 'vitq_kernels\.no_such_backend'; "
        r"can: cpu, (triton, )?(cuda, )?reference"
    )
    with use_backend("broken"), pytest.raises(BackendUnavailableError, match=message):
        run()
    with pytest.raises(BackendUnavailableError, match=r"^backend broken does not load: No module") as caught:
        BACKENDS["broken"].load()
    assert isinstance(caught.value.__cause__, ImportError)


def test_the_default_passes_over_a_backend_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Backend("broken", "vitq_kernels.no_such_backend", ())
    monkeypatch.setattr(backends, "BACKENDS", {"broken": broken, "reference": BACKENDS["reference"]})
    assert chosen_backend("quantize", "cpu").name == "reference"


def test_no_backend_at_all_raises_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", {"cpu": BACKENDS["cpu"]})
    with pytest.raises(BackendUnavailableError, match=r"^vitq::quantize on cuda: no backend can: cpu runs on cpu, not"):
        chosen_backend("quantize", "cuda")
    with use_backend("cpu"), pytest.raises(BackendUnavailableError, match=r"not on cuda; can: none$"):
        chosen_backend("quantize", "cuda")


def test_a_bug_inside_a_backend_is_not_taken_for_its_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    def quantize(*arguments: object) -> None:
        raise ImportError("of something else")

    add_backend(monkeypatch, "buggy", ("cpu",), quantize=quantize)
    with use_backend("buggy"), pytest.raises(ImportError, match="of something else"):
        run()


def test_the_weight_layout_is_the_chosen_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [torch.zeros(1)]
    add_backend(
        monkeypatch,
        "rowless",
        ("cpu",),
        linear_codes=None,
        WEIGHT_LAYOUT="rowless_4",
        prepare_weight=lambda weight, input_bits: made,
    )
    with use_backend("rowless"):
        assert ops.weight_layout("cpu") == "rowless_4"
        packed = SimpleNamespace(data=torch.zeros(1, dtype=torch.uint8))
        assert ops.prepare_weight(packed) == ("rowless_4", made)
    assert ops.weight_layout("cpu") == "int8_rows"


def test_the_default_on_a_gpu_is_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["triton"].load(), "unavailable", lambda device: None)
    assert chosen_backend("linear_codes", "cuda").name == "triton"
    assert chosen_backend("linear_codes", "cpu").name == "cpu"


@pytest.mark.parametrize(
    ("interpreted", "capability", "device", "reason"),
    [
        (False, (9, 0), "cuda", None),
        (False, (8, 0), "cuda", None),
        (False, (7, 5), "cuda", "needs compute capability 8.0 or later, this GPU has 7.5"),
        (False, None, "cuda", "finds no GPU"),
        (False, (9, 0), "cpu", "runs on a cpu only in Triton's interpreter, under TRITON_INTERPRET=1"),
        (True, (9, 0), "cuda", "is interpreted in this process, on the cpu (TRITON_INTERPRET)"),
        (True, None, "cpu", None),
    ],
)
def test_triton_says_where_it_does_not_run(
    interpreted: bool,
    capability: tuple[int, int] | None,
    device: str,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = BACKENDS["triton"].load()
    monkeypatch.setattr(module, "INTERPRETED", interpreted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(module, "gpu_reason", module.gpu_reason.__wrapped__)
    assert module.unavailable(device) == reason
    assert BACKENDS["triton"].why_not("attention", device) == reason


def test_an_old_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.2.0")
    for name in [name for name in sys.modules if name.startswith("vitq_kernels.ops.triton")]:
        monkeypatch.delitem(sys.modules, name)
    reason = BACKENDS["triton"].why_not("attention", "cuda")
    assert reason == "does not load: it needs triton 3.4 or later, found 3.2.0"
