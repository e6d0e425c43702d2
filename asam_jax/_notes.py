"""Notes on errors that come out of the user's own functions: the likely mistake."""

from typing import Any

import jax
from jax import tree_util as jtu
import jax.numpy as jnp


def explain(error: Exception, params: Any) -> None:
  """Adds what is known about the call to the error, for Python to print below it."""
  text = str(error)
  for applies, note in (
      (_is_flat, _FLAT),
      (_is_nnx, _NNX),
      (_is_module, _MODULE),
      (lambda params: "positional argument" in text, _ARGUMENTS),
  ):
    if applies(params) and note not in getattr(error, "__notes__", ()):
      error.add_note(note)


_FLAT = (
    "The parameters came as one array of rank 1. If that is the doing of"
    " optax.flatten, put it inside, around the base optimizer: the normalization needs"
    " the leaves, and so do the arguments perturb and normalize."
)
_NNX = (
    "The parameters are those of a Flax NNX module: use asam_jax.nnx.value_and_grad in"
    " place of asam_jax.value_and_grad, or pass asam_jax.nnx.grad_fn(loss_fn, model,"
    " batch) as grad_fn, made before the forward pass. nnx.Optimizer gives the"
    " function an nnx.State, not the module."
)
_MODULE = (
    "The parameters have leaves that are no float arrays, as an Equinox or NNX module"
    " has. Differentiate the floats only: params, static = eqx.partition(model,"
    " eqx.is_inexact_array) with eqx.combine inside the loss, or for Flax NNX use"
    " asam_jax.nnx.value_and_grad."
)
_ARGUMENTS = (
    "grad_fn and value_fn are called with the parameters alone: grad_fn(params). If"
    " yours takes a step index, grad_fn(params, i), as optax.contrib.sam wants it,"
    " leave out the missing i."
)


def _is_flat(params: Any) -> bool:
  return isinstance(params, jax.Array) and params.ndim == 1


def _is_nnx(params: Any) -> bool:
  return type(params).__module__.startswith("flax.nnx") or _class_from(params, "nnx")


def _class_from(params: Any, package: str) -> bool:
  return any(package in base.__module__.split(".") for base in type(params).__mro__)


def _is_module(params: Any) -> bool:
  def is_float(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)

  return not _is_nnx(params) and not all(map(is_float, jtu.tree_leaves(params)))
