"""Perturbations of parameters that are too coarse for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import tree_util as jtu
import jax.numpy as jnp
import numpy as np
import optax

from asam_jax import _arguments


class StochasticRoundingState(NamedTuple):
  """State of :func:`stochastic_rounding`.

  Attributes:
    key: the random key of the next step.
  """

  key: jax.Array


def stochastic_rounding(
    key: jax.Array | int,
) -> optax.GradientTransformationExtraArgs:
  r"""Rounds w + epsilon at random, so that a small epsilon is not lost on average.

  bfloat16 has 8 significant bits, and so w + epsilon rounds back to w wherever
  :math:`|\epsilon| < 2^{-9} |w|`, roughly: of a million normal weights with standard
  deviation 0.05, SAM with rho = 0.05 moves 22 %, and 52 % of the perturbation along
  the gradient arrives (``kept_share`` in :class:`asam_jax.AscentInfo`). This link
  goes behind the ascent and replaces epsilon by a perturbation that ends on one of
  the two neighbors of w + epsilon in the leaf's dtype, drawn so that

  .. math:: \mathbb{E}[\hat w] = w + \epsilon

  The perturbation is longer than epsilon, by the noise of the rounding, but its
  mean and so its effect on the gradient to first order are right. (Where the noise
  is longer than epsilon, curvature takes some: on a small network, of what SAM with
  rho = 0.02 adds to the gradient, 93 % arrives, and 77 % with rounding to nearest.)
  Leaves in float32 or wider pass through. float32 parameters that the model casts
  to bfloat16 itself need nothing of this: w + epsilon is exact, and the errors of
  the cast are as good as random.

  Cost: a random number per parameter; memory: a key.

  Args:
    key: a random key, or an integer to make one from.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` with state
    :class:`StochasticRoundingState`. Its update needs ``params``; in the result,
    leaves of less than 32 bits are float32, so that ``optax.apply_updates`` ends
    exactly on the neighbor.

  Raises:
    ValueError: in ``update``, without params.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> import asam_jax
    >>> ascent_tx = optax.chain(
    ...     asam_jax.ascent(rho=0.01), asam_jax.stochastic_rounding(0))
    >>> tx = optax.chain(asam_jax.perturbed_gradient(ascent_tx), optax.sgd(0.1))
    >>> w = jnp.ones(10_000, jnp.bfloat16)  # the next number is 1.0078
    >>> link = asam_jax.stochastic_rounding(0)
    >>> epsilon, _ = link.update(jnp.full_like(w, 0.001), link.init(w), w)
    >>> print(f"{jnp.mean(epsilon):.4f} {jnp.mean(epsilon > 0):.2f}")
    0.0010 0.13
  """
  is_seed = isinstance(key, (int, np.integer)) and not isinstance(key, bool)
  first = jax.random.PRNGKey(key) if is_seed else _arguments.one_key(key)

  def init_fn(params):
    del params
    return StochasticRoundingState(jnp.array(first, copy=True))

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(
          "params=None: the rounding is that of params + perturbation; call"
          " update(epsilon, state, params)."
      )
    _arguments.tree_like("the perturbation", updates, params)
    next_key, key = jax.random.split(state.key)
    leaves, treedef = jtu.tree_flatten(updates)
    keys = jax.random.split(key, len(leaves))
    rounded = [
        _round(k, w, e)
        for k, w, e in zip(keys, jtu.tree_leaves(params), leaves, strict=True)
    ]
    return jtu.tree_unflatten(treedef, rounded), StochasticRoundingState(next_key)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _round(key: jax.Array, w: jax.Array, epsilon: Any) -> jax.Array:
  """The move from w to a random neighbor of w + epsilon in w's dtype."""
  w = jnp.asarray(w)
  coarse = jnp.issubdtype(w.dtype, jnp.floating) and jnp.finfo(w.dtype).bits < 32
  if not coarse:
    return epsilon
  start = w.astype(jnp.float32)
  target = start + jnp.asarray(epsilon, jnp.float32)
  steps = target / (unit := _spacing(target, w.dtype))
  below = jnp.floor(steps)
  up = jax.random.uniform(key, w.shape) < steps - below
  return (below + up) * unit - start


def _spacing(x: jax.Array, dtype: Any) -> jax.Array:
  """The distance of neighboring numbers of ``dtype`` around x, a power of two."""
  kind, wide = jnp.finfo(dtype), jnp.finfo(jnp.float32)
  _, exponent = jnp.frexp(x)  # |x| = 0.5 to 1, times 2^exponent
  # Below the normal numbers the distance is constant; here it stays one itself.
  lowest = max(int(kind.minexp), int(wide.minexp) + int(kind.nmant))
  return jnp.ldexp(jnp.float32(1), jnp.maximum(exponent - 1, lowest) - kind.nmant)
