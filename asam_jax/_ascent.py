"""The ascent: from a gradient to the perturbation. The only home of the formula."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import tree_util as jtu
import jax.numpy as jnp
import optax

from asam_jax import _arguments
from asam_jax import _geometry as _g
from asam_jax import _interop
from asam_jax import _radius
from asam_jax import _shards
from asam_jax import _trees
from asam_jax._geometry import LeafSelection
from asam_jax._geometry import Normalization
from asam_jax._radius import Radius


class AscentState(NamedTuple):
  """State of :func:`ascent`.

  Attributes:
    count: the number of steps taken, an int32 scalar; schedules are read at it. None
      inside a function door, which has no steps.
    sharpness: the first-order sharpness rho ||T_w g||_q of the last step, in the
      unit of the loss: a float32 scalar (float64 if a parameter is).
    dual_norm: ||T_w g||_q of the last step, likewise.
    radius: the state of the radius rule if rho is one, otherwise None.
  """

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
  sharpness: jax.Array
  dual_norm: jax.Array
  radius: Any = None


@_interop.keeps("normalization", "normalize", "perturb", "param_specs")
def ascent(
    rho: Radius = 0.5,
    eta: optax.ScalarOrSchedule = 0.01,
    p: float = 2,
    *,
    normalization: Normalization = "elementwise",
    normalize: LeafSelection | None = None,
    perturb: LeafSelection | None = None,
    param_specs: Any = None,
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

  Sums run in float32 at least. A zero gradient gives a zero perturbation, as does one
  with :math:`\|T_w g\|_q` below about 1e-48. NaN or inf in the gradient gives NaN in
  the perturbation, and so do a norm above about 1e51 and a traced rho or eta, or one of
  a schedule under ``jit``, that turns out to be negative or not finite.

  The sign is that of ascent: the result is to be *added* to the parameters.

  Args:
    rho: the radius of the perturbation, >= 0, in the unit of ``T_w^{-1} w``
      (none, for the elementwise T_w): a number, a traced scalar, a schedule of the
      step count, or, inside :func:`asam_jax.perturbed_gradient`, a rule such as
      :func:`asam_jax.auto_radius`.
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
    param_specs: for parameters that are sharded by hand inside ``shard_map``, the
      PartitionSpecs of its in_specs; see :class:`asam_jax.Geometry`.

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
  geometry = _g.Geometry(eta, p, normalization, normalize, perturb, param_specs)
  return from_geometry(rho, geometry)


def from_geometry(
    rho: Radius, geometry: _g.Geometry
) -> optax.GradientTransformationExtraArgs:
  """:func:`ascent` in a geometry that is there already."""
  _arguments.instance("geometry", geometry, _g.Geometry)
  rule = _radius.rule_of(rho)
  if rule and rule.update:
    _shards.refuse("a radius rule", geometry.param_specs, "what it measures")
  # Under a rule, the closed form at radius 1 is multiplied with what the rule says.
  rho = 1.0 if rule else _arguments.scalar_or_schedule("rho", rho)
  stabilizer = _arguments.scalar_or_schedule("eta", geometry.eta)
  q = geometry.q

  def init_fn(params: optax.Params) -> AscentState:
    dtype = _g.perturbed_dtype(geometry.rules(params))
    zero, also = jnp.zeros((), dtype), jnp.zeros((), dtype)  # buffers of their own
    return AscentState(jnp.zeros((), jnp.int32), zero, also, rule and rule.init(dtype))

  def update_fn(updates, state, params=None, *, axis_name=None, **extra_args):
    if params is None:
      raise ValueError(
          "params=None: the perturbation depends on the parameters; call"
          " update(grads, state, params, ...)."
      )
    if state.count is None and (callable(rho) or callable(stabilizer)):
      raise TypeError(
          "rho or eta is a schedule, but a function transformation has no step count;"
          " pass its value: ascent(rho=schedule(step))."
      )
    rules = geometry.rules(params)
    _arguments.tree_like("the gradient", updates, params)
    if not (geometry.param_specs is None and axis_name is None):
      _shards.check(
          geometry.param_specs, rules, jtu.tree_leaves(updates), axis_name
      )
    dtype = state.dual_norm.dtype
    now = [x(state.count) if callable(x) else x for x in (rho, stabilizer)]  # pyright: ignore
    radius, eta = (jnp.asarray(x, dtype) for x in now)
    ws = [jnp.asarray(w) for w in jtu.tree_leaves(params)]
    gs = jtu.tree_leaves(updates)
    chosen = [i for i, rule in enumerate(rules) if rule.perturbed and jnp.size(ws[i])]
    shards = None
    if geometry.param_specs is not None:
      shards = _shards.shards_of(geometry.param_specs, [rules[i] for i in chosen])
    leaves = _Leaves(
        tuple(rules[i]._replace(leaf=None) for i in chosen),
        geometry.is_built_in,
        [ws[i] for i in chosen],
        [jnp.asarray(gs[i]) for i in chosen],
        eta,
        shards=shards,
    )
    # Without jit around the step, a loop would compile at every call. In a compiled
    # step this is inlined, and changes nothing. Operators of the user's own stay out:
    # a compiled one would not see that what it reads has changed.
    closed_form = _compiled_closed_form if leaves.built_in else _closed_form
    epsilons, norm = [], jnp.zeros((), dtype)
    if chosen:
      epsilons, norm = closed_form(leaves, radius, q)
    if rule:
      radius = _radius.this_step(rule, state, norm, **extra_args)
      epsilons = [radius * one for one in epsilons]

    moved = dict(zip(chosen, epsilons, strict=True))
    result = [
        moved[i].astype(w.dtype) if i in moved else jnp.zeros_like(w)
        for i, w in enumerate(ws)
    ]
    # A norm beyond the range is inf, and 0 times that would be NaN.
    sharpness = jnp.where((radius == 0) & jnp.isinf(norm), 0, radius * norm)
    count = state.count  # None where there are no steps, as in a function door
    if count is not None:
      count = jnp.asarray(optax.safe_increment(count))
    new = AscentState(count, sharpness, norm, state.radius)  # pyright: ignore
    return jtu.tree_unflatten(jtu.tree_structure(params), result), new

  return _shards.Ascent.over(geometry.param_specs, init_fn, update_fn)


@functools.partial(
    jtu.register_dataclass,
    data_fields=["ws", "gs", "eta", "kept"],
    meta_fields=["rules", "built_in", "shards"],
)
@dataclasses.dataclass(frozen=True)
class _Leaves:
  """The perturbed leaves in their own dtypes; eta has the dtype of sums.

  T and T g are not stored. Memory traffic, not arithmetic, is what this costs, so
  each pass computes them afresh. Only a T that is smaller than its leaf (a norm per
  filter) is kept.
  """

  rules: tuple[_g.LeafRule, ...]
  built_in: bool  # whether all operators are ours
  ws: list[jax.Array]
  gs: list[jax.Array]
  eta: jax.Array
  kept: tuple[jax.Array | None, ...] = ()
  shards: _shards.Shards | None = None  # of what is sharded by hand


def _closed_form(leaves: _Leaves, rho: jax.Array, q: float):
  """(rho T sign(g) (|T g| / ||T g||_q)^(q - 1) of each leaf, ||T g||_q)."""
  dtype = leaves.eta.dtype
  kept = []
  for rule, w in zip(leaves.rules, leaves.ws, strict=True):
    t = None
    if rule.operator not in (_g.elementwise, _g.none):
      t = rule.factor(w.astype(dtype), leaves.eta)
    kept.append(t if t is not None and t.size < w.size else None)
  leaves, shards = dataclasses.replace(leaves, kept=tuple(kept)), leaves.shards

  # With x = h T g h, where h keeps x in range: ||x||_q is size times relative.
  relative, h, unit = jnp.ones((), dtype), jnp.ones((), dtype), jnp.ones((), dtype)
  if q == 1:
    sizes = _each_leaf(leaves, lambda t, g: jnp.sum(jnp.abs(t * g)))
    size = sum(shards.sums([jnp.stack(sizes)])[0] if shards else sizes)
  else:
    size, unit, h = _in_range(leaves, q == 2)
    if q not in (2, math.inf):
      powers = lambda t, g, a, b: jnp.sum(_trees.power(jnp.abs(g * a * t * b), q))  # noqa: E731
      totals = _each_leaf(leaves, powers, h, unit)
      total = sum(shards.sums([jnp.stack(totals)])[0] if shards else totals)
      relative = jnp.where(total == 0, 1, total) ** (1 / q)
      unit = unit / relative

  # At p = 2 without a power: rho T^2 g / ||T g||, with unit = h / ||h T g h||.
  euclidean = lambda t, g, r, a, b: g * a * t * (b * r) * t  # noqa: E731

  def epsilon(t, g, r, a, b):
    share = jnp.abs(g * a * t * b)  # |T g| / ||T g||_q, but for q = 1
    # An infinite gradient has no direction.
    direction = r * t * jnp.where(jnp.isinf(g), jnp.nan, jnp.sign(g))
    if q == 1:
      return direction
    if q == math.inf:
      # The passes may round T g differently, so equal is what is nearly so. The
      # first one of each leaf; 0 * NaN stays visible.
      first, place = _shards.first(share >= 1 - 4 * jnp.finfo(dtype).eps)
      return direction * jnp.where(first, 1, 0 * share), jnp.any(first), place
    return direction * _trees.power(share, q - 1)

  one = euclidean if q == 2 else epsilon
  epsilons = _each_leaf(leaves, one, rho, h, unit, apart=lambda rule: False)
  if q == math.inf:  # the first leaf of all that has one
    found = jnp.array(False)
    losers = shards and shards.losers([rest for _, *rest in epsilons], leaves.ws)
    for i, (one, here, _) in enumerate(epsilons):
      lost = losers[i] if losers else found
      epsilons[i], found = jnp.where(lost, 0 * one, one), found | here
  return epsilons, size * relative / h / h


_compiled_closed_form = jax.jit(_closed_form, static_argnames="q", inline=True)
# As it is, JAX 0.12 can't transpose a barrier of which some tangents are constants.
_barrier = jax.custom_jvp(lax.optimization_barrier)


@_barrier.defjvp
def _barrier_jvp(primals, tangents):
  return _barrier(*primals), tangents[0]


def _each_leaf(
    leaves: _Leaves,
    fun: Callable[..., Any],
    *scalars: jax.Array,
    apart: Callable[[_g.LeafRule], bool] | None = None,
) -> list[Any]:
  """One pass: ``fun(T, g, *scalars)`` of each leaf, in the dtype of sums.

  Barriers keep XLA from merging the passes, for it would write T g, or a leaf in
  another dtype, to memory in between. Each leaf has one of its own, with its own eta
  and scalars: one for all of them would let XLA:CPU share the broadcast of a scalar
  among leaves, and so write it to memory at a leaf's size. Leaves that are not kept
  ``apart`` (None: all are) have none. The last pass needs none: all others have
  theirs, and XLA may place the arrays around it as it likes.
  """
  dtype = leaves.eta.dtype

  def of_leaf(rule, w, g, kept):
    eta, own = leaves.eta, scalars
    if apart is None or apart(rule):
      w, g, eta, *own = _barrier((w, g, eta, *scalars))
    t = rule.factor(w.astype(dtype), eta) if kept is None else kept
    return fun(t, g.astype(dtype), *own)

  # Leaves that are alike are traced and lowered once. Operators of the user's own are
  # called for each leaf: they may read what changes.
  traced = jax.jit(of_leaf, static_argnums=0) if leaves.built_in else of_leaf
  return [
      traced(rule._replace(path=()) if leaves.built_in else rule, w, g, kept)
      for rule, w, g, kept in zip(
          leaves.rules, leaves.ws, leaves.gs, leaves.kept, strict=True
      )
  ]


def _sizes(
    leaves: _Leaves,
    squares: bool,
    *scales: Any,
    apart: Callable[[_g.LeafRule], bool] | None = None,
) -> list[jax.Array]:
  """For each scale h, of x = h T g h over all leaves: ||x||_2, or the largest |x|.

  The scale is applied in two parts, to g and to T g, because no part of it may leave
  the range where a huge weight has a vanishing gradient (a mask's -1e30 has none).
  """
  of_all = (lambda x: jnp.sum(jnp.square(x))) if squares else (
      lambda x: jnp.max(jnp.abs(x))
  )
  of_leaf = lambda t, g, *own: [of_all(g * h * t * h)[None] for h in own]  # noqa: E731
  by_scale = zip(*_each_leaf(leaves, of_leaf, *scales, apart=apart), strict=True)
  joined = [lax.concatenate(sizes, 0) for sizes in by_scale]
  if leaves.shards:
    joined = (leaves.shards.sums if squares else leaves.shards.largest)(joined)
  if not squares:
    return [jnp.max(sizes) for sizes in joined]
  # Without the infinite slope at zero.
  totals = [jnp.sum(sizes) for sizes in joined]
  return [
      jnp.where(total == 0, 0, jnp.sqrt(jnp.where(total == 0, 1, total)))
      for total in totals
  ]


def vary_as(tree: Any, like: Any, but: Any = ()) -> Any:
  """Constants that vary over a mesh as ``like`` does, for a loop in shard_map."""
  axes = set()
  for x in jtu.tree_leaves(like) if hasattr(jax, "typeof") else ():
    kind = jax.typeof(x)  # JAX 0.6 to 0.9 say `vma`, later ones `mat.varying`
    kind = getattr(kind, "mat", kind)
    axes |= set(getattr(kind, "varying", getattr(kind, "vma", ())))
  axes -= set(but)
  if not axes:
    return tree
  if hasattr(lax, "pcast"):
    return lax.pcast(tree, tuple(axes), to="varying")
  return getattr(lax, "pvary")(tree, tuple(axes))  # noqa: B009  (JAX before 0.8)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _in_range(
    leaves: _Leaves, squares: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(size, h / size, h): :func:`_sizes` at a power of two h that keeps it in range.

  It is 1 unless the size, or its square, would leave the range of its dtype. On CPU
  a loop tries another scale only then. Elsewhere a loop would cost more than it
  saves: all scales are tried in the one pass over memory. Which is compiled is
  settled when the platform is known, so that neither holds the other, nor a branch.
  """
  dtype = leaves.eta.dtype
  exponent = jnp.finfo(dtype).maxexp // 32
  big, small = 2.0 ** (12 * exponent), 2.0 ** (-13 * exponent)
  # Below the lowest, squares that matter may have been flushed to zero; above the
  # highest they overflow. Below the last of all nothing of them is left.
  lowest, highest = 2.0 ** (-9 * exponent), 2.0 ** (16 * exponent)
  vanishing = 2.0 ** (-16 * exponent)

  # Not finite: NaN everywhere, for x / inf would silently spare the finite leaves.
  limited = lambda size: jnp.where(  # noqa: E731
      size <= highest, jnp.where(size < vanishing, 0, size), jnp.nan
  )
  finished = lambda size, h: (size, h / jnp.where(size == 0, jnp.inf, size), h)  # noqa: E731

  def turn(carry):
    *_, h = carry
    (size,) = _sizes(leaves, squares, h)
    too_small, too_large = size < lowest, ~(size <= highest)
    other = jnp.where(too_small, big, jnp.where(too_large, small, 0))
    # Only a weight that T holds fixed under a huge gradient can't bear the big one.
    back = jnp.where((h > 1) & too_large, 0.5, 0)
    # Finished inside the loop: XLA:CPU would move what follows it into the pass over
    # each leaf, and look at all leaves for each.
    return *finished(limited(size), h), jnp.where(h == 1, other, back).astype(dtype)

  def in_one_pass(start):
    # With T = 1, T g is g and needs no barrier. XLA:TPU, which has some gradients whole
    # from their all-reduce, then has the perturbed leaf so: one all-gather less.
    apart = lambda rule: rule.operator is not _g.none  # noqa: E731
    scales = jnp.array([1, big, small], dtype)
    one, up, down = _sizes(leaves, squares, *scales, apart=apart)
    is_up, is_down = (one < lowest) & (up <= highest), ~(one <= highest)
    size = jnp.where(is_up, up, jnp.where(is_down, down, one))
    h = jnp.where(is_up, big, jnp.where(is_down, small, 1)).astype(dtype)
    return *finished(limited(size), h), start[0]

  summed = leaves.shards.axes if leaves.shards else ()
  zero = vary_as(jnp.zeros((), dtype), leaves, summed)
  size, unit, h, _ = lax.platform_dependent(
      (zero, zero, zero, zero + 1),
      cpu=lambda start: lax.while_loop(lambda carry: carry[-1] > 0, turn, start),
      default=in_one_pass,
  )
  # Without this barrier, XLA:CPU holds more around the last pass of some networks.
  return _barrier((size, unit, h))


@_in_range.defjvp
def _in_range_jvp(squares, primals, tangents):
  # A loop has no reverse mode; at a known scale none is needed.
  size, unit, h = _in_range(*primals, squares)
  _, slope = jax.jvp(lambda leaves: _sizes(leaves, squares, h)[0], primals, tangents)
  relative = slope / jnp.where(size == 0, 1, size)
  return (size, unit, h), (slope, -unit * relative, jnp.zeros_like(h))
