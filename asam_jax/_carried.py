"""One gradient a step: the parameters rest at w + epsilon between steps."""

from collections.abc import Callable
import operator
from typing import Any, NamedTuple

import jax
from jax import tree_util as jtu
import jax.numpy as jnp
import optax

from asam_jax import _ascent
from asam_jax import _checks
from asam_jax import _normalization as _n


class CarriedState(NamedTuple):
  """State of :func:`carried` and :func:`momentum_sam`.

  Attributes:
    params: the clean parameters w, without the perturbation.
    base: the state of the base optimizer.
    ascent: the state of the ascent chain.
  """

  params: optax.Params
  base: optax.OptState
  ascent: optax.OptState


def carried(
    base_tx: optax.GradientTransformation,
    ascent_tx: optax.GradientTransformation,
    *,
    dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Sharpness-aware training with one gradient a step and no ``grad_fn``.

  The parameters that you hold rest at :math:`w_t + \hat\epsilon_t`, so the gradient
  that your training loop computes anyway is the descent gradient. The perturbation
  was made in the step before, from that step's gradient:

  .. math::

    g_t = \nabla L(w_t + \hat\epsilon_t), \qquad
    w_{t+1} = \mathrm{base}(w_t, g_t), \qquad
    \hat\epsilon_{t+1} = \mathrm{ascent}(g_t, w_{t+1}), \qquad
    \hat\epsilon_0 = 0

  The update returned moves from :math:`w_t + \hat\epsilon_t` to
  :math:`w_{t+1} + \hat\epsilon_{t+1}`. The state holds w itself, which is never
  recovered by subtraction and so does not drift. **Evaluate and save**
  ``eval_params(opt_state)``, not the parameters you hold.

  With :func:`asam_jax.ascent` alone this is ASAM with a stale ascent gradient
  (AsyncSAM with a delay of one step, S²-SAM); with a chain it is more, such as
  ascent against a momentum of its own:
  ``optax.chain(optax.trace(0.9), optax.scale(-1), ascent(...))``; see
  :func:`momentum_sam` for the base optimizer's momentum.

  Cost: one gradient and about 15 operations per parameter; memory: one copy of the
  parameters.

  The perturbation belongs to another batch than the descent gradient, and its
  length is limited by how far the loss may rise: where :func:`adaptive_sam`
  tolerates a large rho, this may collapse. Search rho anew, from below.

  With rho = 0 the steps are those of ``base_tx`` bit for bit, unless ``jit`` merges
  base_tx's last product with the addition to the parameters into one rounding:
  an update that arrives from elsewhere can't follow that to the last bit where a
  weight changes by more than half its size in one step.

  Args:
    base_tx: the optimizer that steps from w. Weight decay and clipping belong
      inside it; it sees w, not the perturbed parameters.
    ascent_tx: the ascent chain, which maps the gradient to the perturbation to
      add, such as :func:`asam_jax.ascent`.
    dtype: the dtype of w in the state and so of all that base_tx sees, such as
      ``jnp.float32`` where the parameters are bfloat16; the updates have it too,
      and ``optax.apply_updates`` rounds their sum with the parameters. None: the
      dtypes of the parameters.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` with state :class:`CarriedState`.
    Its update needs ``params``; extra arguments go on to base_tx and ascent_tx.

  Raises:
    ValueError: in ``update``, without params.
    TypeError: if dtype is no real floating point type, or if (in ``update``) the
      gradient has another structure or shape than params.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> import asam_jax
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = asam_jax.carried(optax.sgd(0.1), asam_jax.ascent(rho=0.1, eta=0.0))
    >>> w = jnp.array([3.0, 4.0])
    >>> state = tx.init(w)
    >>> for _ in range(2):
    ...   updates, state = tx.update(jax.grad(loss)(w), state, w)
    ...   w = optax.apply_updates(w, updates)
    >>> print(w.tolist(), asam_jax.eval_params(state).tolist())
    [1.988, 2.724] [1.896, 2.504]

  References:
    `AsyncSAM <https://arxiv.org/abs/2503.11147>`_, 2025, with a delay of one step

    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021
  """
  ascent_tx = optax.with_extra_args_support(ascent_tx)
  return _carried(base_tx, dtype, lambda *args: (ascent_tx, None), operator.add)


def momentum_sam(
    base_tx: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.5,
    eta: optax.ScalarOrSchedule = 0.01,
    p: float = 2,
    *,
    decay: float = 0.9,
    normalization: _n.Normalization = "elementwise",
    normalize: _n.LeafSelection | None = None,
    perturb: _n.LeafSelection | None = None,
    dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adaptive Momentum-SAM: one gradient a step, perturbed against the momentum.

  .. math::

    \hat\epsilon_{t+1} = \mathrm{ascent}(-v_t, w_{t+1}) =
    -\rho \frac{T_w^2 v_t}{\|T_w v_t\|_2} \quad (p = 2)

  with the momentum :math:`v_t` of the base optimizer: its ``trace`` (SGD) or
  ``mu`` (Adam). So the state is one copy of the parameters larger than that of
  base_tx, and no more. A base_tx without momentum gets a trace of its own, which
  is a second copy. Weight decay in front of the momentum is part of it.

  It is :func:`carried`, so what is said there holds: the parameters rest at
  :math:`w + \hat\epsilon`; evaluate ``eval_params(opt_state)``. ``normalization=
  "none"`` gives the Momentum-SAM of the paper.

  Cost: one gradient a step; memory: one copy of the parameters.

  Args:
    base_tx: the optimizer that steps from w.
    rho: the radius, as in :func:`asam_jax.ascent`. Good values are several times
      those of :func:`asam_jax.adaptive_sam`.
    eta: the stabilizer; see :func:`asam_jax.ascent`.
    p: the norm's exponent, a number in [1, inf].
    decay: that of the trace, in [0, 1), if base_tx has no momentum.
    normalization: the operator T_w; see :func:`asam_jax.ascent`.
    normalize: the leaves that get T_w; see :func:`asam_jax.ascent`.
    perturb: the leaves that are perturbed at all; see :func:`asam_jax.ascent`.
    dtype: see :func:`carried`.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` with state :class:`CarriedState`.

  Raises:
    ValueError, TypeError: as :func:`asam_jax.ascent` and :func:`carried` do;
      ValueError if decay is outside [0, 1), or if (in ``init``) base_tx has
      several momenta or one that does not cover all parameters.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> import asam_jax
    >>> tx = asam_jax.momentum_sam(optax.sgd(0.1, momentum=0.9), rho=0.1, eta=0.0)
    >>> w = jnp.array([3.0, 4.0])
    >>> updates, state = tx.update(2 * w, tx.init(w), w)  # the gradient of w^2
    >>> print(asam_jax.eval_params(state).tolist())
    [2.4, 3.2]
    >>> print((w + updates - asam_jax.eval_params(state)).tolist())  # epsilon
    [-0.1177, -0.2789]

  References:
    Becker et al., `Momentum-SAM: Sharpness Aware Minimization without
    Computational Overhead <https://arxiv.org/abs/2401.12033>`_, 2024
  """
  if not 0 <= decay < 1:
    raise ValueError(f"decay={decay!r} must be in [0, 1).")
  ascent_tx = _ascent.ascent(
      rho,
      eta,
      p,
      normalization=normalization,
      normalize=normalize,
      perturb=perturb,
  )
  with_trace = optax.chain(optax.trace(decay), ascent_tx)

  def route(base_state, params):
    momentum = _momentum(base_state, params)
    return (with_trace if momentum is None else ascent_tx), momentum

  # The ascent is odd in the gradient, so its result is subtracted; a negated momentum
  # in front of it XLA would write to memory.
  return _carried(base_tx, dtype, route, operator.sub)


def eval_params(opt_state: optax.OptState) -> optax.Params:
  """The clean parameters w of a carried method, for evaluation and saving.

  Args:
    opt_state: the state of :func:`carried` or :func:`momentum_sam`, or one that
      contains it once, as that of ``optax.chain`` or ``optax.MultiSteps``.

  Returns:
    The parameters without the perturbation; in the dtype of the state.

  Raises:
    ValueError: if there is not exactly one :class:`CarriedState` in opt_state.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> import asam_jax
    >>> tx = asam_jax.carried(optax.sgd(0.1), asam_jax.ascent())
    >>> print(asam_jax.eval_params(tx.init(jnp.array([3.0, 4.0]))).tolist())
    [3.0, 4.0]
  """
  is_carried = lambda node: isinstance(node, CarriedState)  # noqa: E731
  nodes = jtu.tree_leaves(opt_state, is_leaf=is_carried)
  found = [node for node in nodes if is_carried(node)]
  if len(found) != 1:
    raise ValueError(
        f"opt_state contains {len(found)} CarriedStates; pass the state of one"
        " carried(...) or momentum_sam(...). Other optimizers leave the parameters"
        " unperturbed: evaluate those."
    )
  return found[0].params


# (base state, params) -> the ascent chain, and the direction it gets if that is
# not the gradient.
_Route = Callable[
    [Any, Any], tuple[optax.GradientTransformationExtraArgs, optax.Updates | None]
]


def _carried(
    base_tx: optax.GradientTransformation,
    dtype: Any,
    route: _Route,
    perturbed: Callable[[Any, Any], Any],
) -> optax.GradientTransformationExtraArgs:
  base_tx = optax.with_extra_args_support(base_tx)
  if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(f"dtype={dtype!r} must be a real floating point type, or None.")

  def init_fn(params):
    clean = jax.tree.map(lambda w: _copy(w, dtype), params)
    base_state = base_tx.init(clean)
    ascent_tx, _ = route(base_state, clean)
    return CarriedState(clean, base_state, ascent_tx.init(clean))

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(
          "params=None: the update leads away from the perturbed parameters; call"
          " update(grads, state, params)."
      )
    _check_shapes(updates, params)
    grads = jax.tree.map(lambda g: _cast(g, dtype), updates)
    steps, base_state = base_tx.update(grads, state.base, state.params, **extra_args)
    clean = optax.apply_updates(state.params, steps)
    ascent_tx, direction = route(base_state, clean)
    epsilon, ascent_state = ascent_tx.update(
        grads if direction is None else direction, state.ascent, clean, **extra_args
    )
    # From wherever params are, so that their rounding does not add up.
    updates = jax.tree.map(
        lambda w, e, point: perturbed(w, e) - _cast(point, dtype),
        clean, epsilon, params,
    )
    return updates, CarriedState(clean, base_state, ascent_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_shapes(grads: Any, params: Any) -> None:
  given, wanted = (
      (jtu.tree_structure(tree), [jnp.shape(x) for x in jtu.tree_leaves(tree)])
      for tree in (grads, params)
  )
  if given != wanted:
    raise TypeError(
        f"the gradient has the structure and shapes {given}, but params have"
        f" {wanted}; pass the gradient with respect to these params alone."
    )


def _momentum(base_state: Any, params: Any) -> optax.Updates | None:
  """The base optimizer's momentum, or None if it has none."""
  names = ("trace", "mu")

  def holds_one(node):
    return any(name in getattr(node, "_fields", ()) for name in names)

  nodes = jtu.tree_leaves(base_state, is_leaf=holds_one)
  found = [
      getattr(node, name)
      for node in nodes
      for name in names
      if name in getattr(node, "_fields", ())
  ]
  if not found:
    return None
  if len(found) > 1 or jtu.tree_structure(found[0]) != jtu.tree_structure(params):
    raise ValueError(
        f"base_tx has {len(found)} momenta (trace or mu), or one that does not cover"
        " all parameters, so it is not clear which to ascend against; use"
        " carried(base_tx, optax.chain(optax.trace(0.9), optax.scale(-1),"
        " ascent(...))), which has its own."
    )
  return found[0]


def _copy(w: Any, dtype: Any) -> Any:
  """A buffer of its own, so that params and state can both be donated."""
  if dtype is None or not jnp.issubdtype(_checks.dtype_of(w), jnp.floating):
    dtype = _checks.dtype_of(w)
  if isinstance(w, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(w.shape, dtype, sharding=w.sharding)
  return jnp.array(w, dtype, copy=True)


def _cast(x: Any, dtype: Any) -> Any:
  if dtype is None or not jnp.issubdtype(_checks.dtype_of(x), jnp.floating):
    return x
  return jnp.asarray(x, dtype)
