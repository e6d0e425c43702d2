"""Where other packages meet this one: extras, injected hyperparameters, notes."""

from __future__ import annotations

from collections.abc import Callable
import functools
import importlib.util
import inspect
from typing import Any, NamedTuple, TypeVar

import jax
from jax import tree_util as jtu
import jax.numpy as jnp

Factory = TypeVar("Factory", bound=Callable[..., Any])


def require(module: str, *packages: str) -> None:
  """Raises an ImportError that names the extra unless all packages are installed."""
  extra = "sharpness" if module == "landscape" else module
  missing = [name for name in packages if importlib.util.find_spec(name) is None]
  if missing:
    raise ModuleNotFoundError(
        f"{', '.join(missing)} is missing, which asam_jax.{module} needs beside jax and"
        f" optax; install the extra: pip install 'asam_jax[{extra}]'.",
        name=missing[0],
    )


class _Kept(NamedTuple):
  """A function that is an argument, not a schedule."""

  function: Callable[..., Any]


class _Signature(inspect.Signature):
  """A signature that hands the arguments named here on as they are."""

  kept: tuple[str, ...] = ()

  def bind(self, /, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    bound = super().bind(*args, **kwargs)
    for name in self.kept:
      if callable(bound.arguments.get(name)):
        bound.arguments[name] = _Kept(bound.arguments[name])
    return bound


def keeps(*names: str) -> Callable[[Factory], Factory]:
  """For a factory whose arguments of these names may be functions of leaves.

  ``optax.inject_hyperparams`` takes every callable argument for a schedule and calls
  it with the step count. It sorts the arguments by the factory's signature, so this
  signature wraps those that are no schedules, and the factory unwraps them.
  """

  def decorate(factory: Factory) -> Factory:
    @functools.wraps(factory)
    def unwrapping(*args: Any, **kwargs: Any) -> Any:
      for name, value in kwargs.items():
        kwargs[name] = value.function if isinstance(value, _Kept) else value
      return factory(*args, **kwargs)

    plain = inspect.signature(factory)
    signature = _Signature(
        list(plain.parameters.values()), return_annotation=plain.return_annotation
    )
    signature.kept = names
    setattr(unwrapping, "__signature__", signature)  # noqa: B010
    return unwrapping  # pyright: ignore[reportReturnType]

  return decorate


def explain(error: Exception, params: Any) -> None:
  """Adds a note with the likely mistake to an error out of the user's own function."""
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
