"""What this machine can run: versions, devices, backends and why not."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from vitq_kernels.ops import SEMANTICS_VERSION
from vitq_kernels.ops.backends import BACKENDS

PACKAGES = ("vitq-kernels", "torch", "timm", "triton", "safetensors", "scipy")


def examine() -> dict[str, str]:
    """Findings in the order they are worth reading."""
    findings = {"python": platform.python_version(), "machine": f"{platform.machine()}, {platform.system()}"}
    for package in PACKAGES:
        try:
            findings[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            findings[package] = "not installed"
    findings["semantics version"] = str(SEMANTICS_VERSION)
    findings["CPU int8"] = torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            findings[f"GPU {index}"] = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    else:
        built = torch.version.cuda
        findings["GPU"] = f"none: torch {'finds no usable driver or device' if built else 'is built without CUDA'}"
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for backend in BACKENDS.values():
        state = backend.state()
        if state is not None:
            findings[f"{backend.name} extension"] = state
        for device in devices:
            reason = backend.why_not("linear_codes", device)
            findings[f"backend {backend.name} on {device}"] = "available" if reason is None else f"no: {reason}"
    return findings
