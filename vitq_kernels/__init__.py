"""vitq-kernels: Vision Transformers on low-bit integer arithmetic.

::

    scores = vitq.relevance(model, images)
    bits = vitq.allocate(model, scores, vitq.Budget(mean_weight_bits=4), images=images)
    qmodel = vitq.quantize(model, images, bits)
    vitq.save(qmodel, "vit.safetensors")
"""

from vitq_kernels.calibration import CalibrationStats, Calibrator, calibrate
from vitq_kernels.capture import CapturedModel, capture
from vitq_kernels.checkpoint import CheckpointError, load, save
from vitq_kernels.compare import compare
from vitq_kernels.config import QuantConfig
from vitq_kernels.convert import quantize
from vitq_kernels.evaluation import Evaluation, evaluate
from vitq_kernels.models import UnsupportedModelError, model_sites
from vitq_kernels.nn import fuse_layernorm
from vitq_kernels.ops import SEMANTICS_VERSION, BackendUnavailableError, use_backend
from vitq_kernels.planning import allocate
from vitq_kernels.presets import simulate
from vitq_kernels.relevance import Relevance, relevance
from vitq_kernels.replace import replace_linears
from vitq_kernels.rotation import rotate
from vitq_kernels.sensitivity import Sensitivity
from vitq_kernels.sensitivity_runs import sensitivity
from vitq_kernels.spec import BitAllocation, Budget, RowGroups, Site, SiteBits

__version__ = "0.1.0"

__all__ = [
    "SEMANTICS_VERSION",
    "BackendUnavailableError",
    "BitAllocation",
    "Budget",
    "CalibrationStats",
    "Calibrator",
    "CapturedModel",
    "CheckpointError",
    "Evaluation",
    "QuantConfig",
    "Relevance",
    "RowGroups",
    "Sensitivity",
    "Site",
    "SiteBits",
    "UnsupportedModelError",
    "allocate",
    "calibrate",
    "capture",
    "compare",
    "evaluate",
    "fuse_layernorm",
    "load",
    "model_sites",
    "quantize",
    "relevance",
    "replace_linears",
    "rotate",
    "save",
    "sensitivity",
    "simulate",
    "use_backend",
]
