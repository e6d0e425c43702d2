"""The second gradient at some of the steps only, and when: gates and shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from asam_jax import _arguments
from asam_jax import _mesh
from asam_jax import _shards
from asam_jax import _trees
from asam_jax import _two_passes


class SometimesState(NamedTuple):
  """State of :func:`sometimes`.

  Attributes:
    gate: the state of ``when``; for a function of the step, the step count.
    link: the state of the link.
    reused: with ``reuse``, the direction that skipped steps add, of norm 1 (or 0
      before the first perturbed step); otherwise empty.
  """

  gate: Any
  link: optax.OptState
  reused: Any


def sometimes(
    link: optax.GradientTransformation,
    when: Callable[[jax.Array], Any] | Gate,
    *,
    reuse: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  r"""Takes the second gradient at some steps only, to save its cost at the others.

  The steps are chosen by ``when``:

  - every k-th step: ``lambda step: step % k == 0``
  - the last part of training: :func:`late`; another window likewise: ``lambda step:
    step < 1000``
  - a random half: ``lambda step: jax.random.bernoulli(jax.random.fold_in(key,
    step), 0.5)``
  - where the gradient is larger than usual (AE-SAM): :func:`above_average`

  With ``reuse`` = :math:`\alpha > 0` it is LookSAM. At a perturbed step with clean
  gradient g and perturbed gradient h it keeps the part of h that is orthogonal to
  g, over the whole pytree, and the steps between add it, scaled to the gradient:

  .. math::

    h_\perp = h - \frac{\langle h, g\rangle}{\|g\|_2^2} g, \qquad
    g \mapsto g + \alpha \frac{\|g\|_2}{\|h_\perp\|_2} h_\perp

  The added part does not shrink with rho, so a small rho is far from the base
  optimizer; at rho = 0, where h = g but for rounding, nothing is added.

  The choice is made by ``lax.cond``, so a skipped gradient costs nothing under
  ``jit`` (under ``vmap`` both branches run). XLA's CPU backend runs convolutions
  inside ``lax.cond`` many times slower; there, make the choice outside ``jit``:
  ``update(..., ascend=True)`` or ``ascend=False`` with a Python bool compiles the
  one branch alone, and the state is the same. Where the link averages over an
  ``axis_name``, so does this with the clean gradient, wherever it decides or is
  followed: all devices choose and step alike.

  Cost: one gradient a step, and a second one at the chosen steps; memory: none, or
  one copy of the parameters with ``reuse``.

  Args:
    link: what maps the clean gradient to the perturbed one, such as
      ``perturbed_gradient(ascent(...))``. Its state, and so its schedules, advance
      at the chosen steps only.
    when: a function from the step count (an int32 scalar) to a scalar bool, or a
      :class:`Gate`.
    reuse: LookSAM's alpha, >= 0; the paper has 0.7 with every fifth step.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` with state :class:`SometimesState`.
    Its update takes ``ascend`` (None: ask ``when``; a bool, also a traced one:
    obey) and hands all other extra arguments on.

  Raises:
    TypeError: if ``when`` is no function and no Gate, or does not decide by a
      scalar bool.
    ValueError: if reuse is negative, or (in ``update``) without params; for reuse or a
      Gate around an ascent with ``param_specs``.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> import asam_jax
    >>> looksam = optax.chain(
    ...     asam_jax.sometimes(
    ...         asam_jax.perturbed_gradient(asam_jax.ascent(rho=0.1, eta=0.0)),
    ...         when=lambda step: step % 5 == 0, reuse=0.7),
    ...     optax.sgd(0.1))
    >>> loss = lambda w: jnp.sum(w**2)
    >>> w = jnp.array([3.0, 4.0])
    >>> state = looksam.init(w)
    >>> for _ in range(2):
    ...   updates, state = looksam.update(
    ...       jax.grad(loss)(w), state, w, grad_fn=jax.grad(loss))
    ...   w = optax.apply_updates(w, updates)
    >>> print(w.tolist())
    [2.336, 2.174]

  References:
    Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
    <https://arxiv.org/abs/2203.02714>`_, 2022
  """
  _arguments.scalar("reuse", reuse)
  gate = when if isinstance(when, Gate) else _gate_of_step(when)
  for part, name in zip(gate, gate._fields, strict=True):
    _arguments.function(f"when.{name}", part, "as that of a Gate")
  link = _two_passes.link(link)
  if reuse or isinstance(when, Gate):
    what = "reuse" if reuse else "a Gate"
    _shards.refuse(what, link.param_specs, "the gradient's norm or projection")
  # The mean over the devices is wanted at every step, or else at skipped ones only.
  always = bool(reuse) or isinstance(when, Gate)

  def mean(grads):
    return grads if link.axis_name is None else _mesh.mean(grads, link.axis_name)

  def init_fn(params):
    _arguments.all_arrays("params", params)
    reused = jax.tree.map(jnp.zeros_like, params) if reuse else ()
    return SometimesState(gate.init(params), link.init(params), reused)

  def update_fn(updates, state, params=None, *, ascend=None, **extra_args):
    if params is None:
      raise ValueError(
          "params=None: call update(grads, state, params, grad_fn=grad_fn)."
      )
    _arguments.tree_like("the gradient", updates, params)
    if link.axis_name is not None:
      _mesh.check_bound(link.axis_name)
    clean = mean(updates) if always else updates
    decision, gate_state = gate.update(clean, state.gate)

    def perturbed():
      grads, link_state = link.update(updates, state.link, params, **extra_args)
      if not reuse:
        return grads, link_state, ()
      return grads, link_state, _new_direction(clean, grads, state.reused)

    def skipped():
      grads = clean if always else mean(updates)
      if reuse:
        grads = _add_direction(grads, state.reused, reuse)
      return grads, state.link, state.reused

    chosen = decision if ascend is None else ascend
    if isinstance(chosen, (bool, np.bool_)):  # nothing to choose in the program
      grads, *rest = perturbed() if chosen else skipped()
    else:
      grads, *rest = lax.cond(_scalar_bool(chosen), perturbed, skipped)
    return grads, SometimesState(gate_state, *rest)

  return _two_passes.Link.over(link.axis_name, link.param_specs, init_fn, update_fn)


def _scalar_bool(decision: Any) -> jax.Array:
  is_one = isinstance(decision, (bool, np.bool_)) or (
      isinstance(decision, (jax.Array, np.ndarray))
      and jnp.shape(decision) == () and decision.dtype == jnp.bool_
  )
  if not is_one:
    raise TypeError(
        f"when (or ascend) gave {decision!r}; it must be a scalar bool, such as"
        " step % 5 == 0."
    )
  return jnp.asarray(decision)


def _new_direction(clean: Any, perturbed: Any, reused: Any) -> Any:
  """The unit vector along the part of the perturbed gradient orthogonal to clean."""
  # From the difference, which is exactly zero where the gradients are equal.
  difference = _trees.map_floats(
      lambda h, g: _trees.f32(h) - _trees.f32(g), perturbed, clean
  )
  part = _trees.orthogonal_part(difference, clean)
  # What is left of two equal gradients after rounding is no direction.
  eps = max(
      [float(jnp.finfo(g.dtype).eps) for g in jax.tree.leaves(clean)
       if _arguments.is_float(g)], default=0.0
  )
  real = _trees.norm(part) > 8 * eps * _trees.norm(clean)
  return _trees.map_floats(
      lambda old, u: jnp.where(real, u, 0).astype(old.dtype),
      reused, _trees.unit_vector(part),
  )


def _add_direction(grads: Any, direction: Any, alpha: float) -> Any:
  length = alpha * _trees.norm(grads)
  return _trees.map_floats(
      lambda g, v: (_trees.f32(g) + length * _trees.f32(v)).astype(g.dtype),
      grads, direction,
  )


class Gate(NamedTuple):
  """Decides at which steps :func:`sometimes` takes the second gradient.

  Attributes:
    init: ``params -> state``.
    update: ``(grads, state) -> (decision, state)`` with the clean gradient and a
      scalar bool.
  """

  init: Callable[[optax.Params], Any]
  update: Callable[[optax.Updates, Any], tuple[Any, Any]]


class AboveAverageState(NamedTuple):
  """State of :func:`above_average`.

  Attributes:
    count: the number of steps taken, an int32 scalar.
    mean: the running mean of the squared gradient norm, a float32 scalar.
    variance: its running variance, a float32 scalar.
  """

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
  mean: jax.Array
  variance: jax.Array


def above_average(
    threshold: optax.ScalarOrSchedule = 0.0, decay: float = 0.9
) -> Gate:
  r"""Where the gradient is larger than usual: the policy of AE-SAM.

  .. math::

    \mu_t = \delta \mu_{t-1} + (1 - \delta) \|g_t\|_2^2, \qquad
    \sigma_t^2 = \delta \sigma_{t-1}^2 + (1 - \delta) (\|g_t\|_2^2 - \mu_t)^2, \qquad
    \|g_t\|_2^2 \ge \mu_t + c_t \sigma_t

  with :math:`\mu_{-1} = 0` and :math:`\sigma_{-1}^2 = e^{-10}`. A step whose
  squared norm is not finite leaves mean and variance as they are.

  Args:
    threshold: :math:`c_t`, a number or a schedule of the step count. The paper
      falls from 1 to -1 over training: ``optax.linear_schedule(1.0, -1.0, total)``.
    decay: :math:`\delta`, in [0, 1).

  Returns:
    A :class:`Gate` for :func:`sometimes`. To decide outside ``jit``, ask it:
    ``gate.update(grads, optax.tree_utils.tree_get(opt_state, "gate"))[0]``.

  Raises:
    ValueError: if decay is outside [0, 1).

  Examples:
    >>> import jax.numpy as jnp
    >>> import asam_jax
    >>> gate = asam_jax.above_average(threshold=1.0)
    >>> state = gate.init(jnp.zeros(2))
    >>> decisions = []
    >>> for norm in (1.0, 1.0, 5.0, 1.0):
    ...   decision, state = gate.update(jnp.array([norm, 0.0]), state)
    ...   decisions.append(bool(decision))
    >>> print(decisions)
    [True, True, True, False]

  References:
    Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
    <https://arxiv.org/abs/2304.14647>`_, 2023
  """
  threshold = _arguments.scalar_or_schedule("threshold", threshold, low=-jnp.inf)
  _arguments.scalar("decay", decay, high=1)

  def init_fn(params):
    del params
    return AboveAverageState(
        count=jnp.zeros((), jnp.int32),
        mean=jnp.zeros((), jnp.float32),
        variance=jnp.exp(jnp.float32(-10)),
    )

  def update_fn(grads, state):
    if jax.tree.leaves(grads):  # of no parameters there is an empty gradient
      _arguments.arrays("grads", grads)
    square = jnp.square(_trees.norm(grads).astype(jnp.float32))
    mean = decay * state.mean + (1 - decay) * square
    variance = decay * state.variance + (1 - decay) * jnp.square(square - mean)
    c = threshold(state.count) if callable(threshold) else threshold
    decision = square >= mean + c * jnp.sqrt(variance)
    usable = jnp.isfinite(variance)
    return decision, AboveAverageState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        mean=jnp.where(usable, mean, state.mean),
        variance=jnp.where(usable, variance, state.variance),
    )

  return Gate(init_fn, update_fn)


def late(total_steps: int, share: float) -> Callable[[Any], Any]:
  r"""The last share of training: a choice of steps for :func:`sometimes`.

  .. math:: t \ge T - \mathrm{round}(s T)

  for the step count t = 0, 1, ... of T steps and the share s. Zhou et al. find that
  SAM in the last 25 of 200 epochs is about as good as SAM throughout: it leaves the
  sharp minimum that SGD has found within a few steps. Then it has to settle in a
  flatter one, so let the share have the learning rate's decay: with a rate that stays
  constant and falls at the end, all of the fall. Under a cosine, on digits with 40 %
  wrong labels, the last half keeps 99 and 89 % of ASAM's gain on an MLP and a CNN, the
  last fifth 61 and 52 % (``results/frontier/frontier.md``).

  Cost: 1 + s gradients a step on average; memory: none.

  Args:
    total_steps: T, the number of steps of the whole training, at least 1.
    share: s, a Python number in [0, 1]; 0 is never, 1 always.

  Returns:
    A function from the step count, a traced scalar or a Python int, to whether it is
    late. Of an int it is a Python bool, for ``update(..., ascend=chosen(step))``, which
    compiles two steps without a branch.

  Raises:
    ValueError: if total_steps is below 1, or share outside [0, 1].
    TypeError: if total_steps is no integer, or share no number that is known when
      the step is traced.

  Examples:
    >>> import optax
    >>> import asam_jax
    >>> chosen = asam_jax.late(total_steps=10, share=0.3)
    >>> print([step for step in range(10) if chosen(step)])
    [7, 8, 9]
    >>> link = asam_jax.perturbed_gradient(asam_jax.ascent(rho=0.5))
    >>> tx = optax.chain(asam_jax.sometimes(link, when=chosen), optax.sgd(0.1))

  References:
    Zhou et al., `Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late
    in Training <https://arxiv.org/abs/2410.10373>`_, 2025
  """
  total_steps = _arguments.count("total_steps", total_steps)
  _arguments.scalar("share", share)
  if not _arguments.is_concrete(share):
    raise TypeError(
        f"share={share!r} must be a Python number: it is known before the first step."
    )
  if float(share) > 1:
    raise ValueError(f"share={share!r} must be in [0, 1], a share of total_steps.")
  first = total_steps - round(float(share) * total_steps)
  return lambda step: step >= first


def _gate_of_step(when: Any) -> Gate:
  """The gate of a function of the step count."""
  if not callable(when):
    raise TypeError(
        f"when={when!r} must be a function of the step count, such as lambda step:"
        " step % 5 == 0, or a Gate, such as above_average()."
    )
  return Gate(
      lambda params: jnp.zeros((), jnp.int32),
      lambda grads, step: (when(step), jnp.asarray(optax.safe_increment(step))),
  )
