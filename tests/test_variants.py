"""Better and cheaper second gradients, against NumPy transcriptions."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from tests import problems

A = np.array([[3.0, 0.4, -0.2], [0.4, 1.0, 0.3], [-0.2, 0.3, 0.5]])
CENTER = np.array([1.0, -2.0, 0.5])
START = np.array([1.5, 0.7, -0.4])
LR, RHO, ETA = 0.05, 0.3, 0.01


def gradient(w):
  """Of a quadratic with a quartic term."""
  return A @ (w - CENTER) + 0.2 * w**3


def jax_gradient(w):
  return jnp.asarray(A, w.dtype) @ (w - jnp.asarray(CENTER, w.dtype)) + 0.2 * w**3


def epsilon_of(direction, w, p=2.0):
  (epsilon,), _ = problems.oracle_perturbation(
      [direction], [problems.oracle_factor(w, ETA, "elementwise")], RHO, p
  )
  return epsilon


def check(link, step, steps=20):
  """``link`` then SGD against ``step(w, memory) -> (descent gradient, memory)``."""
  w, memory = START, None
  for _ in range(steps):
    g, memory = step(w, memory)
    w = w - LR * g
  with problems.enable_x64(True):
    tx = optax.chain(link, optax.sgd(LR))
    params = jnp.asarray(START)
    state = tx.init(params)

    @jax.jit
    def jax_step(params, state):
      updates, state = tx.update(
          jax_gradient(params), state, params, grad_fn=jax_gradient
      )
      return optax.apply_updates(params, updates), state

    for _ in range(steps):
      params, state = jax_step(params, state)
    np.testing.assert_allclose(params, w, rtol=1e-9)


def asam(p=2.0):
  return asam_jax.perturbed_gradient(asam_jax.ascent(RHO, ETA, p))


def test_vasso_against_numpy():
  theta = 0.8  # the share of the past

  def step(w, d):
    d = theta * (np.zeros(3) if d is None else d) + (1 - theta) * gradient(w)
    return gradient(w + epsilon_of(d, w)), d

  chain = optax.chain(optax.ema(theta), asam_jax.ascent(RHO, ETA))
  check(asam_jax.perturbed_gradient(chain), step)


@pytest.mark.parametrize("sigma", [1.0, 0.6])
def test_friendly_sam_against_numpy(sigma):
  decay = 0.9

  def step(w, m):
    g = gradient(w)
    d = g if m is None else g - sigma * m
    m = g if m is None else decay * m + (1 - decay) * g
    return gradient(w + epsilon_of(d, w)), m

  chain = optax.chain(
      asam_jax.subtract_ema(decay, sigma), asam_jax.ascent(RHO, ETA)
  )
  check(asam_jax.perturbed_gradient(chain), step)


def test_friendly_sams_average_is_of_the_gradients():
  link = asam_jax.subtract_ema(0.9)
  state, update = link.init(jnp.zeros(())), jax.jit(link.update)
  averages, rests = [], []
  for g in (1.0, 2.0, 2.0, 2.0):
    rest, state = update(np.float32(g), state)
    averages.append(float(state.ema))
    rests.append(float(rest))
  np.testing.assert_allclose(averages, [1.0, 1.1, 1.19, 1.271], rtol=1e-6)
  np.testing.assert_allclose(rests, [1.0, 1.0, 0.9, 0.81], rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_gsam_against_numpy(alpha):
  def step(w, _):
    g = gradient(w)
    h = gradient(w + epsilon_of(g, w))
    cosine = g @ h / np.linalg.norm(g) / np.linalg.norm(h)
    orthogonal = g - np.linalg.norm(g) * cosine * h / np.linalg.norm(h)
    return h - alpha * orthogonal, None

  check(asam_jax.combined(asam(), asam_jax.surrogate_gap(alpha)), step)


@pytest.mark.parametrize("alpha", [0.3, 1.5])
def test_weighted_mean_against_numpy(alpha):
  def step(w, _):
    g = gradient(w)
    return (1 - alpha) * g + alpha * gradient(w + epsilon_of(g, w)), None

  def weighted(clean, perturbed):
    return jax.tree.map(lambda g, h: g + alpha * (h - g), clean, perturbed)

  check(asam_jax.combined(asam(), weighted), step)


def test_stable_sam_against_numpy():
  def step(w, _):
    g = gradient(w)
    h = gradient(w + epsilon_of(g, w))
    return np.linalg.norm(g) / np.linalg.norm(h) * h, None

  check(asam_jax.combined(asam(), asam_jax.renormalized), step)


@pytest.mark.parametrize(("p", "count"), [(1, 4), (2, 1), (2, 4), (math.inf, 3)])
def test_iterated_against_numpy(p, count):
  def step(w, _):
    epsilon = epsilon_of(gradient(w), w, p)
    for i in range(1, count):
      target = epsilon_of(gradient(w + epsilon), w, p)
      epsilon = epsilon + 2 / (i + 2) * (target - epsilon)
    return gradient(w + epsilon), None

  ascent_tx = asam_jax.iterated(asam_jax.ascent(RHO, ETA, p), count)
  check(asam_jax.perturbed_gradient(ascent_tx), step)


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_iterated_stays_in_the_ball_and_climbs_higher(p):
  # On a convex loss with a zero among the weights, with eta = 0.
  hessian = np.diag(np.float32([0.1, 1.0, 9.0, 0.3])) + np.float32(0.5)
  loss = lambda w: 0.5 * w @ hessian @ w  # noqa: E731

  @jax.jit
  def climbed(w):
    """(epsilon, height) for each number of steps."""
    results = []
    for steps in (1, 2, 10):
      tx = asam_jax.iterated(asam_jax.ascent(0.4, 0.0, p), steps)
      epsilon, _ = tx.update(
          jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss)
      )
      results.append((epsilon, loss(w + epsilon)))
    return results

  w, nonzero = np.float32([1.0, 0.0, -0.7, 2.0]), [0, 2, 3]
  results = jax.tree.map(np.asarray, climbed(w))
  for epsilon, _ in results:
    assert epsilon[1] == 0
    radius = problems.oracle_norm([epsilon[nonzero] / w[nonzero]], p)
    assert radius <= 0.4 * (1 + 1e-6)
  assert results[-1][1] >= results[0][1] * (1 - 1e-6)


def test_iterated_keeps_the_count_of_steps():
  tx = asam_jax.iterated(asam_jax.ascent(lambda count: 0.1 * (count + 1)), 3)
  w = jnp.array([1.0, 2.0])
  state = tx.init(w)
  step = jax.jit(lambda state: tx.update(w, state, w, grad_fn=lambda w: w)[1])
  for _ in range(2):
    state = step(state)
  assert state.count == 2


@functools.cache
def network():
  """Two dense layers with a norm's scale between them: (loss, params, batch)."""
  rng = np.random.default_rng(0)
  params = {
      "dense0": 0.1 * rng.normal(size=(64, 128)).astype(np.float32),
      "scale": np.ones(128, np.float32),
      "dense1": 0.1 * rng.normal(size=(128, 128)).astype(np.float32),
  }
  x = rng.normal(size=(128, 64)).astype(np.float32)

  def loss(params, x):
    hidden = x @ params["dense0"]
    hidden = params["scale"] * hidden / (1e-3 + hidden.std(0))
    return jnp.mean((jax.nn.relu(hidden) @ params["dense1"]) ** 2)

  return loss, params, x


def flops(step, *args):
  return flops_of(jax.jit(step).lower(*args).compile())


def flops_of(compiled):
  analysis = compiled.cost_analysis()
  assert analysis is not None
  return analysis["flops"]


def test_ascent_on_a_part_of_the_batch():
  # The composition: the part's gradient as grads, the whole batch's as grad_fn.
  loss, params, x = network()
  fraction = 0.25
  part = x[: int(fraction * len(x))]
  tx = optax.chain(asam_jax.perturbed_gradient(asam_jax.ascent()), optax.sgd(0.1))
  state = tx.init(params)

  def step(params, state, x, part):
    updates, _ = tx.update(
        jax.grad(loss)(params, part), state, params,
        grad_fn=lambda params: jax.grad(loss)(params, x),
    )
    return optax.apply_updates(params, updates)

  def sgd(params, x):
    grads = jax.grad(loss)(params, x)
    return jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)

  grad_fn = jax.jit(jax.grad(loss))
  ascent_tx = asam_jax.ascent()
  epsilon, _ = jax.jit(ascent_tx.update)(
      grad_fn(params, part), ascent_tx.init(params), params
  )
  grads = grad_fn(jax.tree.map(np.add, params, epsilon), x)
  expected = jax.tree.map(lambda w, g: w - 0.1 * np.asarray(g), params, grads)
  compiled = jax.jit(step).lower(params, state, x, part).compile()
  got = compiled(params, state, x, part)
  chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-7)
  ratio = flops_of(compiled) / flops(sgd, params, x)
  assert 1 + fraction <= ratio <= 1 + fraction + 0.04


def test_ascent_differentiates_only_what_is_perturbed():
  # SAM-ON: what the ascent does not need is not computed, in both doors.
  loss, params, x = network()
  only_norms = lambda path, leaf: leaf.ndim == 1  # noqa: E731

  def door(perturb):
    tx = asam_jax.adaptive_sam(optax.sgd(0.1), perturb=perturb)

    def step(params, state, x):
      grad_fn = lambda params: jax.grad(loss)(params, x)  # noqa: E731
      return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)

    def function(params, x):
      return asam_jax.grad(loss, perturb=perturb)(params, x)

    return flops(step, params, tx.init(params), x), flops(function, params, x)

  sgd = flops(lambda params, x: jax.grad(loss)(params, x), params, x)
  for everything, norms in zip(door(None), door(only_norms), strict=True):
    assert everything > 1.9 * sgd
    assert norms < 1.7 * sgd


def test_sam_on_moves_only_the_chosen_leaves():
  loss, params, x = network()
  tx = asam_jax.ascent(perturb=lambda path, leaf: leaf.ndim == 1)
  epsilon, _ = jax.jit(
      lambda params: tx.update(jax.grad(loss)(params, x), tx.init(params), params)
  )(params)
  epsilon = jax.tree.map(np.asarray, epsilon)
  assert np.abs(epsilon["scale"]).max() > 0
  assert not epsilon["dense0"].any()
  assert not epsilon["dense1"].any()


half_gap = jax.jit(asam_jax.surrogate_gap(0.5))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_gsam_at_any_scale(scale):
  # Squares of such gradients leave float32.
  clean, perturbed = np.array([1.0, 1.0]), np.array([2.0, 0.0])
  got = half_gap(np.float32(scale * clean), np.float32(scale * perturbed))
  np.testing.assert_allclose(got / scale, [2.0, -0.5], rtol=1e-6)


def test_gsam_in_half_precision():
  clean = np.full(4096, 300.0, np.float16)
  perturbed = np.where(np.arange(4096) > 0, clean, np.float16(0))
  # Not compiled as a whole: XLA may then compute in float32 of its own accord.
  got = asam_jax.surrogate_gap(1.0)(jnp.asarray(clean), jnp.asarray(perturbed))
  assert got.dtype == jnp.float16
  np.testing.assert_allclose(np.asarray(got, np.float32)[:2], [-300, 300], rtol=2e-3)


def test_gsam_of_a_zero_gradient():
  zero, one = np.float32([0.0, 0.0]), np.float32([1.0, 0.0])
  np.testing.assert_array_equal(half_gap(zero, zero), zero)
  np.testing.assert_array_equal(half_gap(zero, one), one)
  np.testing.assert_array_equal(half_gap(one, zero), -0.5 * one)


stable = jax.jit(asam_jax.renormalized)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_stable_sam_at_any_scale(scale):
  # Squares of such gradients leave float32.
  clean = {"a": np.float32([3 * scale]), "b": np.float32([4 * scale])}
  perturbed = {"a": np.float32([0.0]), "b": np.float32([-7 * scale])}
  got = stable(clean, perturbed)
  np.testing.assert_allclose(got["b"] / scale, [-5.0], rtol=1e-6)
  assert got["a"] == 0


def test_stable_sam_in_half_precision():
  clean = jnp.full(4096, 300.0, jnp.float16)  # whose squares overflow
  got = asam_jax.renormalized(clean, -2 * clean)
  assert got.dtype == jnp.float16
  np.testing.assert_array_equal(got, -clean)


def test_stable_sam_of_a_zero_gradient():
  zero, one = np.float32([0.0, 0.0]), np.float32([1.0, 0.0])
  for clean, perturbed in ((zero, zero), (zero, one), (one, zero)):
    np.testing.assert_array_equal(stable(clean, perturbed), zero)
  assert np.isnan(stable(one, np.nan * one)).all()


def test_errors():
  with pytest.raises(ValueError, match=r"decay=1\.0"):
    asam_jax.subtract_ema(1.0)
  for steps, error in ((0, ValueError), (1.5, TypeError)):
    with pytest.raises(error, match=f"steps={steps}"):
      asam_jax.iterated(asam_jax.ascent(), steps)  # pyright: ignore
  tx = asam_jax.iterated(asam_jax.ascent(), 2)
  w = jnp.ones(2)
  with pytest.raises(ValueError, match="params=None"):
    tx.update(w, tx.init(w), grad_fn=lambda w: w)
  with pytest.raises(ValueError, match="grad_fn=None"):
    tx.update(w, tx.init(w), w)
  with pytest.raises(TypeError, match="has_aux"):
    tx.update(w, tx.init(w), w, grad_fn=lambda w: (w, 1.0))
