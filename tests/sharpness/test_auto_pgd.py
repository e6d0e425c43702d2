"""Auto-PGD against a transcription of its algorithm (Croce and Hein) into NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asam_jax import Geometry
from asam_jax import sharpness
from asam_jax.sharpness import _worst_case
from tests import problems

RHO, N = 1.0, 3


def waves(seed, frequency):
  """(value, gradient) of a tilted sum of waves, in NumPy, and its loss in JAX."""
  rng = np.random.default_rng(seed)
  directions = frequency * rng.normal(size=(4, N))
  phases, slope = rng.uniform(0, 6, 4), rng.normal(size=N)

  def value(w):
    return float(np.sin(directions @ w + phases).sum() + slope @ w)

  def gradient(w):
    return directions.T @ np.cos(directions @ w + phases) + slope

  def loss(w):
    return jnp.sin(jnp.array(directions) @ w + jnp.array(phases)).sum() + slope @ w

  return value, gradient, loss


def project(x, p):
  if p == 2:
    return x * min(1, RHO / max(np.linalg.norm(x), 1e-300))
  return np.clip(x, -RHO, RHO)


def ascend(g, p):
  return g / np.linalg.norm(g) if p == 2 else np.sign(g)


def checkpoints(steps):
  """w_j = ceil(p_j steps); p_0 = 0, p_1 = 0.22, gaps less 0.03, at least 0.06."""
  p, result = [0, 22], []  # in percent, so that nothing is rounded
  while p[-1] < 100:
    p.append(p[-1] + max(p[-1] - p[-2] - 3, 6))
  for share in p[1:]:
    at = -(-share * steps // 100)
    if at < steps:
      result.append(at)
  return result


def auto_pgd(value, gradient, w, p, steps):
  """(values at all iterates, for each checkpoint: share of rises, what decided)."""
  x = x_before = np.zeros(N)
  x_best, best = x, value(w)
  step, values, here = 2 * RHO, [best], best
  improved, halved, best_then, last = 0, True, -np.inf, 0
  decisions = []
  for k in range(steps):
    z = project(x + step * ascend(gradient(w + x), p), p)
    mixed = project(x + 0.75 * (z - x) + 0.25 * (x - x_before), p)
    x_before, x = x, z if k == 0 else mixed
    values.append(value(w + x))
    improved += values[-1] > here
    here = values[-1]
    if values[-1] > best:
      x_best, best = x, values[-1]
    if k + 1 in checkpoints(steps):
      few = improved < 0.75 * (k + 1 - last)
      no_better = best == best_then
      stalled = no_better and not halved
      rule = "few" if few else "stalled" if stalled else (
          "spared" if no_better else "kept")
      decisions.append((improved / (k + 1 - last), rule))
      halved = few or stalled
      if halved:
        step /= 2
        x, here = x_best, best
        x_before = x  # our own: the paper keeps the momentum here
      improved, best_then, last = 0, best, k + 1
  return np.array(values), decisions


# (seed, frequency), found by a search: each rule decides, and shares of rising steps
# lie close to 0.75 on both sides.
FUNCTIONS = {
    2: [(165, 1.2), (3855, 2.0), (66, 2.0)],
    math.inf: [(3942, 2.0), (3893, 0.7), (2064, 2.0)],
}


@pytest.mark.parametrize("p", FUNCTIONS)
def test_every_iterate(p):
  shares, rules = [], set()
  with problems.enable_x64(True):
    for seed, frequency in FUNCTIONS[p]:
      value, gradient, loss = waves(seed, frequency)
      w = np.random.default_rng(seed + 10).normal(size=N)
      expected, decisions = auto_pgd(value, gradient, w, p, steps=50)
      result = jax.jit(lambda w, loss=loss: sharpness.worst_case(
          loss, w, RHO, geometry=Geometry(p=p, normalization="none"), steps=50,
          restarts=0))(jnp.array(w))
      np.testing.assert_allclose(
          result.trace[0], expected - expected[0], rtol=1e-6, atol=1e-8)
      shares += [share for share, _ in decisions]
      rules |= {rule for _, rule in decisions}
  # Spared: no better, but it had just been halved.
  assert rules == {"few", "stalled", "kept", "spared"}
  assert any(0.66 < share < 0.75 for share in shares)
  assert any(0.75 <= share < 0.84 for share in shares)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 33, 50, 100, 250])
def test_checkpoints(steps):
  assert _worst_case.checkpoints(steps) == sorted(set(checkpoints(steps)))


def test_checkpoints_of_a_hundred_steps():
  # 0.22, then gaps of 0.19, 0.16, 0.13, 0.10, 0.07, 0.06, 0.06.
  assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
