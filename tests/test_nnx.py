"""Flax NNX: the passes written out by hand, and what they leave in the modules."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from tests import problems

nnx = pytest.importorskip("flax.nnx", reason="needs Flax, an extra")

import asam_jax.nnx  # noqa: E402

# Features, units and classes are equally many: eager operations are compiled once for
# each shape.
WIDTH = 5
X = jax.random.normal(jax.random.key(1), (16, WIDTH))
Y = jnp.arange(16) % 3
RHO = 0.3
masks = []  # those that the passes drew, in their order


class Model(nnx.Module):
  def __init__(self, rngs, dropout=0.5):
    self.hidden = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
    self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
    self.dropout = nnx.Dropout(dropout, rngs=rngs)
    self.head = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.hidden(x)))
    mask = self.dropout(jnp.ones_like(x))
    jax.debug.callback(lambda m: masks.append(np.asarray(m)), mask)
    return self.head(mask * x)


def loss_fn(model, x, y):
  logits = model(x)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
  return losses.mean(), logits


def drawn_masks():
  """The masks since the last call."""
  jax.effects_barrier()
  result = list(masks)
  masks.clear()
  return result


def params_of(model):
  return nnx.as_pure(nnx.state(model, nnx.Param))


def rest_of(model):
  """Statistics, keys and counts."""
  rest = nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
  return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, rest)


def pure_function(model, x=X, y=Y):
  """``params -> (loss, logits)`` from the state that the model has now."""
  # A split alone would share its variables with the model, which moves on.
  graphdef, params, rest = nnx.split(nnx.clone(model), nnx.Param, ...)

  def pure(point):
    fresh = nnx.merge(graphdef, params, rest, copy=True)
    nnx.update(fresh, point)
    return loss_fn(fresh, x, y)

  return pure


@functools.cache
def by_hand():
  """Clean loss and logits, perturbed loss and gradient; epsilon by the oracle."""
  model = Model(nnx.Rngs(0))
  params = params_of(model)
  both = jax.jit(jax.value_and_grad(pure_function(model), has_aux=True))
  (loss, logits), grads = both(params)
  moved = problems.oracle_point(params, grads, RHO)
  (perturbed, _), grads = both(moved)
  return loss, logits, perturbed, grads


@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_passes_written_out(transform):
  model, twin = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
  before = params_of(model)
  loss, logits, perturbed, expected = by_hand()
  _, by_nnx = nnx.value_and_grad(loss_fn, has_aux=True)(twin, X, Y)
  drawn_masks()

  @transform
  def step(model, x, y):
    return asam_jax.nnx.value_and_grad(loss_fn, rho=RHO, has_aux=True, with_info=True)(
        model, x, y
    )

  (value, aux), grads, info = step(model, X, Y)
  assert jax.tree.structure(grads) == jax.tree.structure(by_nnx)
  chex.assert_trees_all_close(
      (value, aux, info.perturbed_value, nnx.as_pure(grads)),
      (loss, logits, perturbed, expected), rtol=1e-4, atol=1e-6,
  )
  # The twin saw one clean pass: its statistics, its random counts.
  chex.assert_trees_all_close(rest_of(model), rest_of(twin), rtol=1e-5, atol=1e-7)
  assert model.dropout.rngs.count[...] == 1
  assert np.abs(model.norm.mean[...]).max() > 0
  chex.assert_trees_all_equal(params_of(model), before)

  first, second = drawn_masks()
  np.testing.assert_array_equal(first, second)
  step(model, X, Y)
  third, fourth = drawn_masks()
  np.testing.assert_array_equal(third, fourth)
  assert (first != third).any()


def test_value_alone_and_diffstate():
  model, twin = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
  only_head = nnx.DiffState(0, nnx.All(nnx.Param, nnx.PathContains("head")))
  fun = lambda *args: loss_fn(*args)[0]  # noqa: E731
  head = params_of(model)["head"]
  pure, whole = pure_function(model), params_of(model)

  def loss_of_head(head):
    return pure(nnx.State({**whole, "head": head}))[0]

  expected = asam_jax.value_and_grad(loss_of_head, rho=RHO)(head)
  value, grads = asam_jax.nnx.value_and_grad(fun, only_head, rho=RHO)(model, X, Y)
  _, by_nnx = nnx.value_and_grad(fun, argnums=only_head)(twin, X, Y)
  assert jax.tree.structure(grads) == jax.tree.structure(by_nnx)
  got = (value, nnx.as_pure(grads)["head"])
  chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-7)


def test_rngs_as_an_argument_advance_once():
  def fun(rngs, model, x):
    noise = rngs.normal(x.shape)
    return jnp.mean((model(x + noise) - noise[:, :3]) ** 2)

  model, rngs = nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(0)), nnx.Rngs(7)
  fixed = nnx.Rngs(7).normal(X.shape)
  graphdef, params = nnx.split(model)
  pure = lambda w: jnp.mean((nnx.merge(graphdef, w)(X + fixed) - fixed[:, :3]) ** 2)  # noqa: E731
  expected = asam_jax.value_and_grad(pure, rho=RHO)(params)
  got = asam_jax.nnx.value_and_grad(fun, rho=RHO, argnums=1)(rngs, model, X)
  chex.assert_trees_all_close(got, expected, rtol=1e-5)
  assert rngs.default.count[...] == 1


def test_gradients_are_averaged_over_the_axis():
  graphdef, params, rest = nnx.split(Model(nnx.Rngs(0), dropout=0.0), nnx.Param, ...)
  params = nnx.as_pure(params)

  def by_module(x, y):
    model = nnx.merge(graphdef, params, rest, copy=True)
    fun = asam_jax.nnx.value_and_grad(
        loss_fn, has_aux=True, rho=RHO, axis_name="device"
    )
    return nnx.as_pure(fun(model, x, y)[1])

  def by_function(x, y):
    model = nnx.merge(graphdef, params, rest, copy=True)
    pure = pure_function(model, x, y)
    fun = asam_jax.value_and_grad(pure, rho=RHO, has_aux=True, axis_name="device")
    return fun(params)[1]

  x, y = X.reshape(2, 8, WIDTH), Y.reshape(2, 8)
  got, expected = (jax.jit(jax.vmap(f, axis_name="device"))(x, y)
                   for f in (by_module, by_function))
  chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-7)
  for gradient in jax.tree.leaves(got):
    np.testing.assert_array_equal(*np.asarray(gradient))  # on both devices


def optimizer_step(row):
  """The optimizer's door, with what it costs to write."""

  def step(model, optimizer):
    extra = {}
    if row.needs_grad_fn:
      extra["grad_fn"] = asam_jax.nnx.grad_fn(loss_fn, model, X, Y, has_aux=True)
    _, grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, X, Y)
    optimizer.update(model, grads, **extra)

  return step


def function_step(row):
  def step(model, optimizer):
    fun = asam_jax.nnx.value_and_grad(loss_fn, rho=row.rho, has_aux=True)
    _, grads = fun(model, X, Y)
    optimizer.update(model, grads)

  return step


def optimizers(name):
  """(the row, its base optimizer, the optimizer)."""
  row, base_tx = problems.OPTIMIZERS[name], optax.sgd(0.1, momentum=0.9)
  return row, base_tx, row.make(base_tx, row.rho)


@functools.cache
def train_by_hand(name, steps):
  """The same from splits and merges alone: (params, the rest)."""
  row, _, tx = optimizers(name)
  model = Model(nnx.Rngs(0))
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  params, state = nnx.as_pure(params), tx.init(nnx.as_pure(params))

  @jax.jit
  def step(params, rest, state):
    def loss(point):
      return loss_fn(nnx.merge(graphdef, point, rest, copy=True), X, Y)[0]

    advanced = nnx.merge(graphdef, params, rest, copy=True)
    loss_fn(advanced, X, Y)
    params, state = problems.step_function(tx, loss, row)(params, state)
    return params, nnx.state(advanced, nnx.Not(nnx.Param)), state

  for _ in range(steps):
    params, rest, state = step(params, rest, state)
  nnx.update(model, params, rest)
  return params_of(model), rest_of(model)


# The optimizer calls grad_fn once; under cond and several times; never.
@pytest.mark.parametrize(
    ("door", "name"),
    [(function_step, "asam"), (optimizer_step, "asam"),
     (optimizer_step, "composed"), (optimizer_step, "carried")],
)
def test_doors_train_as_by_hand(door, name):
  row, base_tx, tx = optimizers(name)
  model, traces = Model(nnx.Rngs(0)), []
  in_door = base_tx if door is function_step else tx
  optimizer = nnx.Optimizer(model, in_door, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    traces.append(1)
    door(row)(model, optimizer)

  for _ in range(3):
    step(model, optimizer)
  expected = train_by_hand(name, 3)
  got = params_of(model), rest_of(model)
  chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-6)
  assert model.dropout.rngs.count[...] == 3
  assert len(traces) == 1


def test_grad_fn_touches_no_module_and_draws_the_same_masks():
  model = Model(nnx.Rngs(0))
  before = params_of(model), rest_of(model)
  grad_fn = asam_jax.nnx.grad_fn(loss_fn, model, X, Y, has_aux=True)
  elsewhere = jax.tree.map(lambda w: w + 0.1, params_of(model))
  expected = jax.grad(lambda w: pure_function(model)(w)[0])(elsewhere)
  drawn_masks()
  for _ in range(2):
    chex.assert_trees_all_close(grad_fn(elsewhere), expected, rtol=1e-5, atol=1e-7)
  chex.assert_trees_all_equal((params_of(model), rest_of(model)), before)
  loss_fn(model, X, Y)
  one, two, clean = drawn_masks()
  np.testing.assert_array_equal(one, clean)
  np.testing.assert_array_equal(two, clean)


@pytest.mark.parametrize("door", ["value_and_grad", "grad_fn"])
@pytest.mark.parametrize(
    ("argnums", "message"),
    [
        ((0, 1), "argnums=(0, 1) must be an int or an nnx.DiffState"),
        (True, "argnums=True must be an int"),
        (1, "argnums=1 is a ArrayImpl without variables"),
        (3, "argnums=3 with 3 positional arguments"),
        (-4, "argnums=-4 with 3 positional arguments"),
        (nnx.DiffState(0, nnx.Cache), "argnums=0 is a Model without variables"),
    ],
)
def test_argnums_that_name_no_module(door, argnums, message):
  def call(*args):
    if door == "grad_fn":
      return asam_jax.nnx.grad_fn(loss_fn, *args, argnums=argnums)
    return asam_jax.nnx.value_and_grad(loss_fn, argnums=argnums, has_aux=True)(*args)

  with pytest.raises(TypeError, match=re.escape(message)):
    call(Model(nnx.Rngs(0)), X, Y)


def test_a_schedule_is_no_radius():
  with pytest.raises(TypeError, match="rho="):
    asam_jax.nnx.value_and_grad(loss_fn, rho=lambda step: 0.1, has_aux=True)(
        Model(nnx.Rngs(0)), X, Y
    )


def test_weights_of_microbatches():
  model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
  x = jnp.arange(18.0).reshape(6, 3) / 9
  v = jnp.array([1.0, 2.0, 0.5, 0.0, 0.0, 0.0])  # half of it is padding

  def loss(model, x, v):
    return jnp.sum(v * model(x)[:, 0] ** 2) / jnp.sum(v)

  split = functools.partial(
      asam_jax.nnx.microbatched, argnums=(1, 2), weights=lambda x, v: jnp.sum(v)
  )
  got = split(nnx.value_and_grad(loss), 1)(model, x, v)
  expected = nnx.value_and_grad(loss)(model, x[:3], v[:3])
  chex.assert_trees_all_close(got, expected, rtol=1e-5)


# Accumulation, the loss for the info, and the gradient alone.


def test_microbatches_are_a_loop_over_them():
  # Statistics and masks go on from one microbatch to the next.
  size = 4

  def scanned(model):
    run = asam_jax.nnx.microbatched(
        nnx.value_and_grad(loss_fn, has_aux=True), size, argnums=(1, 2)
    )
    (loss, _), grads = run(model, X, Y)
    return loss, grads

  def looped(model):
    results = []
    count = len(X) // size
    pieces = row_groups(size, len(X))
    for i in range(count):
      rows = pieces[i]
      (loss, _), grads = nnx.value_and_grad(loss_fn, has_aux=True)(
          model, X[rows], Y[rows]
      )
      results.append((loss, nnx.as_pure(grads)))
    return jax.tree.map(lambda *xs: sum(xs) / count, *results)

  one, two = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
  loss, grads = scanned(one)
  expected_loss, expected = looped(two)
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  chex.assert_trees_all_close(nnx.as_pure(grads), expected, rtol=1e-4, atol=1e-6)
  chex.assert_trees_all_close(rest_of(one), rest_of(two), rtol=1e-5)


def row_groups(size, rows):
  """The rows of each microbatch, as the core groups them."""
  groups = []

  def note(x):
    jax.debug.callback(lambda group: groups.append(np.asarray(group)), x)
    return jnp.zeros(())

  asam_jax.microbatched(note, size, 0)(jnp.arange(rows))
  jax.effects_barrier()
  return groups


def test_accumulate_is_one_perturbation_for_the_batch():
  def without_statistics(model, x):
    return jnp.mean(model(x) ** 2)

  linear = lambda: nnx.Linear(WIDTH, 2, rngs=nnx.Rngs(0))  # noqa: E731
  whole = asam_jax.nnx.value_and_grad(without_statistics, rho=RHO)(linear(), X)
  pieces = asam_jax.nnx.value_and_grad(
      without_statistics, rho=RHO, accumulate=4
  )(linear(), X)
  np.testing.assert_allclose(pieces[0], whole[0], rtol=1e-5)
  chex.assert_trees_all_close(
      nnx.as_pure(pieces[1]), nnx.as_pure(whole[1]), rtol=1e-4, atol=1e-6
  )
  by_function = asam_jax.nnx.grad(
      without_statistics, rho=RHO,
      accumulate=lambda f: asam_jax.nnx.microbatched(f, 4),
  )(linear(), X)
  chex.assert_trees_all_close(nnx.as_pure(by_function), nnx.as_pure(pieces[1]))


def test_an_ascent_chain_in_the_module_door():
  linear = nnx.Linear(WIDTH, 2, rngs=nnx.Rngs(0))
  fun = lambda model, x: jnp.mean(model(x) ** 4)  # noqa: E731
  chain = asam_jax.iterated(asam_jax.ascent(RHO), 2)
  got = asam_jax.nnx.grad(fun, ascent=chain)(linear, X)
  pure = asam_jax.nnx.value_fn(fun, linear, X)
  expected = asam_jax.grad(pure, ascent=chain)(params_of(linear))
  chex.assert_trees_all_close(nnx.as_pure(got), expected, rtol=1e-5)


def test_the_info_through_the_optimizer():
  model = Model(nnx.Rngs(0))
  tx = asam_jax.adaptive_sam(optax.sgd(0.1), RHO, with_info=True)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  value_fn = asam_jax.nnx.value_fn(loss_fn, model, X, Y, has_aux=True)
  (value, _), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, X, Y)
  optimizer.update(model, grads, value=value, value_fn=value_fn)
  state = nnx.as_pure(nnx.state(optimizer))["opt_state"]
  infos = [x for path, x in jax.tree_util.tree_leaves_with_path(state)
           if "perturbed_value" in jax.tree_util.keystr(path)]
  loss, _, perturbed, _ = by_hand()
  np.testing.assert_allclose(value, loss, rtol=1e-5)
  np.testing.assert_allclose(infos[0], perturbed, rtol=1e-4)
