"""The ascent: from a gradient to the perturbation. The only home of the formula."""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import tree_util as jtu
import jax.numpy as jnp
import optax

from asam_jax import _arguments
from asam_jax import _geometry as _g
from asam_jax._leaves import Leaves
from asam_jax._varying import vary_as


class AscentState(NamedTuple):
  """State of :func:`ascent`.

  Attributes:
    count: the number of steps taken, an int32 scalar; schedules are read at it.
    sharpness: the first-order sharpness rho ||T_w g||_q of the last step, in the
      unit of the loss: a float32 scalar (float64 if a parameter is).
  """

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
  sharpness: jax.Array
  dual_norm: jax.Array


def ascent(
    rho: optax.ScalarOrSchedule = 0.5,
    eta: optax.ScalarOrSchedule = 0.01,
    p: float = 2,
    *,
    normalization: _g.Normalization = "elementwise",
    normalize: _g.LeafSelection | None = None,
    perturb: _g.LeafSelection | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""The perturbation of ASAM as a link: gradient in, perturbation out.

  For :math:`1/p + 1/q = 1` and a gradient :math:`g`, it returns

  .. math::

    \hat\epsilon = \rho \, T_w \, \mathrm{sign}(g)
      \left(\frac{|T_w g|}{\|T_w g\|_q}\right)^{q-1},

  the maximizer of :math:`\langle g, \epsilon\rangle` subject to
  :math:`\|T_w^{-1}\epsilon\|_p \le \rho`. The norm is global, over the whole
  pytree. At p = 2 this is :math:`\rho T_w^2 g / \|T_w g\|_2`, at p = inf
  :math:`\rho T_w \mathrm{sign}(g)`, and at p = 1 all of rho goes to the (first)
  weight with the largest :math:`|T_w g|`.

  Sums run in float32 at least. A zero gradient gives a zero perturbation. NaN or
  inf in the gradient gives NaN in the perturbation.

  The sign is that of ascent: the result is to be *added* to the parameters.

  Args:
    rho: the radius of the perturbation, >= 0, in the unit of ``T_w^{-1} w``
      (none, for the elementwise T_w): a number, a traced scalar, or a schedule of
      the step count.
    eta: the stabilizer, >= 0, added to the diagonal of T_w, in the unit of the
      weights; the same types as rho. The official code's class has 0.01, its
      script for CIFAR 0.
    p: the norm's exponent, a number in [1, inf].
    normalization: the operator T_w: ``"elementwise"``, ``"filterwise"``,
      ``"layerwise"``, ``"none"`` (T = 1, plain SAM), or a function
      ``(w, eta) -> T`` of one leaf (in float32 at least), whose result broadcasts
      to the leaf.
    normalize: the leaves that get T_w, a pytree of bools or a predicate
      ``(path, leaf) -> bool`` with JAX's key paths; the others get T = 1. By
      default every leaf but biases (:func:`asam_jax.is_not_bias`).
    perturb: the leaves that are perturbed at all, given likewise; by default all.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` with state :class:`AscentState`.
    Its update needs ``params``; the result has their structure and dtypes.

  Raises:
    ValueError: if rho or eta is negative or not finite, p is below 1, the operator
      is unknown, or (in ``update``) params are missing.
    TypeError: if p is no Python number or (in ``init`` and ``update``) a perturbed
      leaf is not a real float array.

  Examples:
    >>> import jax.numpy as jnp
    >>> import asam_jax
    >>> params = {"kernel": jnp.array([2.0, 0.5]), "bias": jnp.array([0.0])}
    >>> grads = {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([0.0])}
    >>> tx = asam_jax.ascent(rho=0.1, eta=0.0)
    >>> epsilon, state = tx.update(grads, tx.init(params), params)
    >>> print(epsilon["kernel"].tolist())
    [0.1897, 0.0158]
    >>> print(f"{state.sharpness:.4f}")  # rho ||T g||_2 = 0.1 sqrt(6^2 + 2^2)
    0.6325

  References:
    Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for
    Scale-Invariant Learning of Deep Neural Networks
    <https://arxiv.org/abs/2102.11600>`_, 2021

    Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
    Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
  """
  return from_geometry(
      rho, _g.Geometry(eta, p, normalization, normalize, perturb)
  )


def from_geometry(rho, geometry):
  rho = _arguments.scalar_or_schedule("rho", rho)

  def init_fn(params: optax.Params) -> AscentState:
    return AscentState(
        count=jnp.zeros((), jnp.int32),
        sharpness=jnp.zeros((), _g.sum_dtype(geometry.rules(params))),
        dual_norm=jnp.zeros((), _g.sum_dtype(geometry.rules(params))),
    )

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(
          "params=None: the perturbation depends on the parameters; call"
          " update(grads, state, params, ...)."
      )
    epsilon, sharpness = perturbation(
        updates,
        params,
        geometry.at(state.count),
        rho(state.count) if callable(rho) else rho,
    )
    count = None if state.count is None else jnp.asarray(optax.safe_increment(state.count))
    return epsilon, AscentState(count, sharpness.astype(state.sharpness.dtype), geometry.at(state.count).dual_norm(updates, params).astype(state.sharpness.dtype))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def perturbation(
    grads: optax.Updates,
    params: optax.Params,
    geometry: _g.Geometry,
    rho: Any,
) -> tuple[optax.Updates, jax.Array]:
  """The closed form: (epsilon, rho ||T_w g||_q)."""
  rules = geometry.rules(params)
  _arguments.tree_like("the gradient", grads, params)
  treedef = jtu.tree_structure(params)
  ws, gs = jtu.tree_leaves(params), jtu.tree_leaves(grads)
  chosen = [i for i, rule in enumerate(rules) if rule.perturbed and jnp.size(ws[i])]
  dtype = _g.sum_dtype(rules)
  leaves = Leaves.build([rules[i] for i in chosen], [gs[i] for i in chosen],
                        geometry.eta, dtype)
  rho = jnp.asarray(rho, dtype)

  if chosen:
    # Without jit around the step, the loop of p = 2 would compile at every call. In a
    # compiled step this is inlined, and changes nothing. Operators of the user's own
    # stay out: a compiled one would not see that what it reads has changed.
    ours = all(map(_g.built_in, leaves.operators))
    closed_form = _compiled_closed_form if ours else _closed_form
    epsilons, sharpness = closed_form(leaves, rho, geometry.p)
  else:
    epsilons, sharpness = [], jnp.zeros((), dtype)

  result = [jnp.zeros_like(w) for w in ws]
  for i, epsilon in zip(chosen, epsilons, strict=True):
    result[i] = epsilon.astype(result[i].dtype)
  return jtu.tree_unflatten(treedef, result), sharpness


def _closed_form(leaves: Leaves, rho: jax.Array, p: float):
  if p == 1:
    return _largest_coordinate(leaves, rho)
  if p == 2:
    return _euclidean(leaves, rho)
  if math.isinf(p):
    epsilons = leaves.map(lambda w, g, t: rho * t * _sign(g))
    return epsilons, rho * _total(leaves.map(lambda w, g, t: jnp.abs(t * g)))
  return _general(leaves, rho, p / (p - 1))


_compiled_closed_form = jax.jit(_closed_form, static_argnames="p", inline=True)


def _euclidean(leaves: Leaves, rho: jax.Array):
  """For p = 2: rho T^2 g / ||T g||_2."""
  sharpness, ratio, scale = _sharpness_and_ratio(leaves, rho)
  # Two factors, for their product may leave the range where neither does.
  epsilons = leaves.map(
      lambda w, g, t, s, r: g * s * r * t * t, scale, ratio, after_loop=True
  )
  return epsilons, sharpness


@jax.custom_jvp
def _sharpness_and_ratio(
    leaves: Leaves, rho: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(rho ||T g||_2, rho / ||scale T g||_2, scale), with squares kept in range.

  The scale, a power of two, is 1 unless the sum of squares leaves the range of its
  dtype; then the loop takes a second turn with another scale. In the ordinary case
  it runs once, and the scale costs no pass: T bears it (see ``Leaves.map``). One
  that T cannot bear, for huge weights beside vanishing gradients, is taken back.

  Both are finished inside the loop. XLA would move what follows the loop into the
  passes that need it, and compute it again for each weight.
  """
  dtype = leaves.eta.dtype
  exponent = 5 * jnp.finfo(dtype).maxexp // 8
  big, small = 2.0**exponent, 2.0**-exponent
  # Below this sum, squares that matter may have been flushed to zero.
  lowest = 2.0 ** (-7 * exponent // 8)

  def try_scale(carry):
    scale = carry[0][2]
    total = _sum_of_squares(leaves, scale)
    better = jnp.where(total < lowest, big, jnp.where(jnp.isinf(total), small, 1))
    too_big = (scale == big) & ~jnp.isfinite(total)
    again = jnp.where(scale == 1, better != 1, too_big)
    other = jnp.where(scale == 1, better, 0.5).astype(dtype)
    next_scale = jnp.where(again, other, scale)
    # In one array: one small kernel in place of three.
    return jnp.stack([*_finished(rho, total, scale), next_scale]), again

  start = (jnp.array([0, 0, 1], dtype), jnp.array(True))
  (sharpness, ratio, scale), _ = lax.while_loop(
      lambda carry: carry[1], try_scale, vary_as(start, (leaves, rho))
  )
  return sharpness, ratio, scale


@_sharpness_and_ratio.defjvp
def _sharpness_and_ratio_jvp(primals, tangents):
  # A while loop has no reverse mode; at a known scale none is needed.
  results = _sharpness_and_ratio(*primals)
  scale = results[2]

  def at_scale(leaves, rho):
    return _finished(rho, _sum_of_squares(leaves, scale), scale)

  _, slopes = jax.jvp(at_scale, primals, tangents)
  return results, (*slopes, jnp.zeros_like(scale))


def _finished(rho: jax.Array, total: jax.Array, scale: jax.Array):
  """From the sum of squares of scale T g: (rho ||T g||, rho / ||scale T g||)."""
  # Zero: no direction, no perturbation. Not finite: NaN everywhere, for x / inf
  # would silently spare the finite leaves.
  root = _root(total)
  ratio = jnp.where(total == 0, 0, rho / jnp.where(total == 0, 1, root))
  return rho * root / scale, jnp.where(jnp.isfinite(total), ratio, jnp.nan)


def _root(total: jax.Array) -> jax.Array:
  """sqrt(total), without the infinite slope at zero."""
  return jnp.where(total == 0, 0, jnp.sqrt(jnp.where(total == 0, 1, total)))


def _sum_of_squares(leaves: Leaves, scale: jax.Array) -> jax.Array:
  return _total(leaves.map(lambda w, g, t: jnp.square(g * t), scale=scale))


def _general(leaves: Leaves, rho: jax.Array, q: float):
  """For 1 < p < inf: powers of |T g|, taken relative to the largest one."""
  peak = jnp.max(_peaks(leaves))
  unit = jnp.where(peak == 0, 1, peak)
  total = _total(leaves.map(lambda w, g, t, u: jnp.abs(t * g / u) ** q, unit))
  norm = jnp.where(total == 0, 1, total) ** (1 / q)

  def epsilon(w, g, t, unit, norm):
    share = jnp.abs(t * g / unit) / norm
    return rho * t * _sign(g) * share ** (q - 1)

  return leaves.map(epsilon, unit, norm), rho * peak * norm


def _largest_coordinate(leaves: Leaves, rho: jax.Array):
  """For p = 1: all of rho on the first weight with the largest |T g|."""
  peaks = _peaks(leaves)
  first_leaf = jnp.argmax(peaks)
  epsilons = leaves.map(
      lambda w, g, t: jnp.where(
          jnp.arange(w.size).reshape(w.shape) == jnp.argmax(jnp.abs(t * g)),
          rho * t * _sign(g),
          0,
      )
  )
  epsilons = [
      jnp.where(first_leaf == i, epsilon, 0) for i, epsilon in enumerate(epsilons)
  ]
  return epsilons, rho * jnp.max(peaks)


def _peaks(leaves: Leaves) -> jax.Array:
  return jnp.stack(leaves.map(lambda w, g, t: jnp.max(jnp.abs(t * g))))


def _total(leaves: Sequence[jax.Array]) -> jax.Array:
  first, *others = [jnp.sum(leaf) for leaf in leaves]
  return sum(others, start=first)


def _sign(g: jax.Array) -> jax.Array:
  """sign(g), but NaN for an infinite gradient, which has no direction."""
  return jnp.where(jnp.isinf(g), jnp.nan, jnp.sign(g))
