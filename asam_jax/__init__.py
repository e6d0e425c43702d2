"""Sharpness-aware training for JAX: ASAM and its family for Optax."""

import importlib as _importlib
from typing import Any as _Any

from asam_jax._adaptive_sam import adaptive_sam
from asam_jax._adaptive_sam import sam
from asam_jax._aliases import ae_sam
from asam_jax._aliases import friendly_sam
from asam_jax._aliases import gsam
from asam_jax._aliases import looksam
from asam_jax._aliases import vasso
from asam_jax._arguments import is_not_bias
from asam_jax._ascent import ascent
from asam_jax._ascent import AscentState
from asam_jax._carried import carried
from asam_jax._carried import CarriedState
from asam_jax._carried import eval_params
from asam_jax._carried import momentum_sam
from asam_jax._carried import MomentumAscentState
from asam_jax._combined import combined
from asam_jax._combined import iterated
from asam_jax._combined import renormalized
from asam_jax._combined import subtract_ema
from asam_jax._combined import SubtractEmaState
from asam_jax._combined import surrogate_gap
from asam_jax._describe import describe
from asam_jax._describe import Description
from asam_jax._describe import LeafDescription
from asam_jax._functional import functional_value_and_grad
from asam_jax._geometry import elementwise
from asam_jax._geometry import filterwise
from asam_jax._geometry import Geometry
from asam_jax._geometry import layerwise
from asam_jax._info import AscentInfo
from asam_jax._microbatched import microbatched
from asam_jax._radius import auto_radius
from asam_jax._radius import AutoRadiusState
from asam_jax._radius import loss_budget
from asam_jax._radius import Observed
from asam_jax._radius import RadiusRule
from asam_jax._radius import rise_radius
from asam_jax._skip_nonfinite import skip_nonfinite
from asam_jax._skip_nonfinite import SkipNonfiniteState
from asam_jax._sometimes import above_average
from asam_jax._sometimes import AboveAverageState
from asam_jax._sometimes import Gate
from asam_jax._sometimes import late
from asam_jax._sometimes import sometimes
from asam_jax._sometimes import SometimesState
from asam_jax._stochastic_rounding import stochastic_rounding
from asam_jax._stochastic_rounding import StochasticRoundingState
from asam_jax._two_passes import perturbed_gradient
from asam_jax._two_passes import PerturbedGradientState
from asam_jax._value_and_grad import grad
from asam_jax._value_and_grad import value_and_grad
from asam_jax._verdict import radius_verdict
from asam_jax._verdict import RadiusVerdict

__version__ = "0.2.0"  # setup.cfg reads it, without importing JAX

__all__ = [
    "AboveAverageState",
    "AscentInfo",
    "AscentState",
    "AutoRadiusState",
    "CarriedState",
    "Description",
    "Gate",
    "Geometry",
    "LeafDescription",
    "MomentumAscentState",
    "Observed",
    "PerturbedGradientState",
    "RadiusRule",
    "RadiusVerdict",
    "SkipNonfiniteState",
    "SometimesState",
    "StochasticRoundingState",
    "SubtractEmaState",
    "__version__",
    "above_average",
    "adaptive_sam",
    "ae_sam",
    "ascent",
    "auto_radius",
    "carried",
    "combined",
    "describe",
    "elementwise",
    "eval_params",
    "filterwise",
    "friendly_sam",
    "functional_value_and_grad",
    "grad",
    "gsam",
    "is_not_bias",
    "iterated",
    "late",
    "layerwise",
    "looksam",
    "loss_budget",
    "microbatched",
    "momentum_sam",
    "perturbed_gradient",
    "radius_verdict",
    "renormalized",
    "rise_radius",
    "sam",
    "skip_nonfinite",
    "sometimes",
    "stochastic_rounding",
    "subtract_ema",
    "surrogate_gap",
    "value_and_grad",
    "vasso",
]

# Imported at their first use, for they need more than jax and optax.
_LAZY = ("landscape", "nnx", "sharpness")


def __getattr__(name: str) -> _Any:
  if name not in _LAZY:
    raise AttributeError(f"module 'asam_jax' has no attribute {name!r}")
  return _importlib.import_module(f"asam_jax.{name}")


def __dir__() -> list[str]:
  return sorted([*globals(), *_LAZY])
