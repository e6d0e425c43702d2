"""The one place that checks arguments; each error names argument, value and remedy.

A check returns the argument, so that it can stand where the argument is used.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import math
import re
from typing import Any

import jax
from jax import tree_util as jtu
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np
import optax


def dtype_of(leaf: Any) -> Any:
  """The dtype of an array, a ShapeDtypeStruct or a Python number."""
  return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def is_float(leaf: Any) -> bool:
  """Whether it is a real floating point leaf; float0 and integers are not."""
  dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
  return jnp.issubdtype(dtype, jnp.floating)


def real(argument: str, value: Any) -> Any:
  """Raises unless it is one real number or 0-d array, traced ones included."""
  number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
  array = isinstance(value, (jax.Array, np.ndarray)) and jnp.ndim(value) == 0
  if not (number or array) or not (
      is_float(value) or jnp.issubdtype(dtype_of(value), jnp.integer)
  ):
    raise TypeError(f"{argument}={_shown(value)} must be one real number.")
  return value


def scalar(argument: str, value: Any, low: float = 0, high: float = math.inf) -> Any:
  """Raises unless it is such a number in [low, high); a traced one becomes NaN."""
  real(argument, value)
  if not is_concrete(value):
    fits = (value >= low) & (value > -math.inf) & (value < high)
    return jnp.where(fits, value, math.nan)
  if not (math.isfinite(float(value)) and low <= float(value) < high):
    at_least = f" >= {low}" if low > -math.inf else ""
    below = f" and < {high}" if high < math.inf else ""
    raise ValueError(
        f"{argument}={_shown(value)} must be a finite number{at_least}{below}."
    )
  return value


def scalar_or_schedule(argument: str, value: Any, low: float = 0) -> Any:
  """Raises unless it is such a number or a schedule, whose results are checked too."""
  if not callable(value):
    return scalar(argument, value, low)

  def checked(count):
    return scalar(f"{argument}({count})", value(count), low)

  return checked


def fixed_scalar(argument: str, value: Any) -> Any:
  """Raises unless it is such a number, for a measure has no step count."""
  if callable(value):
    raise TypeError(
        f"{argument}={_shown(value)} is a schedule, but a measure has no step count;"
        " pass its value at one step (of a geometry, geometry.at(step))."
    )
  return scalar(argument, value)


def positive(argument: str, value: Any) -> Any:
  """Raises unless it is a number in (0, inf)."""
  if is_concrete(scalar(argument, value)) and not float(value) > 0:
    raise ValueError(f"{argument}={_shown(value)} must be > 0.")
  return value


def exponent(p: Any) -> Any:
  """Raises unless p is a number in [1, inf]."""
  if isinstance(p, (bool, complex)) or not isinstance(p, (int, float, np.number)):
    raise TypeError(
        f"p={_shown(p)} must be a Python number, because it decides what is compiled;"
        ' under optax.inject_hyperparams pass static_args=("p",).'
    )
  if not float(p) >= 1:
    raise ValueError(f"p={p!r} must be in [1, inf]; use float('inf') for inf.")
  return p


def count(argument: str, value: Any, least: int = 1) -> int:
  """Raises unless it is an int of at least ``least``."""
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
    static = (
        f', no array; under optax.inject_hyperparams pass static_args=("{argument}",)'
        if isinstance(value, jax.Array) else ""
    )
    raise TypeError(f"{argument}={_shown(value)} must be an int >= {least}{static}.")
  if value < least:
    raise ValueError(f"{argument}={value!r} must be an int >= {least}.")
  return int(value)


def argnums(numbers: Any) -> Any:
  """Raises unless they are the numbers of positional arguments."""
  each: Any = numbers if isinstance(numbers, (tuple, list)) and numbers else [numbers]
  if any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) for n in each):
    raise TypeError(
        f"argnums={_shown(numbers)} must be an int or a sequence of ints, the numbers"
        " of positional arguments. The radius is given by name: rho=0.5."
    )
  return tuple(int(n) for n in each) if each is numbers else int(each[0])


def flag(argument: str, value: Any) -> bool:
  """Raises unless it is True or False."""
  if not isinstance(value, (bool, np.bool_)):
    raise TypeError(f"{argument}={_shown(value)} must be True or False.")
  return bool(value)


def float_type(argument: str, value: Any) -> Any:
  """Raises unless it names a real floating point type; None is none."""
  try:
    known = value is None or jnp.issubdtype(value, jnp.floating)
  except TypeError:  # NumPy's, of what names no type
    known = False
  if not known:
    raise TypeError(f"{argument}={_shown(value)} must be a real float type, or None.")
  return value


def function(argument: str, value: Any, form: str) -> Any:
  """Raises unless it can be called; ``form`` says how it will be."""
  if not callable(value):
    raise TypeError(f"{argument}={_shown(value)} must be a function {form}.")
  return value


def one_of(argument: str, value: Any, choices: tuple[str, ...]) -> str:
  """Raises unless it is one of the names."""
  if not isinstance(value, str) or value not in choices:
    names = ", ".join(map(repr, choices))
    raise ValueError(f"{argument}={_shown(value)} is unknown; use one of {names}.")
  return value


def instance(argument: str, value: Any, kind: type) -> Any:
  """Raises unless it is an object of that class."""
  if not isinstance(value, kind):
    raise TypeError(f"{argument}={_shown(value)} must be a {kind.__name__}.")
  return value


def random_key(key: Any) -> jax.Array:
  """Raises unless it is one random key; None is ``jax.random.key(0)``."""
  return jax.random.key(0) if key is None else one_key(key)


def one_key(key: Any) -> jax.Array:
  """Raises unless it is one random key."""
  dtype = getattr(key, "dtype", None)
  typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
  raw = dtype == jnp.uint32 and jnp.ndim(key) == 1
  if not raw and not (typed and jnp.ndim(key) == 0):
    raise TypeError(f"key={_shown(key)} must be one random key: jax.random.key(seed).")
  return key


def loss(fun: Any) -> Callable[[Any], Any]:
  """Raises unless it can be called; the one returned checks its values, too."""
  function("loss", fun, "of the parameters that returns one real number")
  return real_valued("loss(params)", fun)


def real_valued(call: str, fun: Any, has_aux: bool = False) -> Callable[..., Any]:
  """The function, which raises unless it returns one real number (and aux)."""

  @functools.wraps(fun)
  def checked(*args, **kwargs):
    result = fun(*args, **kwargs)
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
      raise TypeError(
          f"{call} returned {_shown(result)}; with has_aux=True it must return a pair"
          " (value, aux)."
      )
    value = result[0] if has_aux else result
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape != () or not is_float(value):
      what = f"shape {shape} and dtype {dtype}" if dtype is not None else _shown(value)
      raise TypeError(
          f"{call} returned {what}; it must return one real number as an array, the"
          f" mean over the batch, and {'one' if has_aux else 'no'} aux."
      )
    return result

  return checked


def transformation(
    argument: str, value: Any, example: str
) -> optax.GradientTransformationExtraArgs:
  """Raises unless it is an Optax transformation; the one returned takes extra args."""
  if not (callable(getattr(value, "init", None))
          and callable(getattr(value, "update", None))):
    raise TypeError(
        f"{argument}={_shown(value)} must be an optax.GradientTransformation, such as"
        f" {example}."
    )
  return optax.with_extra_args_support(value)


def tree_like(
    argument: str,
    tree: Any,
    like: Any,
    name: str = "params",
    *,
    same_dtype: bool = False,
    remedy: str = "",
) -> Any:
  """Raises unless it has real arrays with the structure and shapes of another tree."""
  given, wanted = jtu.tree_structure(tree), jtu.tree_structure(like)
  if given != wanted:
    raise TypeError(
        f"{argument} has the structure {given}, but {name} have {wanted}."
        f" {_likely_mistake(tree, wanted)}"
    )
  for (path, x), w in zip(
      jtu.tree_leaves_with_path(tree), jtu.tree_leaves(like), strict=True
  ):
    if not (hasattr(w, "dtype") or isinstance(w, (int, float, complex))):
      raise _no_array(name, path, w)
    dtype = getattr(x, "dtype", type(x) if isinstance(x, (int, float)) else None)
    wanted = getattr(w, "dtype", dtype) if same_dtype else dtype
    if dtype is None or jnp.shape(x) != jnp.shape(w) or (
        is_float(w) and not (is_float(x) and dtype == wanted)
    ):
      raise TypeError(
          f"{argument}{jtu.keystr(path)} has {_kind(x)}, but {name} have {_kind(w)}"
          f" there; {remedy or f'give real arrays of the shapes of {name}.'}"
      )
  return tree


def arrays(argument: str, tree: Any, finite: bool = False) -> Any:
  """Raises unless it is a pytree of real arrays or numbers, with at least one."""
  pairs = jtu.tree_leaves_with_path(tree)
  if not pairs:
    raise TypeError(f"{argument}={_shown(tree)} has no arrays; give a pytree of them.")
  for path, x in pairs:
    if not _is_array(x) or jnp.issubdtype(dtype_of(x), jnp.complexfloating):
      raise TypeError(
          f"{argument}{jtu.keystr(path)} is {_shown(x)}; give a pytree of real arrays."
      )
  concrete = [jnp.asarray(x) for _, x in pairs if is_float(x) and is_concrete(x)]
  if finite and not all(bool(jnp.isfinite(x).all()) for x in concrete):
    raise ValueError(f"{argument} has NaN or inf among its numbers; give finite ones.")
  return tree


def all_arrays(argument: str, tree: Any) -> Any:
  """Raises unless all leaves are arrays or numbers."""
  for path, x in jtu.tree_leaves_with_path(tree):
    if not _is_array(x):
      raise _no_array(argument, path, x)
  return tree


def leaves(params: optax.Params, **selections: Any) -> list[tuple[Any, ...]]:
  """(path, leaf, chosen, ...) for each leaf of params, with a bool for each selection.

  ``normalize``, ``perturb`` (or ``over``) is a pytree of bools, a predicate or None.
  """
  pairs, treedef = jtu.tree_flatten_with_path(
      params, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
  )
  for path, w in pairs:
    if isinstance(w, optax.MaskedNode):
      raise ValueError(
          f"params{jtu.keystr(path)} is a hole (optax.MaskedNode), as under"
          " optax.masked or optax.partition: the norm over the rest would be another"
          " method's. Use the arguments perturb and normalize to choose leaves instead."
      )
    if not (hasattr(w, "dtype") or isinstance(w, (int, float, complex))):
      raise _no_array("params", path, w)
  chosen = {}
  for argument, given in selections.items():
    given = _DEFAULTS[argument] if given is None else given
    # An Equinox module of bools is callable too, so its leaves decide.
    bools = jtu.tree_leaves(given)
    if callable(given) and not all(isinstance(x, bool) for x in bools):
      bools = [given(path, w) for path, w in pairs]
    elif jtu.tree_structure(given) != treedef:
      raise ValueError(
          f"{argument} has the structure {jtu.tree_structure(given)}, but the"
          f" parameters have {treedef}; give a pytree of bools with one bool for"
          " each parameter leaf, or a predicate (path, leaf) -> bool."
      )
    for (path, _), value in zip(pairs, bools, strict=True):
      shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
      of_array = shape == () and dtype == np.bool_ and is_concrete(value)
      if not (isinstance(value, bool) or of_array):
        raise TypeError(
            f"{argument} is {_shown(value)} for {jtu.keystr(path)}; it must be one bool"
            " for every leaf, known when the step is traced."
        )
    chosen[argument] = [bool(value) for value in bools]
  perturb = chosen.get("perturb", [False] * len(pairs))
  for (path, w), perturbed in zip(pairs, perturb, strict=True):
    if perturbed and not is_float(w):
      raise TypeError(
          f"params{jtu.keystr(path)} has dtype {dtype_of(w)}, which can't be perturbed;"
          " leave it out of params or out of perturb. (A Flax NNX module belongs in"
          " asam_jax.nnx.value_and_grad; of an Equinox module take what"
          " eqx.partition(model, eqx.is_inexact_array) gives.)"
      )
  return [
      (path, w, *bools)
      for (path, w), *bools in zip(pairs, *chosen.values(), strict=True)
  ]


# The name of a bias, and how many of its axes may be longer than 1.
_BIASES = (
    (re.compile(r"bias"), 2),  # Flax: [heads, head_dim], or stacked layers
    (re.compile(r"bias_.*"), 1),  # Equinox's GRU; a matrix bias_table is none
    (re.compile(r"b|offset|beta"), 1),  # Haiku; LoRA's matrix b has two
)


def is_not_bias(path: Any, leaf: Any) -> bool:
  """The official rule: every leaf is normalized but the biases.

  A bias is told by its own name and its shape: a leaf named ``bias`` (Flax, Equinox)
  with at most two axes longer than 1, for attention has biases of shape [heads,
  head_dim], and stacked layers [layers, features]; or one named ``bias_...`` (Equinox's
  GRU), ``b``, ``offset`` or ``beta`` (Haiku) with at most one. So the scale of a batch
  norm is normalized and its shift is not; a matrix ``b``, as LoRA has, or
  ``bias_table`` is, and so is a leaf named ``biased_proj``. Leaves without a name
  (lists, tuples) are normalized. ``describe`` shows the outcome.

  Args:
    path: the leaf's key path, as ``jax.tree_util.tree_map_with_path`` gives it.
    leaf: the leaf: an array, a ``jax.ShapeDtypeStruct`` or a number.

  Returns:
    True if the leaf gets T_w, False if it gets T = 1.

  Raises:
    TypeError: if path is not a tuple of JAX's keys.

  Examples:
    >>> import jax
    >>> from asam_jax import is_not_bias
    >>> params = {"conv": {"kernel": 1.0, "bias": 0.0}}
    >>> print(jax.tree_util.tree_map_with_path(is_not_bias, params))
    {'conv': {'bias': False, 'kernel': True}}
  """
  # Keys of registered classes may be of any type, but are no plain values.
  plain = (str, int, float, type(None))
  if not isinstance(path, (tuple, list)) or any(isinstance(k, plain) for k in path):
    raise TypeError(
        f"path={path!r} must be a key path, as jax.tree_util.tree_map_with_path gives;"
        " if a predicate came to be called as a schedule, by optax.inject_hyperparams,"
        ' pass static_args=("normalize", "perturb", "normalization") there.'
    )
  if not hasattr(leaf, "shape") and not isinstance(leaf, (int, float, complex)):
    raise TypeError(f"leaf={_shown(leaf)} must be an array or a number.")
  name = ""
  for key in path:  # the last name counts, without the wrappers that NNX puts behind
    own = getattr(key, "key", getattr(key, "name", None))
    wrapper = own in ("value", "raw_value") or isinstance(key, jtu.FlattenedIndexKey)
    name = name if wrapper else own if isinstance(own, str) else ""
  long_axes = sum(n > 1 for n in getattr(leaf, "shape", ()))
  return not any(
      pattern.fullmatch(name) and long_axes <= most for pattern, most in _BIASES
  )


_DEFAULTS = {"normalize": is_not_bias, "perturb": lambda path, leaf: True}


def is_concrete(value: Any) -> bool:
  """Whether its value can be looked at now: not traced, not on other hosts alone."""
  traced = isinstance(value, Tracer)
  return not traced and getattr(value, "is_fully_addressable", True)


def _is_array(x: Any) -> bool:
  return hasattr(x, "dtype") or isinstance(x, (int, float, complex))


def _no_array(argument: str, path: Any, x: Any) -> TypeError:
  return TypeError(
      f"{argument}{jtu.keystr(path)} is {_shown(x)}, which is no array; give a pytree"
      " of arrays. Of an Equinox module, differentiate the first part of"
      " eqx.partition(model, eqx.is_inexact_array)."
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


def _kind(leaf: Any) -> str:
  if not _is_array(leaf):
    return _shown(leaf)
  return f"shape {jnp.shape(leaf)} and dtype {dtype_of(leaf)}"


def _shown(value: Any) -> str:
  """The value's repr, short enough for a message."""
  text = repr(value)
  return text if len(text) <= 200 else f"{text[:200]}..."


