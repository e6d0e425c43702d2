"""Flax NNX: one perturbation per m rows, and what the groups leave in the modules."""

import contextlib
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from tests.devices import HAS_EXPLICIT
from tests.devices import make_mesh
from tests.devices import NO_CHECK
from tests.devices import NO_EXPLICIT
from tests.devices import place
from tests.devices import shard_map
from tests.devices import Spec

nnx = pytest.importorskip("flax.nnx", reason="needs Flax, an extra")

import asam_jax.nnx  # noqa: E402

ROWS, WIDTH = 24, 4
RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(ROWS, WIDTH)))
BATCH = X, np.sin(2 * X)


class Model(nnx.Module):
  def __init__(self, dropout=0.5):
    rngs = nnx.Rngs(0)
    self.hidden = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
    self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
    self.dropout = nnx.Dropout(dropout, rngs=rngs)
    self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x):
    return self.out(self.dropout(jnp.tanh(self.norm(self.hidden(x)))))


def loss(model, batch, scale=1.0, shift=0.0):
  x, y = batch
  return jnp.mean((scale * model(x) - y) ** 2) + shift


def group(i, m):
  return jax.tree.map(lambda x: x[i * m : (i + 1) * m], BATCH)


def pure(module, wrt=nnx.Param):
  return jax.device_get(nnx.as_pure(nnx.state(module, wrt)))


def mean(trees):
  return jax.tree.map(lambda *xs: np.mean(xs, 0), *trees)


# 24 rows make 3 groups, by which a mean of equal numbers is not always the number.
@pytest.mark.parametrize("jitted", [True, False])
def test_groups_one_by_one(jitted):
  door = functools.partial(asam_jax.nnx.value_and_grad, loss, rho=0.3, with_info=True)
  fun, one = door(m_sharpness=8), door()
  if jitted:
    fun = nnx.jit(fun)
  model, start = Model(), Model()
  value, grads, info = fun(model, BATCH, jnp.float32(2), shift=jnp.float32(1))
  alone = []
  for i in range(3):
    each = nnx.clone(start)
    alone.append((each, *one(each, group(i, 8), 2.0, shift=1.0)))
  models, values, all_grads, infos = zip(*alone, strict=True)
  np.testing.assert_allclose(value, np.mean(values), rtol=1e-6)
  close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
  close(jax.device_get(nnx.as_pure(grads)),
        mean([jax.device_get(nnx.as_pure(g)) for g in all_grads]))
  close(jax.device_get(info), jax.device_get(mean(infos)))
  # Statistics are averaged, counts are those of one pass, parameters stay.
  statistics = [pure(each, nnx.BatchStat) for each in models]
  assert np.abs(statistics[0]["norm"]["mean"] - statistics[1]["norm"]["mean"]).max() > 0
  close(pure(model, nnx.BatchStat), mean(statistics))
  chex.assert_trees_all_equal(pure(model, nnx.RngCount), pure(models[0], nnx.RngCount))
  chex.assert_trees_all_equal(pure(model), pure(start))
  assert pure(start, nnx.RngCount) != pure(model, nnx.RngCount)


def test_frozen_floats_stay_to_the_last_bit():
  """Of variables that the loss writes back as they were, too."""

  class Shifted(Model):
    def __init__(self):
      super().__init__()
      self.offset = nnx.BatchStat(jnp.linspace(0.1, 0.7, WIDTH))

    def __call__(self, x):
      self.offset[...] = jnp.flip(jnp.flip(self.offset[...]))
      return super().__call__(x + self.offset[...])

  model = Shifted()
  asam_jax.nnx.grad(loss, m_sharpness=8)(model, BATCH)
  np.testing.assert_array_equal(model.offset[...], jnp.linspace(0.1, 0.7, WIDTH))


# Over devices.

PARAMS = pure(Model())


def without_dropout(params):
  model = Model(0.0)
  nnx.update(model, params)
  return model


def on_params(m, **options):
  fun = asam_jax.nnx.value_and_grad(
      loss, rho=0.3, m_sharpness=m, with_info=True, **options)

  def run(params, batch):
    model = without_dropout(params)
    value, grads, info = fun(model, batch)
    statistics = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    return value, nnx.as_pure(grads), info, statistics

  return run


@functools.cache
def one_by_one(m):
  run = jax.jit(on_params(None))
  return mean([jax.device_get(run(PARAMS, group(i, m))) for i in range(ROWS // m)])


@pytest.mark.parametrize("kind", ["Auto", pytest.param(
    "Explicit", marks=pytest.mark.skipif(not HAS_EXPLICIT, reason=NO_EXPLICIT))])
@pytest.mark.parametrize("m", [3, 12])  # a share is of 24, 6 and 3 rows
def test_the_same_step_on_any_number_of_devices(m, kind):
  for devices in (1, 4, 8):
    mesh = make_mesh((devices,), ("data",), kind)
    within: Any = jax.set_mesh(mesh) if kind == "Explicit" else contextlib.nullcontext()
    args = jax.device_put(PARAMS, jax.sharding.NamedSharding(mesh, Spec())), tuple(
        place(x, mesh, Spec("data")) for x in BATCH)
    with within:
      got = jax.device_get(jax.jit(on_params(m))(*args))
    chex.assert_trees_all_close(got, one_by_one(m), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("options", [{}, NO_CHECK])
@pytest.mark.parametrize("m", [2, 6])  # below and at a device's share
def test_within_a_device_of_shard_map(m, options):
  if not options and "check_vma" not in NO_CHECK:
    pytest.skip("this JAX checks no while loops")

  def run(params, batch):
    value, *rest = on_params(m, axis_name="data")(params, batch)
    statistics = rest.pop()
    return *jax.lax.pmean((value, statistics), "data"), *rest

  mapped = shard_map(run, mesh=make_mesh((4,), ("data",), "Auto"),
                     in_specs=(Spec(), Spec("data")), out_specs=Spec(), **options)
  value, grads, info, statistics = one_by_one(m)
  chex.assert_trees_all_close(
      jax.device_get(jax.jit(mapped)(PARAMS, BATCH)), (value, statistics, grads, info),
      rtol=2e-5, atol=2e-6)


def test_the_module_is_as_it_was_in_shard_map():
  fun = asam_jax.nnx.grad(loss, m_sharpness=2, axis_name="data")

  def run(params, batch):
    model = without_dropout(params)
    fun(model, batch)
    return nnx.as_pure(nnx.state(model, nnx.Param))

  mapped = shard_map(run, mesh=make_mesh((4,), ("data",), "Auto"),
                     in_specs=(Spec(), Spec("data")), out_specs=Spec())
  if "check_vma" in NO_CHECK:
    chex.assert_trees_all_equal(jax.device_get(jax.jit(mapped)(PARAMS, BATCH)), PARAMS)


def test_training_with_an_optimizer():
  model = Model()
  optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
  fun = asam_jax.nnx.value_and_grad(loss, rho=0.3, m_sharpness=6)

  @nnx.jit
  def step(model, optimizer):
    value, grads = fun(model, BATCH)
    optimizer.update(model, grads)
    return value

  values = [float(step(model, optimizer)) for _ in range(30)]
  assert values[-1] < 0.7 * values[0]
  assert int(model.dropout.rngs.count[...]) == 30


def test_arguments_that_do_not_fit():
  bad: tuple[Any, ...] = (0, 2.0, True)
  for m in bad:
    with pytest.raises((ValueError, TypeError), match=r"m_sharpness=.* int >= 1"):
      asam_jax.nnx.value_and_grad(loss, m_sharpness=m)
  with pytest.raises(ValueError, match="m_sharpness=4 and accumulate=8"):
    asam_jax.nnx.value_and_grad(loss, m_sharpness=4, accumulate=8)
  with pytest.raises(ValueError, match="m_sharpness=4 and average_ascent=True"):
    asam_jax.nnx.grad(loss, m_sharpness=4, axis_name="data", average_ascent=True)
  with pytest.raises(ValueError, match=r"m_sharpness=5 does not divide .* 24 rows"):
    asam_jax.nnx.grad(loss, m_sharpness=5)(Model(), BATCH)
  split = lambda model, x, y: loss(model, (x, y))  # noqa: E731
  with pytest.raises(ValueError, match=r"another argument .* has 24 rows"):
    asam_jax.nnx.grad(split, m_sharpness=4)(Model(), *BATCH)
  # A module may have an array of that length.
  wide = nnx.Linear(ROWS, ROWS, rngs=nnx.Rngs(0))
  x = jnp.ones((ROWS, ROWS))
  asam_jax.nnx.grad(lambda model, x: jnp.mean(model(x) ** 2), m_sharpness=4)(wide, x)


def test_a_radius_rule():
  rule = asam_jax.auto_radius(0.9)
  radius = rule.init()._replace(rho=jnp.float32(0.2))
  door = functools.partial(asam_jax.nnx.value_and_grad, loss, rho=rule)
  *_, got = door(m_sharpness=8)(without_dropout(PARAMS), BATCH, radius=radius)
  each = [door()(without_dropout(PARAMS), group(i, 8), radius=radius)[-1].rho
          for i in range(3)]
  np.testing.assert_allclose(got.rho, np.mean(each), rtol=1e-5)
