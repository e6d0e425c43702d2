"""Sharpness-aware training for JAX: ASAM and its family for Optax."""

from asam_jax._ascent import ascent
from asam_jax._ascent import AscentState
from asam_jax._autodiff import AscentInfo
from asam_jax._autodiff import grad
from asam_jax._autodiff import value_and_grad
from asam_jax._carried import carried
from asam_jax._carried import CarriedState
from asam_jax._carried import eval_params
from asam_jax._carried import momentum_sam
from asam_jax._normalization import describe
from asam_jax._normalization import Description
from asam_jax._normalization import elementwise
from asam_jax._normalization import filterwise
from asam_jax._normalization import is_not_bias
from asam_jax._normalization import layerwise
from asam_jax._normalization import LeafDescription
from asam_jax._transform import adaptive_sam
from asam_jax._transform import perturbed_gradient
from asam_jax._transform import PerturbedGradientState
from asam_jax._transform import sam
from asam_jax._version import __version__

__all__ = [
    "AscentInfo",
    "AscentState",
    "CarriedState",
    "Description",
    "LeafDescription",
    "PerturbedGradientState",
    "__version__",
    "adaptive_sam",
    "ascent",
    "carried",
    "describe",
    "elementwise",
    "eval_params",
    "filterwise",
    "grad",
    "is_not_bias",
    "layerwise",
    "momentum_sam",
    "perturbed_gradient",
    "sam",
    "value_and_grad",
]
