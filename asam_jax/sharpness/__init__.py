"""Sharpness measures on the T_w and p of the optimizer.

They take ``loss(params) -> scalar`` and a :class:`asam_jax.Geometry`, such as the one
that an optimizer has. The length of a perturbation is :meth:`asam_jax.Geometry.norm`.
Needs the extra ``asam_jax[sharpness]``.
"""

from asam_jax import _interop

_interop.require("sharpness", "jaxtyping", "scipy")

# ruff: noqa: E402  (after the error that names the extra)
from asam_jax.sharpness._average_case import average_case
from asam_jax.sharpness._average_case import AverageCase
from asam_jax.sharpness._curvature import Eigenpairs
from asam_jax.sharpness._curvature import hessian_eigenvalues
from asam_jax.sharpness._curvature import hessian_trace
from asam_jax.sharpness._curvature import TraceEstimate
from asam_jax.sharpness._data import classification_loss
from asam_jax.sharpness._data import m_sharpness
from asam_jax.sharpness._data import MSharpness
from asam_jax.sharpness._rank import Estimate
from asam_jax.sharpness._rank import rank_correlation
from asam_jax.sharpness._rank import RankCorrelation
from asam_jax.sharpness._worst_case import worst_case
from asam_jax.sharpness._worst_case import WorstCase

__all__ = [
    "AverageCase",
    "Eigenpairs",
    "Estimate",
    "MSharpness",
    "RankCorrelation",
    "TraceEstimate",
    "WorstCase",
    "average_case",
    "classification_loss",
    "hessian_eigenvalues",
    "hessian_trace",
    "m_sharpness",
    "rank_correlation",
    "worst_case",
]
