"""Who runs an op: one table of backends, and the choice among them. No silent fallback."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

ENVIRONMENT_VARIABLE = "VITQ_BACKEND"


class BackendUnavailableError(RuntimeError):
    """The chosen backend cannot run the op; the message names op, arguments, backend and who can."""


@dataclass(frozen=True)
class Backend:
    """An implementation of the ops: a module with one function per op, under the op's name.

    A module that cannot run on every device of a type has ``unavailable(device)``: why not, or None.
    """

    name: str
    module: str  # imported on first use
    devices: tuple[str, ...]  # device types it runs on; empty: any

    def load(self) -> ModuleType:
        """The module; raises BackendUnavailableError with the cause when it does not import."""
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            raise BackendUnavailableError(f"backend {self.name} does not load: {error}") from error

    def state(self) -> str | None:
        """What there is to say of its compiled part, for ``vitq doctor``; None where it has none."""
        try:
            module = self.load()
        except BackendUnavailableError:
            return None  # why_not says why
        found: str | None = module.state() if hasattr(module, "state") else None
        return found

    def why_not(self, op: str, device: str) -> str | None:
        """Why this backend cannot run ``op`` on a device type, or None if it can."""
        if self.devices and device not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device}"
        try:
            module = self.load()
        except BackendUnavailableError as error:
            return f"does not load: {error.__cause__}"
        reason: str | None = module.unavailable(device) if hasattr(module, "unavailable") else None
        return reason if reason or hasattr(module, op) else "lacks this op"


# In order of preference where nothing is asked for.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", "vitq_kernels.ops.cpu", ("cpu",)),
        Backend("triton", "vitq_kernels.ops.triton", ("cuda", "cpu")),
        Backend("cuda", "vitq_kernels.ops.cuda", ("cuda", "cpu")),  # after triton until a GPU has compared them
        Backend("reference", "vitq_kernels.ops.reference", ()),
    )
}

_chosen: ContextVar[str | None] = ContextVar("vitq_backend", default=None)


def _named(name: str, source: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return BACKENDS[name]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every vitq op inside the ``with`` block on the named backend.

    Raises:
        ValueError: no backend has that name.
    """
    token = _chosen.set(_named(name, "use_backend").name)
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen_backend(op: str, device: str) -> Backend:
    """The backend that runs ``op`` on a device type: use_backend, VITQ_BACKEND, else the first that can.

    Raises:
        BackendUnavailableError: the chosen one cannot, or none can.
    """
    name, source = _chosen.get(), "use_backend"
    if name is None:
        name, source = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
    if name is None:
        reasons = {}
        for backend in BACKENDS.values():
            reason = backend.why_not(op, device)
            if reason is None:
                return backend
            reasons[backend.name] = reason
        raise BackendUnavailableError(
            f"vitq::{op} on {device}: no backend can: " + "; ".join(f"{n} {r}" for n, r in reasons.items())
        )
    backend = _named(name, source)
    reason = backend.why_not(op, device)
    if reason is not None:
        able = ", ".join(b.name for b in BACKENDS.values() if b.why_not(op, device) is None)
        raise BackendUnavailableError(f"vitq::{op} on {device}: backend {name} {reason}; can: {able or 'none'}")
    return backend


def implementation(op: str, device: str, layout: str | None = None) -> Callable[..., Any]:
    """The function that runs ``op`` on a device type, on a weight in ``layout`` if it has one.

    Raises:
        BackendUnavailableError: as ``chosen_backend``, or the backend reads another layout: a compiled or exported
            model holds its weights in that of the backend in force when it was made.
    """
    backend = chosen_backend(op, device)
    module = backend.load()
    if layout is not None and layout != module.WEIGHT_LAYOUT:
        able = [b.name for b in BACKENDS.values() if not b.why_not(op, device) and layout == b.load().WEIGHT_LAYOUT]
        raise BackendUnavailableError(
            f"vitq::{op} on {device}: backend {backend.name} reads weights in layout {module.WEIGHT_LAYOUT}, "
            f"got {layout}; can: {', '.join(able) or 'none'}"
        )
    function: Callable[..., Any] = getattr(module, op)
    return function


@torch.compiler.assume_constant_result
def weight_layout(device: str) -> str:
    """Name of the weight layout that linear ops read on a device type; fixed when a graph is compiled."""
    layout: str = chosen_backend("linear_codes", device).load().WEIGHT_LAYOUT
    return layout
