"""The perturbation against the equations, and what makes it the right one."""

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from tests import problems

EXPONENTS = [1, 1.2, 1.5, 2, 3, 7, math.inf]
OPERATORS = ["elementwise", "filterwise", "layerwise", "none"]
SHAPES = [(3, 3, 2, 4), (5, 4), (6,), (), (2, 3, 4), (1,)]
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@functools.cache
def random_tree(leaves, dtypes=DTYPES, seed=0):
  """Weights and gradients with leaves of mixed rank, dtype and name."""
  rng = np.random.default_rng(seed)
  params, grads = {}, {}
  for i in range(leaves):
    shape, dtype = SHAPES[i % len(SHAPES)], dtypes[i % len(dtypes)]
    name = "bias" if i % 5 == 4 and len(shape) <= 2 else "kernel"
    params[f"layer{i:02d}"] = {name: jnp.asarray(rng.normal(size=shape), dtype)}
    grads[f"layer{i:02d}"] = {name: jnp.asarray(rng.normal(size=shape), dtype)}
  return params, grads


def factors(params, eta, operator):
  """T of every leaf by the oracle, under the official selection."""
  return [
      problems.oracle_factor(w, eta, "none" if "bias" in layer else operator)
      for layer in params.values()
      for w in layer.values()
  ]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("p", EXPONENTS)
def test_perturbation_is_the_oracles(p, operator):
  tx = asam_jax.ascent(0.7, 0.01, p, normalization=operator)
  for leaves in (1, 7, 20):  # every shape, dtype and name
    params, grads = random_tree(leaves)
    epsilon, state = tx.update(grads, tx.init(params), params)
    ts = factors(params, 0.01, operator)
    expected, sharpness = problems.oracle_perturbation(
        jax.tree.leaves(grads), ts, 0.7, p
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(epsilon, params)
    for got, want in zip(jax.tree.leaves(epsilon), expected, strict=True):
      # One rounding to the leaf's dtype, and float32 arithmetic before it.
      rtol = max(float(jnp.finfo(got.dtype).eps), 2e-5)
      atol = 1e-7 if got.dtype == jnp.float16 else 1e-12  # float16's denormals
      np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol, atol)
    np.testing.assert_allclose(state.sharpness, sharpness, rtol=1e-5)
    assert state.count == 1


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("p", EXPONENTS)
def test_perturbation_has_radius_rho(p, operator):
  params, grads = random_tree(9, (jnp.float32,))
  tx = asam_jax.ascent(0.3, 0.1, p, normalization=operator)
  epsilon, _ = tx.update(grads, tx.init(params), params)
  ts = factors(params, 0.1, operator)
  scaled = [
      np.asarray(e, np.float64) / t
      for e, t in zip(jax.tree.leaves(epsilon), ts, strict=True)
  ]
  np.testing.assert_allclose(problems.oracle_norm(scaled, p), 0.3, rtol=2e-5)


@pytest.mark.parametrize("p", EXPONENTS)
def test_no_feasible_point_does_better(p):
  params, grads = random_tree(6, (jnp.float32,))
  rho = 0.3
  tx = asam_jax.ascent(rho, 0.01, p)
  epsilon, state = tx.update(grads, tx.init(params), params)

  def flat(tree):
    return np.concatenate(
        [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    )

  g, t = flat(grads), flat(factors(params, 0.01, "elementwise"))
  value = flat(epsilon) @ g
  np.testing.assert_allclose(value, state.sharpness, rtol=1e-5)

  # On the sphere of radius rho, in every degree of concentration.
  rng = np.random.default_rng(0)
  deltas = rng.normal(size=(10_000, g.size))
  deltas = np.sign(deltas) * np.abs(deltas) ** rng.uniform(0, 6, (10_000, 1))
  deltas *= rho / np.linalg.norm(deltas, p, axis=1, keepdims=True)
  assert value >= ((deltas * t) @ g).max()
  # The same with all signs right, which is harder to beat.
  assert value >= ((np.abs(deltas) * t) @ np.abs(g)).max() * (1 - 1e-6)

  # Ascent with a retraction to the sphere, from many starts.
  for delta in deltas[:20]:
    for _ in range(200):
      delta = delta + 0.05 * t * g
      delta *= rho / np.linalg.norm(delta, p)
      assert value >= (delta * t) @ g * (1 - 1e-6)


def test_p1_takes_the_first_of_equals():
  params = {"a": jnp.ones(3), "b": jnp.ones(3)}
  grads = {"a": jnp.array([1.0, -2.0, 2.0]), "b": jnp.array([2.0, 0.0, 0.0])}
  tx = asam_jax.ascent(0.5, 0.0, 1)
  epsilon, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  chex.assert_trees_all_equal(
      epsilon, {"a": jnp.array([0.0, -0.5, 0.0]), "b": jnp.zeros(3)}
  )


def test_filter_axis():
  rng = np.random.default_rng(0)
  w, g = rng.normal(size=(2, 4, 3, 3, 5)).astype(np.float32)
  for axis in (-1, 0, 1):
    operator = functools.partial(asam_jax.filterwise, filter_axis=axis)
    tx = asam_jax.ascent(0.5, 0.1, normalization=operator)
    epsilon, _ = jax.jit(tx.update)(g, tx.init(w), w)
    t = problems.oracle_factor(w, 0.1, "filterwise", axis)
    (expected,), _ = problems.oracle_perturbation([g], [t], 0.5, 2)
    np.testing.assert_allclose(epsilon, expected, rtol=2e-5)


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_own_operator(p):
  params, grads = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, {"w": np.ones((2, 2))}

  def columnwise(w, eta):
    return jnp.max(jnp.abs(w), axis=0) + eta

  tx = asam_jax.ascent(0.5, 1.0, p, normalization=columnwise)
  epsilon, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  t = np.broadcast_to([4.0, 5.0], (2, 2))
  (expected,), _ = problems.oracle_perturbation([np.ones((2, 2))], [t], 0.5, p)
  np.testing.assert_allclose(epsilon["w"], expected, rtol=1e-5)


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_own_operator_is_called_at_every_update_without_jit(p):
  @dataclasses.dataclass
  class Scaled:
    factor: Any

    def __call__(self, w, eta):
      return self.factor * jnp.abs(w) + eta

  w, g = jnp.array([1.0, 2.0]), jnp.array([1.0, 1.5])
  operator = Scaled(jnp.array([1.0, 1.0]))
  for own in (operator, operator, Scaled(jnp.array([1.0, 5.0]))):
    operator.factor = operator.factor * 3
    tx = asam_jax.ascent(0.5, 0.0, p, normalization=own)
    epsilon, _ = tx.update(g, tx.init(w), w)
    t = np.asarray(own.factor) * w
    (expected,), _ = problems.oracle_perturbation([g], [t], 0.5, p)
    np.testing.assert_allclose(epsilon, expected, rtol=1e-5)


def test_own_operator_must_broadcast():
  w = jnp.ones((2, 3))
  for shape in ((2,), (4, 2, 3)):
    tx = asam_jax.ascent(normalization=lambda w, eta, shape=shape: jnp.ones(shape))
    with pytest.raises(ValueError, match="broadcast to the leaf"):
      tx.update(w, tx.init(w), w)


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_small_trees(p):
  tx = asam_jax.ascent(0.5, 0.0, p)
  for empty in ({}, (), {"a": None}):
    epsilon, state = tx.update(empty, tx.init(empty), empty)
    assert epsilon == empty
    assert state.sharpness == 0
  one = jnp.array(-2.0)
  epsilon, _ = tx.update(jnp.array(3.0), tx.init(one), one)
  np.testing.assert_allclose(epsilon, 1.0, rtol=1e-6)
  params = {"a": None, "w": jnp.array([1.0, 1.0]), "none": jnp.zeros((0, 3))}
  grads = {"a": None, "w": jnp.array([0.0, 3.0]), "none": jnp.zeros((0, 3))}
  epsilon, _ = tx.update(grads, tx.init(params), params)
  assert epsilon["a"] is None
  assert epsilon["none"].shape == (0, 3)
  expected = [0.0, 0.5]
  np.testing.assert_allclose(epsilon["w"], expected, rtol=1e-6)


def test_perturb_and_normalize():
  params = {"a": jnp.array([2.0]), "b": jnp.array([3.0]), "n": jnp.array([1, 2])}
  grads = {"a": jnp.array([1.0]), "b": jnp.array([1.0]), "n": jnp.array([1, 2])}
  tx = asam_jax.ascent(
      1.0,
      0.0,
      normalize={"a": True, "b": False, "n": True},
      perturb=lambda path, leaf: jnp.issubdtype(leaf.dtype, jnp.floating),
  )
  epsilon, state = tx.update(grads, tx.init(params), params)
  norm = math.sqrt(4 + 1)
  np.testing.assert_allclose(epsilon["a"], [4 / norm], rtol=1e-6)
  np.testing.assert_allclose(epsilon["b"], [1 / norm], rtol=1e-6)
  chex.assert_trees_all_equal(epsilon["n"], jnp.zeros(2, jnp.int32))
  np.testing.assert_allclose(state.sharpness, norm, rtol=1e-6)
  # The unperturbed leaf is out of the norm as well.
  tx = asam_jax.ascent(1.0, 0.0, perturb={"a": True, "b": False, "n": False})
  epsilon, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_allclose(epsilon["a"], [2.0], rtol=1e-6)
  np.testing.assert_allclose(epsilon["b"], [0.0])


def test_schedules_and_traced_scalars():
  w, g = jnp.array([1.0, 1.0]), jnp.array([3.0, 4.0])

  def radii(rho, eta, steps=4):
    tx = asam_jax.ascent(rho, eta)
    update = jax.jit(tx.update)
    state, result = tx.init(w), []
    for _ in range(steps):
      epsilon, state = update(g, state, w)
      result.append(np.linalg.norm(epsilon))
    assert state.count == steps
    return np.array(result)

  np.testing.assert_allclose(
      radii(lambda count: 0.1 * (count + 1), 0.0), [0.1, 0.2, 0.3, 0.4], rtol=1e-6
  )
  np.testing.assert_allclose(
      radii(0.1, lambda count: 1.0 * count), [0.1, 0.2, 0.3, 0.4], rtol=1e-6
  )
  np.testing.assert_array_equal(
      radii(optax.constant_schedule(0.3), optax.constant_schedule(0.2)),
      radii(0.3, 0.2),
  )

  @jax.jit
  def traced(rho, eta):
    tx = asam_jax.ascent(rho, eta)
    return tx.update(g, tx.init(w), w)[0]

  tx = asam_jax.ascent(0.3, 0.2)
  np.testing.assert_allclose(
      traced(0.3, 0.2), tx.update(g, tx.init(w), w)[0], rtol=1e-6
  )
  assert traced._cache_size() == 1
  traced(0.4, 0.1)
  assert traced._cache_size() == 1


@pytest.mark.parametrize("p", EXPONENTS)
def test_derivatives_through_the_perturbation(p):
  # For methods that differentiate a training step; forward and reverse.
  with problems.enable_x64(True):
    rng = np.random.default_rng(0)
    w, g, c = rng.normal(size=(3, 5))

    @jax.jit
    def fun(w, g, rho, eta):
      tx = asam_jax.ascent(rho, eta, p)
      epsilon, state = tx.update(g, tx.init(w), w)
      return c @ epsilon + state.sharpness

    args = (w, g, np.float64(0.3), np.float64(0.1))
    gradients = jax.jit(jax.grad(fun, (0, 1, 2, 3)))(*args)
    for index, gradient in enumerate(gradients):
      step = 1e-6
      direction = rng.normal(size=np.shape(args[index]))
      up, down = list(args), list(args)
      up[index] = up[index] + step * direction
      down[index] = down[index] - step * direction
      numeric = (fun(*up) - fun(*down)) / (2 * step)
      reverse = np.sum(gradient * direction)
      np.testing.assert_allclose(reverse, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("p", EXPONENTS)
def test_derivatives_where_something_is_zero(p, operator):
  """A dead ReLU's gradient, a filter that is zero, a leaf that is."""
  with problems.enable_x64(True):
    rng = np.random.default_rng(0)
    w, g, c = rng.normal(size=(3, 3, 2, 4, 3))
    w[..., 1] = 0  # a filter
    g[0, 0] = 0
    params = [w, np.zeros((2, 3, 2)), np.ones(2)]
    grads = [g, rng.normal(size=(2, 3, 2)), np.zeros(2)]

    @jax.jit
    def fun(params, grads):
      tx = asam_jax.ascent(0.3, 0.1, p, normalization=operator)
      epsilon, state = tx.update(grads, tx.init(params), params)
      weights = [jnp.asarray(c), 0.5, 2.0]
      sums = [jnp.sum(a * jnp.sin(e)) for a, e in zip(weights, epsilon, strict=True)]
      return sum(sums) + state.sharpness

    point = (params, grads)
    slopes, curvature = jax.jit(
        lambda: jax.jvp(jax.grad(fun, (0, 1)), point, point)
    )()
    for slope in jax.tree.leaves((slopes, curvature)):
      assert np.isfinite(slope).all()
    # Along what leaves the zeros as they are: a dead unit's gradient stays zero, and
    # |w| has no slope at zero.
    for index, tree in enumerate((params, grads)):
      direction = [rng.normal(size=x.shape) * (x != 0) for x in tree]
      moved = lambda s, index=index, d=direction: fun(*[  # noqa: E731
          [x + s * v for x, v in zip(one, d, strict=True)] if i == index else one
          for i, one in enumerate((params, grads))
      ])
      numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6
      exact = sum(
          np.sum(a * b) for a, b in zip(slopes[index], direction, strict=True)
      )
      np.testing.assert_allclose(exact, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("p", [1.01, 1.999, 2.001, 50, 1e9])
def test_exponents_at_the_borders(p):
  params, grads = random_tree(6, (jnp.float32,))
  tx = asam_jax.ascent(0.3, 0.1, p)
  epsilon, state = jax.jit(tx.update)(grads, tx.init(params), params)
  expected, sharpness = problems.oracle_perturbation(
      jax.tree.leaves(grads), factors(params, 0.1, "elementwise"), 0.3, p
  )
  # Next to p = 1, the power of a hundred magnifies each rounding.
  rtol = 2e-5 if p > 1.1 else 1e-4
  for got, want in zip(jax.tree.leaves(epsilon), expected, strict=True):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-30)
  np.testing.assert_allclose(state.sharpness, sharpness, rtol=2e-5)
