"""Sharpness-aware training for JAX: ASAM and its family for Optax."""

from asam_jax._ascent import ascent
from asam_jax._ascent import AscentState
from asam_jax._autodiff import grad
from asam_jax._autodiff import value_and_grad
from asam_jax._carried import carried
from asam_jax._carried import CarriedState
from asam_jax._carried import eval_params
from asam_jax._carried import momentum_sam
from asam_jax._metrics import AscentInfo
from asam_jax._microbatch import microbatched
from asam_jax._nonfinite import skip_nonfinite
from asam_jax._nonfinite import SkipNonfiniteState
from asam_jax._normalization import describe
from asam_jax._normalization import Description
from asam_jax._normalization import elementwise
from asam_jax._normalization import filterwise
from asam_jax._normalization import is_not_bias
from asam_jax._normalization import layerwise
from asam_jax._normalization import LeafDescription
from asam_jax._periodic import above_average
from asam_jax._periodic import AboveAverageState
from asam_jax._periodic import Gate
from asam_jax._periodic import sometimes
from asam_jax._periodic import SometimesState
from asam_jax._precision import stochastic_rounding
from asam_jax._precision import StochasticRoundingState
from asam_jax._transform import adaptive_sam
from asam_jax._transform import perturbed_gradient
from asam_jax._transform import PerturbedGradientState
from asam_jax._transform import sam
from asam_jax._variants import combined
from asam_jax._variants import iterated
from asam_jax._variants import subtract_ema
from asam_jax._variants import SubtractEmaState
from asam_jax._variants import surrogate_gap
from asam_jax._version import __version__

__all__ = [
    "AboveAverageState",
    "AscentInfo",
    "AscentState",
    "CarriedState",
    "Description",
    "Gate",
    "LeafDescription",
    "PerturbedGradientState",
    "SkipNonfiniteState",
    "SometimesState",
    "StochasticRoundingState",
    "SubtractEmaState",
    "__version__",
    "above_average",
    "adaptive_sam",
    "ascent",
    "carried",
    "combined",
    "describe",
    "elementwise",
    "eval_params",
    "filterwise",
    "grad",
    "is_not_bias",
    "iterated",
    "layerwise",
    "microbatched",
    "momentum_sam",
    "perturbed_gradient",
    "sam",
    "skip_nonfinite",
    "sometimes",
    "stochastic_rounding",
    "subtract_ema",
    "surrogate_gap",
    "value_and_grad",
]
