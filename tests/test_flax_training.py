"""Flax linen: batch norm, dropout and a TrainState, against passes by hand."""

import functools
import inspect
import re
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from tests import problems

nn = pytest.importorskip("flax.linen", reason="needs Flax, an extra")
from flax.training import train_state  # noqa: E402

# The page with a TrainState that hands grad_fn on.
from examples.frameworks import linen_optimizer  # noqa: E402

X = jax.random.normal(jax.random.key(1), (16, 5))
Y = jnp.arange(16) % 3
RHO = 0.3
masks = []  # those that the passes drew, in their order


class Model(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x)))
    mask = nn.Dropout(0.5, deterministic=False)(jnp.ones_like(x))
    jax.debug.callback(lambda m: masks.append(np.asarray(m)), mask)
    return nn.Dense(3)(mask * x)


VARIABLES = jax.jit(Model().init)(
    {"params": jax.random.key(0), "dropout": jax.random.key(0)}, X
)


def loss_function(batch_stats, key):
  def loss_fn(params):
    variables = {"params": params, "batch_stats": batch_stats}
    logits, changes = Model().apply(
        variables, X, mutable="batch_stats", rngs={"dropout": key}
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()
    return loss, changes["batch_stats"]

  return loss_fn


def drawn_masks():
  """The masks since the last call."""
  jax.effects_barrier()
  result = list(masks)
  masks.clear()
  return result


@jax.jit
def gradient(params, batch_stats, key):
  return jax.value_and_grad(loss_function(batch_stats, key), has_aux=True)(params)


def by_hand(params, batch_stats, key):
  """Loss and statistics of the clean pass, and the gradient of the perturbed."""
  result, grads = gradient(params, batch_stats, key)
  moved = problems.oracle_point(params, grads, RHO)
  return result, gradient(moved, batch_stats, key)[1]


@functools.cache
def train_by_hand(base_tx, steps):
  params, batch_stats = VARIABLES["params"], VARIABLES["batch_stats"]
  state, update = base_tx.init(params), jax.jit(base_tx.update)
  for step in range(steps):
    (_, batch_stats), grads = by_hand(params, batch_stats, jax.random.key(step))
    updates, state = update(grads, state, params)
    params = jax.tree.map(np.add, params, updates)
  return params, batch_stats


def unmodified(base_tx):
  def step(state, batch_stats, key):
    (_, batch_stats), grads = asam_jax.value_and_grad(
        loss_function(batch_stats, key), rho=RHO, has_aux=True
    )(state.params)
    return state.apply_gradients(grads=grads), batch_stats

  return train_state.TrainState.create, base_tx, step


def forwarding(base_tx):

  def step(state, batch_stats, key):
    loss_fn = loss_function(batch_stats, key)
    grads, batch_stats = jax.grad(loss_fn, has_aux=True)(state.params)
    grad_fn = lambda params: jax.grad(loss_fn, has_aux=True)(params)[0]  # noqa: E731
    return state.apply_gradients(grads=grads, grad_fn=grad_fn), batch_stats

  create = functools.partial(linen_optimizer.TrainState.create, batch_stats=None)
  return create, asam_jax.adaptive_sam(base_tx, RHO), step


BASE = optax.sgd(0.1, momentum=0.9)


@pytest.mark.parametrize("door", [unmodified, forwarding])
def test_train_state(door):
  expected = train_by_hand(BASE, 3)
  create, tx, step = door(BASE)
  state = create(apply_fn=Model().apply, params=VARIABLES["params"], tx=tx)
  batch_stats, traces = VARIABLES["batch_stats"], []

  @jax.jit
  def counted(*args):
    traces.append(1)
    return step(*args)

  drawn_masks()
  for number in range(3):
    state, batch_stats = counted(state, batch_stats, jax.random.key(number))
  chex.assert_trees_all_close((state.params, batch_stats), expected,
                              rtol=1e-4, atol=1e-6)
  assert state.step == 3
  assert len(traces) == 1
  # Two passes a step, with the same mask; another one in the next step.
  drawn = drawn_masks()
  assert len(drawn) == 6
  for clean, perturbed in zip(drawn[::2], drawn[1::2], strict=True):
    np.testing.assert_array_equal(clean, perturbed)
  assert (drawn[0] != drawn[2]).any()


def test_statistics_are_those_of_one_clean_pass():
  key = jax.random.key(5)
  loss_fn = loss_function(VARIABLES["batch_stats"], key)
  _, expected = jax.jit(loss_fn)(VARIABLES["params"])
  # So large a radius that the perturbed pass has quite other statistics.
  (_, statistics), _ = jax.jit(asam_jax.value_and_grad(loss_fn, rho=5.0, has_aux=True))(
      VARIABLES["params"]
  )
  chex.assert_trees_all_equal(statistics, expected)


def test_unmodified_train_state_with_the_optimizer_says_what_is_missing():
  state = train_state.TrainState.create(
      apply_fn=None, params=VARIABLES["params"], tx=asam_jax.sam(optax.sgd(0.1))
  )
  with pytest.raises(ValueError, match="grad_fn=None"):
    state.apply_gradients(grads=VARIABLES["params"])


def test_batch_statistics_of_a_carried_method_are_gathered_anew():
  # What the docstring of `carried` advises: statistics at w, not at w + epsilon.
  class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      x = nn.Dense(8)(x)
      return nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)

  model = Normed()
  variables = model.init(jax.random.key(0), X, train=True)
  tx = asam_jax.carried(optax.sgd(0.1), asam_jax.ascent(rho=5.0))
  params, batch_stats = variables["params"], variables["batch_stats"]
  opt_state = tx.init(params)

  @jax.jit
  def passed(params, batch_stats):
    y, new = model.apply({"params": params, "batch_stats": batch_stats}, X,
                         train=True, mutable=["batch_stats"])
    return jnp.mean((y - 1) ** 2), new["batch_stats"]

  for _ in range(5):
    (_, batch_stats), grads = jax.value_and_grad(passed, has_aux=True)(
        params, batch_stats
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
  clean = asam_jax.eval_params(opt_state)
  gathered = batch_stats
  for _ in range(30):
    _, gathered = passed(clean, gathered)
  hidden = X @ clean["Dense_0"]["kernel"] + clean["Dense_0"]["bias"]
  mean = gathered["BatchNorm_0"]["mean"]
  np.testing.assert_allclose(mean, hidden.mean(0), atol=1e-5)
  trained = batch_stats["BatchNorm_0"]["mean"]
  assert np.linalg.norm(trained - hidden.mean(0)) > 0.01


class Normalized(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(4)(x)
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)


def test_the_recipe_for_statistics_at_the_clean_parameters():
  model = Normalized()
  variables = model.init(jax.random.key(0), X, train=True)
  params, batch_stats = variables["params"], variables["batch_stats"]
  tx = asam_jax.carried(optax.sgd(0.1), asam_jax.ascent(2.0))
  opt_state = tx.init(params)

  @jax.jit
  def step(params, batch_stats, opt_state):
    def loss(params):
      out, new = model.apply({"params": params, "batch_stats": batch_stats}, X,
                             train=True, mutable=["batch_stats"])
      return jnp.mean((out[:, 0] - Y) ** 2), new["batch_stats"]

    grads, batch_stats = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), batch_stats, opt_state

  for _ in range(40):
    params, batch_stats, opt_state = step(params, batch_stats, opt_state)
  doc = inspect.getdoc(asam_jax.carried) or ""
  recipe = re.search(r"In Flax::\n\n((?:  .*\n|\n)+)", doc)
  assert recipe
  names = {"asam_jax": asam_jax, "model": model, "opt_state": opt_state,
           "batch_stats": batch_stats, "batches": [X] * 80}
  exec(textwrap.dedent(recipe[1]), names)
  clean = asam_jax.eval_params(opt_state)
  outputs = X @ clean["Dense_0"]["kernel"] + clean["Dense_0"]["bias"]
  expected = {"mean": outputs.mean(0), "var": outputs.var(0)}
  got, before = names["batch_stats"], batch_stats["BatchNorm_0"]
  chex.assert_trees_all_close(got["BatchNorm_0"], expected, rtol=2e-3, atol=2e-3)
  assert jnp.abs(before["var"] - expected["var"]).max() > 0.02
