"""LRP rules as functions whose backward is the rule: what autograd carries from outputs to inputs is relevance."""

from __future__ import annotations

from vitq_kernels.lrp_attnlrp import ATTNLRP
from vitq_kernels.lrp_chefer import CHEFER

COMPOSITES = {composite.name: composite for composite in (ATTNLRP, CHEFER)}
