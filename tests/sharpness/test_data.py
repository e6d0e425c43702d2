# ruff: noqa: E731  (losses of one line read best as lambdas)
"""Sharpness over a data set: batches, memory, devices, normalized logits."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asam_jax import Geometry
from asam_jax import sharpness
from tests.sharpness import cases

OPTIONS = {"rho": 0.3, "geometry": Geometry(0.0), "steps": 5, "restarts": 1}
M = 5  # of 24 examples: four whole batches, and four examples left over


def network_loss(params, batch):
  return cases.network_loss(batch)(params)


@functools.cache
def measured():
  params, batch = cases.network(0)
  measure = sharpness.m_sharpness(network_loss, M, **OPTIONS)
  return params, batch, measure(params, batch)


def test_is_the_weighted_mean_over_batches():
  params, batch, result = measured()

  @jax.jit
  def of_one(part, i):
    key = jax.random.fold_in(jax.random.key(0), i)
    loss = cases.network_loss(part)
    return sharpness.worst_case(loss, params, key=key, **OPTIONS).value

  expected = []
  for i, start in enumerate(range(0, 24, M)):
    part = jax.tree.map(lambda x, a=start: np.asarray(x)[a : a + M], batch)
    expected.append(of_one(part, i))
  np.testing.assert_allclose(result.values, expected, rtol=1e-4)
  np.testing.assert_array_equal(result.sizes, [5, 5, 5, 5, 4])
  np.testing.assert_allclose(
      result.value, np.average(expected, weights=[5, 5, 5, 5, 4]), rtol=1e-4)


def test_standard_error_of_equal_batches():
  data = jnp.array([1.0, 2.0, 4.0, 7.0])
  measure = sharpness.m_sharpness(
      lambda w, x: jnp.mean(x) * w, 1, rho=1.0, geometry=Geometry(0.0),
      method="one_step")
  result = measure(jnp.array(1.0), data)
  np.testing.assert_allclose(result.value, 3.5)
  np.testing.assert_allclose(
      result.standard_error, np.std(data, ddof=1) / 2, rtol=1e-6)
  assert np.isnan(measure(jnp.array(1.0), data[:1]).standard_error)


def test_compiles_once_and_sees_one_batch_at_a_time():
  shapes = []

  def loss(w, x):
    shapes.append(x.shape)
    return jnp.mean((x @ w) ** 2)

  measure = sharpness.m_sharpness(loss, 4, method="one_step")
  data = np.ones((20, 3), np.float32)  # on the host
  measure(jnp.ones(3), data)
  traced = len(shapes)
  measure(2 * jnp.ones(3), data)
  assert len(shapes) == traced
  assert set(shapes) == {(4, 3)}


def test_devices_share_the_batches():
  params, batch, single = measured()
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("d",))
  # The whole batches in two rounds, and what is left over.
  shared = sharpness.m_sharpness(network_loss, M, mesh=mesh, **OPTIONS)(params, batch)
  np.testing.assert_allclose(shared.values, single.values, rtol=1e-4)
  np.testing.assert_array_equal(shared.sizes, [5, 5, 5, 5, 4])
  assert len(set(np.asarray(shared.values).tolist())) == 5


def test_other_measures():
  params, batch = cases.network(0)
  for measure in (sharpness.average_case, sharpness.hessian_trace):
    result = sharpness.m_sharpness(network_loss, 24, measure=measure, samples=4)(
        params, batch, jax.random.key(3))
    key = jax.random.fold_in(jax.random.key(3), 0)
    expected = jax.jit(lambda w, key, measure=measure: measure(
        cases.network_loss(batch), w, samples=4, key=key).value)(params, key)
    np.testing.assert_allclose(result.value, expected, rtol=1e-4)


@pytest.mark.parametrize("devices", [None, 2])
def test_each_batch_draws_from_its_own_key(devices):
  # Searches for the worst case end at one value for any key; averages do not.
  mesh = devices and jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("d",))
  loss = lambda w, x: jnp.mean((x @ w) ** 2)
  w, data = jnp.array([1.0, -2.0]), jnp.arange(1.0, 11).reshape(5, 2)
  key = jax.random.key(3)
  options = {"measure": sharpness.average_case, "samples": 4, "mesh": mesh}
  result = sharpness.m_sharpness(loss, 2, **options)(w, data, key)
  for i, part in enumerate([data[:2], data[2:4], data[4:]]):
    own, other = (
        sharpness.average_case(
            lambda w, part=part: loss(w, part), w, samples=4,
            key=jax.random.fold_in(key, k)).value
        for k in (i, i + 1))
    np.testing.assert_allclose(result.values[i], own, rtol=1e-5)
    assert abs(own - other) > 1e-2 * abs(own)


def test_progress_bar(capsys):
  measure = sharpness.m_sharpness(
      lambda w, x: jnp.mean(x) * w, 1, method="one_step", progress=True)
  measure(jnp.array(1.0), jnp.ones(3))
  assert "3/3" in capsys.readouterr().err


def test_progress_bar_alone_needs_tqdm(monkeypatch):
  monkeypatch.setitem(sys.modules, "tqdm", None)
  loss = lambda w, x: jnp.mean(x) * w
  sharpness.m_sharpness(loss, 1, method="one_step")(jnp.array(1.0), jnp.ones(2))
  with pytest.raises(ImportError, match="tqdm"):
    sharpness.m_sharpness(loss, 1, method="one_step", progress=True)(
        jnp.array(1.0), jnp.ones(2))


def test_normalized_logits():
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(6, 4)), rng.normal(size=(4, 3))
  y = rng.integers(0, 3, 6)
  loss = sharpness.classification_loss(lambda w, x: x @ w, normalize_logits=True)
  z = x @ w
  z = z / z.std(axis=1, keepdims=True)
  expected = np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(6), y])
  batch = (jnp.array(x, jnp.float32), jnp.array(y))
  w = jnp.array(w, jnp.float32)
  value_and_grad = jax.jit(jax.value_and_grad(loss))
  value, slope = value_and_grad(w, batch)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  # Confidence is out of the measure: the gradient is orthogonal to w.
  np.testing.assert_allclose(np.vdot(slope, w), 0, atol=1e-6)
  assert np.isfinite(value_and_grad(jnp.zeros((4, 3)), batch)[1]).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [((jnp.ones(3), jnp.ones(4)), "leading axis"), (jnp.ones((0, 2)), "one example"),
     ((), "leading axis")])
def test_bad_data(data, message):
  measure = sharpness.m_sharpness(network_loss, 2)
  with pytest.raises(ValueError, match=message):
    measure(jnp.ones(2), data)


def test_bad_arguments():
  with pytest.raises(ValueError, match="m=0"):
    sharpness.m_sharpness(network_loss, 0)
  devices = np.array(jax.devices()[:2]).reshape(1, 2)
  with pytest.raises(ValueError, match="one axis"):
    sharpness.m_sharpness(network_loss, mesh=jax.sharding.Mesh(devices, ("a", "b")))
