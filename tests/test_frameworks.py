"""The official selection on real models of every framework."""

import functools

import equinox
from flax import nnx
import flax.linen as nn
import haiku
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax

X = np.ones((2, 8, 8, 3), np.float32)


def linen_params():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.BatchNorm(use_running_average=False)(nn.Conv(4, (3, 3))(x))
      return nn.Dense(2)(nn.LayerNorm()(x.reshape(x.shape[0], -1)))

  return jax.jit(Model().init)(jax.random.key(0), X)["params"]


def nnx_params():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
      self.norm = nnx.BatchNorm(4, rngs=rngs)
      self.dense = nnx.Linear(4, 2, rngs=rngs)

  return nnx.state(Model(nnx.Rngs(0)), nnx.Param)


def haiku_params():
  def model(x):
    x = haiku.BatchNorm(True, True, 0.9)(haiku.Conv2D(4, 3)(x), is_training=True)
    return haiku.Linear(2)(haiku.Flatten()(x))

  params, _ = jax.jit(haiku.transform_with_state(model).init)(jax.random.key(0), X)
  return params


def equinox_params():
  keys = jax.random.split(jax.random.key(0), 2)
  model = [
      equinox.nn.Conv2d(3, 4, 3, key=keys[0]),
      equinox.nn.GroupNorm(2, 4),
      equinox.nn.Linear(4, 2, key=keys[1]),
      equinox.nn.Linear(4, 2, use_bias=False, key=keys[1]),
  ]
  return equinox.filter(model, equinox.is_inexact_array)


FRAMEWORKS = {
    "linen": functools.cache(linen_params),
    "nnx": functools.cache(nnx_params),
    "haiku": functools.cache(haiku_params),
    "equinox": functools.cache(equinox_params),
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_all_but_biases_and_shifts_are_normalized(framework):
  params = FRAMEWORKS[framework]()
  rows = asam_jax.describe(params)
  leaves = jax.tree.leaves(params)
  assert len(rows) == len(leaves) >= 6
  for row, leaf in zip(rows, leaves, strict=True):
    # At the start, biases and shifts are zero, and nothing else is. Equinox draws
    # the biases of its layers at random.
    if framework != "equinox":
      shift = bool((np.asarray(leaf) == 0).all())
    else:
      shift = row.path.endswith("bias")
    assert row.operator == ("none" if shift else "elementwise"), row


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_filters_of_the_kernel(framework):
  params = FRAMEWORKS[framework]()
  axis = 0 if framework == "equinox" else -1
  # Haiku's batch norm has scales of shape (1, 1, 1, 4), filters of one weight.
  (kernel,) = (x for x in jax.tree.leaves(params) if x.ndim == 4 and x.size > 4)
  t = np.asarray(asam_jax.filterwise(kernel, 0.0, filter_axis=axis))
  filters = np.moveaxis(np.asarray(kernel), axis, 0).reshape(4, -1)
  np.testing.assert_allclose(t.ravel(), np.linalg.norm(filters, axis=1), rtol=1e-6)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_step_on_the_parameters_as_they_are(framework):
  params = FRAMEWORKS[framework]()
  tx = asam_jax.adaptive_sam(optax.sgd(0.1), rho=0.1)

  def loss(params):
    return sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(params))

  @jax.jit
  def step(params, state):
    grads = jax.grad(loss)(params)
    updates, state = tx.update(grads, state, params, grad_fn=jax.grad(loss))
    after = optax.apply_updates(params, updates)
    return after, state, (loss(params), loss(after))

  after, _, (before_step, after_step) = step(params, tx.init(params))
  assert jax.tree.structure(after) == jax.tree.structure(params)
  assert after_step < before_step
