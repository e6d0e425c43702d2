"""One list of properties that every optimizer of the table has."""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from tests import problems

ROWS = pytest.mark.parametrize("name", problems.OPTIMIZERS)


def base_optimizer():
  return optax.sgd(optax.linear_schedule(0.1, 0.01, 20), momentum=0.9)


def setup(name, rho=None, base_tx=None):
  """The row's optimizer on the quadratic: (tx, one step, params)."""
  row = problems.OPTIMIZERS[name]
  problem = problems.quadratic()
  base_tx = base_optimizer() if base_tx is None else base_tx
  tx = row.make(base_tx, row.rho if rho is None else rho)
  return tx, problems.step_function(tx, problem.loss, row), problem.start


@functools.cache
def compiled(name, rho=None):
  """The same, with the step compiled once for all tests (in single precision)."""
  tx, step, params = setup(name, rho)
  return tx, jax.jit(step), params


def run(step, params, state, steps=5):
  for _ in range(steps):
    params, state = step(params, state)
  return params, state


@ROWS
@pytest.mark.parametrize("problem", problems.PROBLEMS)
def test_convergence(name, problem):
  row = problems.OPTIMIZERS[name]
  loss, start, goal = problems.PROBLEMS[problem]()
  steps = 300 if problem == "regression" else 1500
  tx = row.make(optax.adam(optax.cosine_decay_schedule(0.05, steps)), row.rho)
  step = problems.step_function(tx, loss, row)

  @jax.jit
  def train(params):
    body = lambda carry, _: (step(*carry), None)  # noqa: E731
    carry, _ = jax.lax.scan(body, (params, tx.init(params)), length=steps)
    return row.clean(*carry)

  assert loss(start) > goal
  assert loss(train(start)) < goal


@functools.cache
def base_result():
  base_tx, problem = base_optimizer(), problems.quadratic()
  row = problems.Row(lambda base_tx, rho: base_tx, 0.0, needs_grad_fn=False)
  step = jax.jit(problems.step_function(base_tx, problem.loss, row))
  return run(step, problem.start, base_tx.init(problem.start))[0]


@ROWS
def test_rho_zero_is_the_base_optimizer_bit_for_bit(name):
  tx, step, params = compiled(name, 0.0)
  got, _ = run(step, params, tx.init(params))
  chex.assert_trees_all_equal(got, base_result())


@ROWS
def test_jit_changes_nothing(name):
  tx, step, params = setup(name)
  expected = run(step, params, tx.init(params), 3)
  _, compiled_step, _ = compiled(name)
  got = run(compiled_step, params, tx.init(params), 3)
  chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-7)


@ROWS
def test_no_recompilation(name):
  tx, step, params = compiled(name)
  run(step, params, jax.jit(tx.init)(params), 4)
  assert step._cache_size() == 1  # after the other tests' calls as well


@ROWS
def test_state_is_arrays_and_stays_as_it_is(name):
  tx, step, params = compiled(name)
  state = tx.init(params)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
  _, after = jax.eval_shape(step, params, state)
  chex.assert_trees_all_equal_shapes_and_dtypes(after, state)

  # scan and cond insist on it, weak types included.
  @jax.jit
  def scan_and_cond(params, state):
    body = lambda carry, _: (step(*carry), None)  # noqa: E731
    scanned, _ = jax.lax.scan(body, (params, state), length=3)
    return jax.lax.cond(True, step, lambda *args: args, *scanned)

  taken = scan_and_cond(params, state)
  expected = run(step, params, state, 4)
  chex.assert_trees_all_close(taken, expected, rtol=1e-5, atol=1e-7)


@ROWS
def test_abstract_init(name):
  tx, _, params = setup(name)
  expected = jax.eval_shape(lambda: tx.init(params))
  abstract = jax.eval_shape(lambda: params)
  chex.assert_trees_all_equal_shapes_and_dtypes(
      jax.eval_shape(tx.init, abstract), expected
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(params), expected)
  chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(abstract), expected)


SCHEDULED = pytest.mark.parametrize(  # a rule takes the place of a schedule
    "name", [name for name in problems.OPTIMIZERS if name != "auto_radius"])


@SCHEDULED
def test_constant_schedule_is_the_constant(name):
  rho = problems.OPTIMIZERS[name].rho
  tx, step, params = compiled(name)
  expected, _ = run(step, params, tx.init(params))
  tx, step, params = setup(name, optax.constant_schedule(rho))
  got, _ = run(jax.jit(step), params, tx.init(params))
  chex.assert_trees_all_equal(got, expected)


@SCHEDULED
def test_schedule_advances(name):
  # Off at first, on later: equal to the base optimizer, then not.
  tx, step, params = setup(name, lambda count: jnp.where(count < 2, 0.0, 0.3))
  _, base_step, _ = compiled(name, 0.0)
  step = jax.jit(step)
  got, state = run(step, params, tx.init(params), 2)
  expected, base_state = run(base_step, params, tx.init(params), 2)
  chex.assert_trees_all_equal(got, expected)
  got, _ = run(step, got, state, 3)
  expected, _ = run(base_step, expected, base_state, 3)
  with pytest.raises(AssertionError):
    chex.assert_trees_all_close(got, expected, rtol=1e-4)


@ROWS
def test_unknown_extra_arguments_are_ignored(name):
  tx, _, params = setup(name)
  grads = jax.tree.map(jnp.ones_like, params)
  extra = {"grad_fn": lambda params: grads}
  expected = tx.update(grads, tx.init(params), params, **extra)
  got = tx.update(grads, tx.init(params), params, **extra, nobody_knows=1)
  chex.assert_trees_all_equal(got, expected)


@ROWS
def test_extra_arguments_reach_the_base_optimizer(name):
  def scale_by_argument(updates, state, params=None, *, factor, **extra_args):
    return jax.tree.map(lambda g: factor * g, updates), state

  base_tx = optax.GradientTransformationExtraArgs(
      lambda params: optax.EmptyState(), scale_by_argument
  )
  tx, _, params = setup(name, 0.0, base_tx)
  grads = jax.tree.map(jnp.ones_like, params)
  updates, _ = tx.update(
      grads, tx.init(params), params, grad_fn=lambda params: grads, factor=-3.0
  )
  chex.assert_trees_all_equal(updates, jax.tree.map(lambda g: -3 * g, grads))


@ROWS
def test_donated_buffers(name):
  tx, step, params = compiled(name)
  expected = run(step, params, tx.init(params), 3)
  donating = jax.jit(step, donate_argnums=(0, 1))
  start = jax.tree.map(jnp.copy, params)
  got = run(donating, start, tx.init(params), 3)
  chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-7)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start))


@ROWS
def test_vmap_is_a_loop(name):
  tx, step, params = compiled(name)
  many = jax.tree.map(lambda x: np.stack([x, 2 * x, 0 * x]), params)

  @jax.jit
  @jax.vmap
  def train(w):
    body = lambda carry, _: (step(*carry), None)  # noqa: E731
    return jax.lax.scan(body, (w, tx.init(w)), length=2)[0][0]

  got = train(many)
  for i in range(3):
    start = jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), many)
    expected, _ = run(step, start, tx.init(start), 2)
    chex.assert_trees_all_close(
        jax.tree.map(lambda x, i=i: x[i], got), expected, rtol=1e-5, atol=1e-6
    )


@ROWS
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_parameters_keep_their_dtype(name, dtype):
  tx, step, params = setup(name, base_tx=optax.sgd(0.1))
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  state = tx.init(params)
  got, after = run(jax.jit(step), params, state, 2)
  chex.assert_trees_all_equal_shapes_and_dtypes(got, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(got))


@ROWS
def test_double_precision(name):
  with problems.enable_x64(True):
    tx, step, params = setup(name)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    state = tx.init(params)
    got, after = run(jax.jit(step), params, state, 2)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@ROWS
def test_missing_leaves(name):
  row = problems.OPTIMIZERS[name]
  tx = row.make(base_optimizer(), row.rho)
  loss = lambda params: jnp.sum(params["w"] ** 2)  # noqa: E731
  params = {"w": jnp.ones(3), "frozen": None}
  step = jax.jit(problems.step_function(tx, loss, row))
  got, _ = run(step, params, tx.init(params), 2)
  assert got["frozen"] is None
  assert loss(got) < loss(params)
  step = problems.step_function(tx, lambda params: jnp.zeros(()), row)
  assert step({}, tx.init({}))[0] == {}


@ROWS
def test_zero_gradient_gives_finite_steps(name):
  tx, step, _ = compiled(name)
  minimum = {"w": jnp.array([1.0, -2.0, 3.0]), "bias": jnp.zeros(2)}
  got, _ = run(step, minimum, tx.init(minimum), 2)
  chex.assert_trees_all_equal(got, minimum)


@ROWS
def test_nan_gradients_are_not_hidden(name):
  tx, _, params = setup(name)
  loss = lambda params: jnp.sum(params["w"] ** 2) * jnp.nan  # noqa: E731
  step = jax.jit(problems.step_function(tx, loss, problems.OPTIMIZERS[name]))
  got, _ = step(params, tx.init(params))
  assert np.isnan(got["w"]).all()


@ROWS
def test_sharded_is_unsharded(name):
  devices = np.array(jax.devices()[:4])
  mesh = Mesh(devices.reshape(2, 2), ("data", "model"))
  x = jax.random.normal(jax.random.key(0), (16, 8))
  y = jax.random.normal(jax.random.key(1), (16, 4))
  start = {
      "kernel": 0.3 * jax.random.normal(jax.random.key(2), (8, 4)),
      "bias": jnp.zeros(4),
  }
  row = problems.OPTIMIZERS[name]
  tx = row.make(base_optimizer(), row.rho)

  def step(params, state, x, y):
    loss = lambda w: jnp.mean((x @ w["kernel"] + w["bias"] - y) ** 2)  # noqa: E731
    return problems.step_function(tx, loss, row)(params, state)

  def put(tree, spec):
    return jax.device_put(tree, NamedSharding(mesh, spec))

  expected = run(
      jax.jit(functools.partial(step, x=x, y=y)), start, tx.init(start), 3
  )
  params = {
      "kernel": put(start["kernel"], PartitionSpec(None, "model")),
      "bias": put(start["bias"], PartitionSpec("model")),
  }
  data = {"x": put(x, PartitionSpec("data")), "y": put(y, PartitionSpec("data"))}
  state = tx.init(params)
  shardings = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)  # noqa: E731
  sharded_step = jax.jit(step, out_shardings=(shardings(params), None))
  got, after = sharded_step(params, state, **data)
  for before, later in zip(
      jax.tree.leaves(state), jax.tree.leaves(after), strict=True
  ):
    if before.ndim:  # scalars move from one device to all of them
      assert later.sharding.is_equivalent_to(before.sharding, before.ndim)
  got, after = run(functools.partial(sharded_step, **data), got, after, 2)
  chex.assert_trees_all_close((got, after), expected, rtol=1e-4, atol=2e-6)
  assert shardings(got) == shardings(params)
