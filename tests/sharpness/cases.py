# ruff: noqa: E731  (one line reads best as a lambda)
"""What these tests share: a quadratic, a ReLU network, and exact oracles."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

WIDTHS = (5, 8, 6, 3)


def every_leaf(path: Any, leaf: Any) -> bool:
  del path, leaf
  return True


def quadratic(seed: int, n: int, definite: bool):
  """(loss, w, gradient, Hessian) in float64 NumPy; w has no zero entry."""
  rng = np.random.default_rng(seed)
  root = rng.normal(size=(n, n))
  hessian = root @ root.T / n if definite else (root + root.T) / 2
  w = rng.uniform(0.5, 1.5, n) * rng.choice([-1, 1], n)
  slope = rng.normal(size=n)

  def loss(x):
    d = x["w"] - jnp.asarray(w, x["w"].dtype)
    return jnp.asarray(slope, d.dtype) @ d + d @ (jnp.asarray(hessian, d.dtype) @ d) / 2

  return loss, {"w": jnp.array(w)}, slope, hessian


def max_in_ball(slope, hessian, rho: float) -> float:
  """Maximum of slope.d + d.H.d / 2 over ||d||_2 <= rho, by the secular equation."""
  values, vectors = np.linalg.eigh(hessian)
  g = vectors.T @ slope
  top = max(values[-1], 0.0)

  def excess(multiplier):
    return np.linalg.norm(g / (multiplier - values)) - rho

  if values[-1] < 0 and excess(0.0) <= 0:
    multiplier = 0.0  # the maximum lies inside
  else:
    near = top + 1e-9 * (1 + top)
    assert excess(near) > 0, "the hard case; not for this oracle"
    multiplier = optimize.brentq(excess, near, top + 2 * np.linalg.norm(g) / rho)
  d = g / (multiplier - values)
  return float(g @ d + d @ (values * d) / 2)


def max_in_box(slope, hessian, rho: float) -> float:
  """The same over ||d||_inf <= rho for a convex quadratic: at a corner."""
  corners = rho * np.array(list(itertools.product([-1, 1], repeat=len(slope))))
  return float(np.max(corners @ slope + np.einsum(
      "ci,ij,cj->c", corners, hessian, corners) / 2))


def max_in_diamond(slope, hessian, rho: float) -> float:
  """The same over ||d||_1 <= rho for a convex quadratic: at a corner."""
  return float(np.max(rho * np.abs(slope) + rho**2 * np.diag(hessian) / 2))


def network(seed: int = 0, widths: tuple[int, ...] = WIDTHS, dtype: Any = np.float32):
  """(params, batch) of a ReLU network with nonzero biases."""
  # One draw of one length for all arrays, for each shape would be compiled.
  rows, y = _draw(seed, 2 * len(widths), widths[-1])
  rows = iter(np.asarray(rows))
  take = lambda *shape: next(rows)[: np.prod(shape)].reshape(shape)
  params = [
      {"kernel": take(a, b) / np.sqrt(a), "bias": 0.3 * take(b)}
      for a, b in itertools.pairwise(widths)
  ]
  params, x = jax.tree.map(
      lambda leaf: jnp.asarray(leaf, dtype), (params, take(24, widths[0])))
  return params, (x, y)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(seed, arrays, classes):
  keys = jax.random.split(jax.random.key(seed), arrays)
  rows = jax.vmap(lambda key: jax.random.normal(key, (128,), jnp.float32))(keys)
  return rows, jax.random.randint(keys[-1], (24,), 0, classes, jnp.int32)


def predict(params, x):
  for i, layer in enumerate(params):
    x = x @ layer["kernel"] + layer["bias"]
    if i + 1 < len(params):
      x = jax.nn.relu(x)
  return x


def network_loss(batch):
  x, y = batch

  def loss(params):
    logits = jax.nn.log_softmax(predict(params, x))
    return -jnp.mean(jnp.take_along_axis(logits, y[:, None], 1))

  return loss


def rescaled(params, seed: int = 0, largest: float = 10.0):
  """Aw: every hidden node by its own factor in [1 / largest, largest]."""
  rng = np.random.default_rng(seed)
  result = jax.tree.map(np.asarray, params)
  for before, after in itertools.pairwise(result):
    c = np.exp(rng.uniform(-1, 1, before["bias"].shape) * np.log(largest))
    before["kernel"] = before["kernel"] * c
    before["bias"] = before["bias"] * c
    after["kernel"] = after["kernel"] / c[:, None]
  return jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), result, params)
