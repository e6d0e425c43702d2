"""One gradient a step: the parameters rest at w + epsilon between steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import tree_util as jtu
import jax.numpy as jnp
import optax

from asam_jax import _arguments
from asam_jax import _ascent
from asam_jax import _geometry as _g
from asam_jax import _interop
from asam_jax import _radius
from asam_jax import _shards
from asam_jax import _trees
from asam_jax import _two_passes
from asam_jax._geometry import LeafSelection
from asam_jax._geometry import Normalization


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


class MomentumAscentState(NamedTuple):
  """State of the ascent in :func:`momentum_sam`.

  Attributes:
    ascent: the :class:`asam_jax.AscentState`.
    trace: the trace of the gradients, if base_tx has no momentum; otherwise empty.
  """

  ascent: optax.OptState
  trace: Any


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

  Cost: one gradient and about 17 operations per parameter; memory: one copy of the
  parameters.

  The perturbation belongs to another batch than the descent gradient, and its
  length is limited by how far the loss may rise: where :func:`adaptive_sam`
  tolerates a large rho, this may collapse. Search rho anew, from below.

  Batch statistics that the model gathers in training are those at
  :math:`w + \hat\epsilon`, not at w: at a large rho the accuracy of
  ``eval_params(opt_state)`` with them is lower than it need be. Gather them anew before
  an evaluation that counts, by training-mode passes at w without a step. In Flax::

    params = asam_jax.eval_params(opt_state)
    for x in batches:  # 1 / (1 - momentum) of them, or some more
      _, new = model.apply({"params": params, "batch_stats": batch_stats}, x,
                           train=True, mutable=["batch_stats"])
      batch_stats = new["batch_stats"]

  The state is the truth about w. Parameters that are changed from outside (projected,
  loaded, averaged) are moved back to where the state says at the next update; change
  the state's ``params`` as well, or init anew.

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
  ascent_tx = _two_passes.ascent_chain(ascent_tx)

  def init_ascent(base_state, clean):
    del base_state
    return ascent_tx.init(clean)

  def perturb(grads, steps, base_state, ascent_state, clean, extra_args):
    del steps, base_state
    return ascent_tx.update(grads, ascent_state, clean, **extra_args)

  return _carried(base_tx, dtype, init_ascent, perturb)


@_interop.keeps("normalization", "normalize", "perturb", "param_specs")
def momentum_sam(
    base_tx: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.5,
    eta: optax.ScalarOrSchedule = 0.01,
    p: float = 2,
    *,
    decay: float = 0.9,
    normalization: Normalization = "elementwise",
    normalize: LeafSelection | None = None,
    perturb: LeafSelection | None = None,
    param_specs: Any = None,
    dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adaptive Momentum-SAM: one gradient a step, perturbed against the momentum.

  .. math::

    \hat\epsilon_{t+1} = \mathrm{ascent}(-v_t, w_{t+1}) =
    -\rho \frac{T_w^2 v_t}{\|T_w v_t\|_2} \quad (p = 2)

  with the momentum :math:`v_t` of the base optimizer: that of SGD, Adam and their
  kin in Optax, which base_tx keeps anyway. So the state is one copy of the parameters
  larger than that of base_tx, and no more. A base_tx without one such momentum (with
  none, with several, or of a kind of its own) gets a trace of the gradients, which is
  a second copy. Weight decay in front of the momentum is part of it. A momentum behind
  the learning rate, as in ``optax.lars``, is negated: which way is downhill is then
  read off the step that base_tx makes.

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
    param_specs: for parameters that are sharded by hand inside ``shard_map``; see
      :func:`asam_jax.ascent`.
    dtype: see :func:`carried`.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` with state :class:`CarriedState`.

  Raises:
    ValueError, TypeError: as :func:`asam_jax.ascent` and :func:`carried` do;
      ValueError if decay is outside [0, 1).

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
  _arguments.scalar("decay", decay, high=1)
  geometry = _g.Geometry(eta, p, normalization, normalize, perturb, param_specs)
  ascent_tx = _ascent.from_geometry(rho, geometry)

  def init_ascent(base_state, clean):
    trace = ()
    if _momentum(base_state, clean) is None:
      trace = jax.tree.map(jnp.zeros_like, clean)
    return MomentumAscentState(ascent_tx.init(clean), trace)

  def downhill(grads, steps, base_state, state, clean, extra_args):
    momentum, trace = _momentum(base_state, clean), state.trace
    if momentum is None:
      momentum = trace = _trees.map_floats(
          lambda v, g: (decay * v + g).astype(v.dtype), trace, grads
      )
    elif not _sees_the_gradient_first(base_state):
      # Behind a learning rate it is negated: it then points the way of the steps.
      shards = _shards.shards_of(param_specs, geometry.rules(clean))
      dot = shards.dot if shards else _trees.dot
      against = dot(momentum, steps) <= 0
      momentum = _trees.map_floats(lambda v: jnp.where(against, v, -v), momentum)
    epsilon, ascent_state = ascent_tx.update(
        momentum, state.ascent, clean, **extra_args
    )
    epsilon = _trees.map_floats(jnp.negative, epsilon)
    return epsilon, MomentumAscentState(ascent_state, trace)

  return _carried(base_tx, dtype, init_ascent, downhill)


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


def _carried(
    base_tx: optax.GradientTransformation,
    dtype: Any,
    init_ascent: Callable[..., Any],
    perturb: Callable[..., Any],
) -> optax.GradientTransformationExtraArgs:
  """``perturb(grads, steps, base, ascent, w, extra) -> (epsilon, ascent)``."""
  base_tx = _two_passes.base(base_tx)
  _arguments.float_type("dtype", dtype)

  def init_fn(params):
    _arguments.all_arrays("params", params)
    clean = jax.tree.map(lambda w: _copy(w, dtype), params)
    base_state = base_tx.init(clean)
    ascent_state = init_ascent(base_state, clean)
    _two_passes.no_ascent(base_state, CarriedState)
    _two_passes.no_second_ascent(ascent_state)
    _radius.refuse(ascent_state)
    return CarriedState(clean, base_state, ascent_state)

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(
          "params=None: the update leads away from the perturbed parameters; call"
          " update(grads, state, params)."
      )
    _arguments.tree_like("the gradient", updates, params)
    grads = jax.tree.map(lambda g: _cast(g, dtype), updates)
    steps, base_state = base_tx.update(grads, state.base, state.params, **extra_args)
    clean = _trees.map_floats(  # optax.apply_updates, without what has no gradient
        lambda w, step: jnp.asarray(w + step).astype(w.dtype), state.params, steps
    )
    epsilon, ascent_state = perturb(
        grads, steps, base_state, state.ascent, clean, extra_args
    )
    # From wherever params are, so that their rounding does not add up.
    updates = jax.tree.map(
        lambda w, e, point, step: (
            (w + e) - _cast(point, dtype) if _arguments.is_float(w) else step
        ),
        clean, epsilon, params, steps,
    )
    return updates, CarriedState(clean, base_state, ascent_state)

  return _two_passes.Optimizer(init_fn, update_fn)


# Optax's states that hold a moving sum or mean of the gradients, and its name there.
_MOMENTA = {
    "TraceState": "trace",
    "ScaleByAdamState": "mu",
    "ScaleByAmsgradState": "mu",
    "ScaleByBeliefState": "mu",
    "ScaleByLionState": "mu",
}
_MOMENTUM_CLASSES = {
    getattr(optax, name): field
    for name, field in _MOMENTA.items()
    if hasattr(optax, name)
}


def _momentum(base_state: Any, params: Any) -> optax.Updates | None:
  """The one momentum of the base optimizer; None if it has none, several, or a part."""
  is_one = lambda node: type(node) in _MOMENTUM_CLASSES  # noqa: E731
  found = [
      getattr(node, _MOMENTUM_CLASSES[type(node)])
      for node in jtu.tree_leaves(base_state, is_leaf=is_one)
      if is_one(node)
  ]
  whole = len(found) == 1 and jtu.tree_structure(found[0]) == jtu.tree_structure(params)
  return found[0] if whole else None


def _sees_the_gradient_first(base_state: Any) -> bool:
  """Whether nothing stands before the momentum, as in optax.sgd and optax.adam."""
  while type(base_state) is tuple and base_state:
    base_state = base_state[0]
  return type(base_state) in _MOMENTUM_CLASSES


def _copy(w: Any, dtype: Any) -> Any:
  """A buffer of its own, so that params and state can both be donated."""
  if dtype is None or not jnp.issubdtype(_arguments.dtype_of(w), jnp.floating):
    dtype = _arguments.dtype_of(w)
  if isinstance(w, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(w.shape, dtype, sharding=w.sharding)
  return jnp.array(w, dtype, copy=True)


def _cast(x: Any, dtype: Any) -> Any:
  if dtype is None or not jnp.issubdtype(_arguments.dtype_of(x), jnp.floating):
    return x
  return jnp.asarray(x, dtype)
