"""When to take the second gradient: gates for ``sometimes``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from asam_jax import _arguments
from asam_jax import _trees


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


def gate_of_step(when: Any) -> Gate:
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
