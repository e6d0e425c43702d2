"""What the tests share: the NumPy oracle, test problems, the optimizer table."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import asam_jax

# jax.enable_x64 is new, and the experimental name is deprecated since.
if hasattr(jax, "enable_x64"):
  enable_x64 = jax.enable_x64
else:
  from jax.experimental import enable_x64  # pyright: ignore # noqa: F401


# The oracle: the equations in float64 NumPy, for a flat list of leaves.


def oracle_factor(w: Any, eta: float, operator: str, filter_axis: int = -1) -> Any:
  """The diagonal of T_w for one leaf."""
  w = np.asarray(w, np.float64)
  if operator == "none":
    return np.ones_like(w)
  if operator == "layerwise":
    return np.full_like(w, math.sqrt(float((w * w).sum())) + eta)
  if operator == "filterwise" and w.ndim >= 3:
    filters = np.moveaxis(w, filter_axis, 0)
    result = np.empty_like(filters)
    for index, one in enumerate(filters):
      result[index] = np.linalg.norm(one.ravel()) + eta
    return np.moveaxis(result, 0, filter_axis)
  return np.abs(w) + eta


def oracle_norm(xs: list[Any], p: float) -> float:
  flat = np.concatenate([np.abs(np.asarray(x, np.float64)).ravel() for x in xs])
  return float(np.linalg.norm(flat, p))


def oracle_perturbation(
    gs: list[Any], ts: list[Any], rho: float, p: float
) -> tuple[list[Any], float]:
  """(epsilon, rho ||T g||_q) from the formulas of the paper."""
  gs = [np.asarray(g, np.float64) for g in gs]
  tgs = [t * g for t, g in zip(ts, gs, strict=True)]
  q = math.inf if p == 1 else 1.0 if math.isinf(p) else p / (p - 1)
  norm = oracle_norm(tgs, q)
  if norm == 0:
    return [np.zeros_like(g) for g in gs], 0.0
  if p == 1:
    epsilons = [np.zeros_like(g) for g in gs]
    for epsilon, tg, t in zip(epsilons, tgs, ts, strict=True):
      hits = np.flatnonzero(np.abs(tg).ravel() == norm)
      if hits.size:
        here = np.unravel_index(hits[0], tg.shape)
        epsilon[here] = rho * t[here] * np.sign(tg[here])
        break
    return epsilons, rho * norm
  return [
      rho * t * np.sign(g) * (np.abs(tg) / norm) ** (q - 1)
      for g, t, tg in zip(gs, ts, tgs, strict=True)
  ], rho * norm


def oracle_point(params: Any, grads: Any, rho: float) -> Any:
  """The point w + epsilon at p = 2, eta = 0.01; where the path says bias, T = 1."""
  pairs, form = jax.tree_util.tree_flatten_with_path(params)
  factors = [
      oracle_factor(w, 0.01, "none" if "bias" in jax.tree_util.keystr(path)
                    else "elementwise")
      for path, w in pairs
  ]
  epsilon, _ = oracle_perturbation(jax.tree.leaves(grads), factors, rho, 2)
  moved = [w + np.asarray(e, np.float32)
           for (_, w), e in zip(pairs, epsilon, strict=True)]
  return jax.tree.unflatten(form, moved)


# Problems that optimizers must solve.


class Problem(NamedTuple):
  """A loss of a pytree with its start and the loss to get below."""

  loss: Callable[[Any], jax.Array]
  start: Any
  goal: float


def rosenbrock() -> Problem:
  def loss(params):
    x, y = params["x"], params["y"]
    return (1 - x) ** 2 + 100.0 * (y - x**2) ** 2

  start = {"x": jnp.array(-0.5), "y": jnp.array(0.8)}
  return Problem(loss, start, goal=0.05)


def quadratic() -> Problem:
  target = jnp.array([1.0, -2.0, 3.0])

  def loss(params):
    return jnp.sum((params["w"] - target) ** 2) + jnp.sum(params["bias"] ** 2)

  return Problem(loss, {"w": jnp.ones(3), "bias": jnp.ones(2)}, goal=0.01)


def regression() -> Problem:
  """A small ReLU network with a kernel of rank 4, one of rank 2 and biases."""
  rng = np.random.default_rng(0)

  def normal(*shape, scale=1.0):
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

  x = normal(16, 6, 6, 1)
  y = np.sin(np.sum(x, (1, 2, 3)))
  start = {
      "conv": {"kernel": normal(3, 3, 1, 4, scale=0.4), "bias": jnp.zeros(4)},
      "dense": {"kernel": normal(64, 1, scale=0.3), "bias": jnp.zeros(1)},
  }

  def loss(params):
    hidden = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1, 1), "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    hidden = jax.nn.relu(hidden + params["conv"]["bias"]).reshape(16, -1)
    out = hidden @ params["dense"]["kernel"] + params["dense"]["bias"]
    return jnp.mean((out[:, 0] - y) ** 2)

  return Problem(loss, start, goal=0.1)


PROBLEMS = {
    "quadratic": quadratic,
    "rosenbrock": rosenbrock,
    "regression": regression,
}


# The table of optimizers: one row for each. `make(base_tx, rho)` returns the
# optimizer. A row holds for every property in test_properties.py.


class Row(NamedTuple):
  """One optimizer: ``make(base_tx, rho)``, a usual rho, gradients per step.

  One without ``grad_fn`` carries its perturbation in the parameters.
  """

  make: Callable[..., optax.GradientTransformationExtraArgs]
  rho: float
  needs_grad_fn: bool = True
  with_info: bool = False

  def clean(self, params: Any, state: Any) -> Any:
    return params if self.needs_grad_fn else asam_jax.eval_params(state)


def _adaptive(**options: Any) -> Callable[..., Any]:
  return lambda base_tx, rho: asam_jax.adaptive_sam(base_tx, rho, **options)


def _look_sam(base_tx: Any, rho: Any) -> Any:
  return asam_jax.looksam(base_tx, rho, k=2, alpha=0.1)


def _composed(base_tx: Any, rho: Any) -> Any:
  """Friendly SAM in two ascent steps, as GSAM, where AE-SAM's policy says so."""
  ascent_tx = optax.chain(asam_jax.subtract_ema(0.9), asam_jax.ascent(rho))
  link = asam_jax.perturbed_gradient(asam_jax.iterated(ascent_tx, 2))
  link = asam_jax.combined(link, asam_jax.surrogate_gap(0.2))
  return optax.chain(asam_jax.sometimes(link, asam_jax.above_average()), base_tx)


def _late(base_tx: Any, rho: Any) -> Any:
  link = asam_jax.perturbed_gradient(asam_jax.ascent(rho))
  return optax.chain(asam_jax.sometimes(link, asam_jax.late(4, 0.75)), base_tx)


def _stable_sam(base_tx: Any, rho: Any) -> Any:
  link = asam_jax.perturbed_gradient(asam_jax.ascent(rho))
  return optax.chain(asam_jax.combined(link, asam_jax.renormalized), base_tx)


def _weighted_mean(base_tx: Any, rho: Any) -> Any:
  link = asam_jax.perturbed_gradient(asam_jax.ascent(rho))
  mean = lambda g, h: jax.tree.map(lambda g, h: g + 1.5 * (h - g), g, h)  # noqa: E731
  return optax.chain(asam_jax.combined(link, mean), base_tx)


def _auto_radius(base_tx: Any, rho: Any) -> Any:
  """Its target is near 1, so that it stays as small as the table's radii."""
  return asam_jax.adaptive_sam(base_tx, asam_jax.auto_radius(0.999) if rho else 0.0)


def _loss_budget(base_tx: Any, rho: Any) -> Any:
  return asam_jax.adaptive_sam(base_tx, asam_jax.loss_budget(rho, rho_max=0.01))


OPTIMIZERS: dict[str, Row] = {
    "asam": Row(_adaptive(), 0.01),
    "asam_p1": Row(_adaptive(p=1), 0.01),
    "asam_p3": Row(_adaptive(p=3), 0.01),
    "asam_pinf": Row(_adaptive(p=math.inf), 0.002),
    "asam_filterwise": Row(_adaptive(normalization="filterwise"), 0.01),
    "sam": Row(lambda base_tx, rho: asam_jax.sam(base_tx, rho), 0.01),
    "chain_of_links": Row(
        lambda base_tx, rho: optax.chain(
            asam_jax.perturbed_gradient(
                optax.chain(optax.ema(0.9), asam_jax.ascent(rho))
            ),
            base_tx,
        ),
        0.01,
    ),
    "carried": Row(
        lambda base_tx, rho: asam_jax.carried(base_tx, asam_jax.ascent(rho)),
        0.01,
        needs_grad_fn=False,
    ),
    "momentum_sam": Row(
        lambda base_tx, rho: asam_jax.momentum_sam(base_tx, rho),
        0.01,
        needs_grad_fn=False,
    ),
    "look_sam": Row(_look_sam, 0.03),
    "ae_sam": Row(asam_jax.ae_sam, 0.01),
    "gsam": Row(lambda base_tx, rho: asam_jax.gsam(base_tx, rho, 0.2), 0.01),
    "friendly_sam": Row(asam_jax.friendly_sam, 0.01),
    "vasso": Row(asam_jax.vasso, 0.01),
    "late": Row(_late, 0.01),
    "stable_sam": Row(_stable_sam, 0.01),
    "weighted_mean": Row(_weighted_mean, 0.01),
    "composed": Row(_composed, 0.01),
    "auto_radius": Row(_auto_radius, 0.01),
    "loss_budget": Row(_loss_budget, 0.01),
}


def step_function(
    tx: Any, loss: Callable[..., Any], row: Row
) -> Callable[..., tuple[Any, Any]]:
  """``(params, state) -> (params, state)``, as a user would write it."""

  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    extra = {"value": value, "value_fn": loss} if row.with_info else {}
    if row.needs_grad_fn and not extra:
      extra = {"grad_fn": jax.grad(loss)}
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state

  return step
