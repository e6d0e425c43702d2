"""The errors: each names the argument, its value and what to do."""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax import tree_util as jtu
import jax.numpy as jnp
import numpy as np
import optax

from asam_jax import _normalization as _n


def dtype_of(leaf: Any) -> Any:
  """The dtype of an array, a ShapeDtypeStruct or a Python number."""
  return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def scalar(argument: str, value: Any) -> None:
  """Raises for a rho or eta that is no radius; traced ones can't be checked."""
  if callable(value) or isinstance(value, jax.Array):
    return
  if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
    raise TypeError(
        f"{argument}={value!r} must be a number, a traced scalar or a schedule of"
        " the step count."
    )
  if not 0 <= float(value) < math.inf:
    raise ValueError(f"{argument}={value!r} must be a finite number >= 0.")


def exponent(p: Any) -> None:
  """Raises unless p is a number in [1, inf]."""
  if isinstance(p, bool) or not isinstance(p, (int, float, np.number)):
    raise TypeError(
        f"p={p!r} must be a Python number, because it decides what is compiled;"
        ' under optax.inject_hyperparams pass static_args=("p",).'
    )
  if not float(p) >= 1:
    raise ValueError(f"p={p!r} must be in [1, inf]; use float('inf') for inf.")


def whole(params: optax.Params) -> None:
  leaves = jtu.tree_leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
  if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
    raise ValueError(
        "params have holes (optax.MaskedNode), as under optax.masked or"
        " optax.partition: the norm over the rest would be another method's. Use"
        " the arguments perturb and normalize to choose leaves instead."
    )


def real(rule: _n.LeafRule) -> None:
  dtype = dtype_of(rule.leaf)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
        f"params{jtu.keystr(rule.path)} has dtype {dtype}, which can't be"
        " perturbed; leave it out of params or out of perturb."
    )


def gradient(rule: _n.LeafRule, g: Any) -> None:
  if jnp.shape(g) != jnp.shape(rule.leaf) or not jnp.issubdtype(
      dtype_of(g), jnp.floating
  ):
    raise TypeError(
        f"the gradient at {jtu.keystr(rule.path)} has shape {jnp.shape(g)} and"
        f" dtype {dtype_of(g)}, but the parameter has {jnp.shape(rule.leaf)} and"
        f" {dtype_of(rule.leaf)}; pass the gradient with respect to these params."
    )


def with_note_on_flat(
    grad_fn: Callable[[Any], Any], params: optax.Params
) -> Callable[[Any], Any]:
  """grad_fn, whose errors mention optax.flatten if params are one flat array."""
  if not isinstance(params, jax.Array) or params.ndim != 1:
    return grad_fn

  def explained(point):
    try:
      return grad_fn(point)
    except Exception as error:
      error.add_note(
          f"The parameters came as one array of shape {jnp.shape(params)}. If that is"
          " the doing of optax.flatten, put it inside, around the base optimizer:"
          " the normalization needs the leaves, and so do the arguments perturb and"
          " normalize."
      )
      raise

  return explained


def descent_gradient(grads: Any, params: optax.Params, source: str) -> None:
  """Raises unless ``grads``, which ``source`` returned, is a gradient at params."""
  wanted = jtu.tree_structure(params)
  given = jtu.tree_structure(grads)
  if given != wanted:
    raise TypeError(
        f"{source} returned the structure {given}, but params have {wanted}."
        f" {_likely_mistake(grads, wanted)}"
    )
  for (path, w), g in zip(
      jtu.tree_leaves_with_path(params), jtu.tree_leaves(grads), strict=True
  ):
    if not jnp.issubdtype(dtype_of(w), jnp.floating):
      continue  # not differentiated; JAX stands in a float0 for its gradient
    if jnp.shape(g) != jnp.shape(w) or dtype_of(g) != dtype_of(w):
      raise TypeError(
          f"{source} returned shape {jnp.shape(g)} and dtype {dtype_of(g)} for"
          f" params{jtu.keystr(path)}, which has {jnp.shape(w)} and"
          f" {dtype_of(w)}; return the gradient with respect to params, cast to"
          " their dtypes."
      )


def _likely_mistake(grads: Any, wanted: Any) -> str:
  if isinstance(grads, tuple) and len(grads) == 2:
    if jtu.tree_structure(grads[0]) == wanted:
      return (
          "It looks like (gradient, aux), as jax.grad(..., has_aux=True) gives;"
          " return the gradient alone."
      )
    if jtu.tree_structure(grads[1]) == wanted:
      return (
          "It looks like (value, gradient), as jax.value_and_grad gives; return"
          " the gradient alone, or pass the loss as value_fn."
      )
  return "Return the gradient with respect to params."
