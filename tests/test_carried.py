"""One-gradient methods: against NumPy, without drift, and what they cost."""

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
LR, DECAY, RHO, ETA = 0.05, 0.9, 0.3, 0.01


def gradient(w):
  return A @ (w - CENTER)


def jax_gradient(w):
  return jnp.asarray(A) @ (w - jnp.asarray(CENTER))


def epsilon_of(direction, w, p=2.0):
  (epsilon,), _ = problems.oracle_perturbation(
      [direction], [problems.oracle_factor(w, ETA, "elementwise")], RHO, p
  )
  return epsilon


def run(tx, steps=20, start=START, grad=jax_gradient):
  """The user's loop: (its parameters, the state)."""
  params = jnp.asarray(start)
  state = tx.init(params)

  @jax.jit
  def step(params, state):
    updates, state = tx.update(grad(params), state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(steps):
    params, state = step(params, state)
  return params, state


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_stale_gradient_against_numpy(p):
  w, epsilon = START, np.zeros(3)
  for _ in range(20):
    g = gradient(w + epsilon)
    w = w - LR * g
    epsilon = epsilon_of(g, w, p)
  with problems.enable_x64(True):
    tx = asam_jax.carried(optax.sgd(LR), asam_jax.ascent(RHO, ETA, p))
    params, state = run(tx)
    np.testing.assert_allclose(asam_jax.eval_params(state), w, rtol=1e-10)
    np.testing.assert_allclose(params, w + epsilon, rtol=1e-10)


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
@pytest.mark.parametrize("own_trace", [False, True])
def test_momentum_sam_against_numpy(p, own_trace):
  # With SGD's momentum as the paper has it, or without one in the base optimizer.
  w, epsilon, v = START, np.zeros(3), np.zeros(3)
  for _ in range(20):
    g = gradient(w + epsilon)
    v = DECAY * v + g
    w = w - LR * (g if own_trace else v)
    epsilon = epsilon_of(-v, w, p)
  with problems.enable_x64(True):
    base_tx = optax.sgd(LR, momentum=None if own_trace else DECAY)
    tx = asam_jax.momentum_sam(base_tx, RHO, ETA, p, decay=DECAY)
    params, state = run(tx)
    np.testing.assert_allclose(asam_jax.eval_params(state), w, rtol=1e-10)
    np.testing.assert_allclose(params, w + epsilon, rtol=1e-10)


def test_momentum_sam_ascends_against_adams_mu():
  b1, b2, tiny = 0.9, 0.99, 1e-8
  w, epsilon, mu, nu = START, np.zeros(3), np.zeros(3), np.zeros(3)
  for t in range(1, 21):
    g = gradient(w + epsilon)
    mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g**2
    w = w - LR * (mu / (1 - b1**t)) / (np.sqrt(nu / (1 - b2**t)) + tiny)
    epsilon = epsilon_of(-mu, w)
  with problems.enable_x64(True):
    tx = asam_jax.momentum_sam(optax.adam(LR, b1, b2, tiny), RHO, ETA)
    params, state = run(tx)
    np.testing.assert_allclose(asam_jax.eval_params(state), w, rtol=1e-9)
    np.testing.assert_allclose(params, w + epsilon, rtol=1e-9)


def test_rho_zero_is_the_base_optimizer_bit_for_bit_without_jit():
  loss, start, _ = problems.regression()
  grad = jax.jit(jax.grad(loss))
  base_tx = optax.sgd(0.1, momentum=0.9)
  expected = start
  base_state = base_tx.init(start)
  for _ in range(3):
    updates, base_state = base_tx.update(grad(expected), base_state, expected)
    expected = optax.apply_updates(expected, updates)
  for tx in (
      asam_jax.momentum_sam(base_tx, 0.0),
      asam_jax.carried(base_tx, asam_jax.ascent(0.0)),
  ):
    params, state = start, tx.init(start)
    for _ in range(3):
      updates, state = tx.update(grad(params), state, params)
      params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(params, expected)
    chex.assert_trees_all_equal(asam_jax.eval_params(state), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_clean_parameters_do_not_drift(dtype):
  # With a learning rate of 0, w stays to the bit, and epsilon to a rounding.
  rng = np.random.default_rng(0)
  start = jnp.asarray(rng.normal(size=100), dtype)
  noise = jnp.asarray(rng.normal(size=(7, 100)), dtype)
  tx = asam_jax.carried(optax.sgd(0.0), asam_jax.ascent(0.5))

  @jax.jit
  def train(params, state):
    def step(i, carry):
      params, state = carry
      updates, state = tx.update(noise[i % 7], state, params)
      return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, 1000, step, (params, state))

  params, state = train(start, tx.init(start))
  chex.assert_trees_all_equal(asam_jax.eval_params(state), start)
  ascent_tx = asam_jax.ascent(0.5)
  update = jax.jit(ascent_tx.update)
  epsilon, _ = update(noise[999 % 7], ascent_tx.init(start), start)
  assert np.abs(np.asarray(epsilon, np.float32)).max() > 0.05
  np.testing.assert_allclose(
      np.asarray(params, np.float32), np.asarray(start + epsilon, np.float32),
      atol=4 * float(jnp.finfo(dtype).eps),
  )


def test_clean_parameters_in_float32_where_parameters_are_bfloat16():
  # Steps below bfloat16's resolution add up in the state, and the parameters are
  # w + epsilon rounded once.
  start = jnp.ones(4, jnp.bfloat16)
  tx = asam_jax.carried(
      optax.sgd(1e-4), asam_jax.ascent(0.0), dtype=jnp.float32
  )
  params, state = run(tx, 100, start, grad=jnp.ones_like)
  clean = asam_jax.eval_params(state)
  assert clean.dtype == jnp.float32
  assert params.dtype == jnp.bfloat16
  np.testing.assert_allclose(clean, 0.99, rtol=1e-5)
  chex.assert_trees_all_equal(params, clean.astype(jnp.bfloat16))
  without = asam_jax.carried(optax.sgd(1e-4), asam_jax.ascent(0.0))
  params, state = run(without, 100, start, grad=jnp.ones_like)
  chex.assert_trees_all_equal(params, start)


def test_memory_is_one_parameter_copy():
  params = {"w": jnp.ones((30, 20)), "bias": jnp.ones(20)}

  def size(tx):
    return sum(leaf.size for leaf in jax.tree.leaves(tx.init(params)))

  scalars = 3  # the ascent's count, sharpness and norm
  for base_tx in (optax.sgd(0.1, momentum=0.9), optax.adamw(0.1)):
    tx = asam_jax.momentum_sam(base_tx)
    assert size(tx) == size(base_tx) + 620 + scalars
  tx = asam_jax.carried(optax.sgd(0.1), asam_jax.ascent())
  assert size(tx) == 620 + scalars
  # Without a momentum to borrow, a trace of its own.
  assert size(asam_jax.momentum_sam(optax.sgd(0.1))) == 2 * 620 + scalars


def test_flops_of_a_step():
  # A perceptron of 1.9 M parameters: 17 operations per parameter over SGD with
  # momentum, whatever the batch; that is 1.3 % at batch 256.
  sizes = [(784, 1024), (1024, 1024), (1024, 10)]
  params = {
      f"layer{i}": {
          "kernel": jax.ShapeDtypeStruct(shape, jnp.float32),
          "bias": jax.ShapeDtypeStruct(shape[1:], jnp.float32),
      }
      for i, shape in enumerate(sizes)
  }
  x = jax.ShapeDtypeStruct((256, 784), jnp.float32)
  y = jax.ShapeDtypeStruct((256,), jnp.int32)

  def loss(params, x, y):
    for i in range(len(sizes)):
      layer = params[f"layer{i}"]
      x = (jax.nn.relu(x) if i else x) @ layer["kernel"] + layer["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

  def compiled(tx):
    def step(params, state, x, y):
      grads = jax.grad(loss)(params, x, y)
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    return jitted.lower(params, state, x, y).compile()

  base = compiled(optax.sgd(0.1, momentum=0.9))
  count = sum(math.prod(shape.shape) for shape in jax.tree.leaves(params))
  for tx in (
      asam_jax.momentum_sam(optax.sgd(0.1, momentum=0.9)),
      asam_jax.carried(optax.sgd(0.1, momentum=0.9), asam_jax.ascent()),
  ):
    ours = compiled(tx)
    flops = [one.cost_analysis()["flops"] for one in (ours, base)]
    assert flops[0] - flops[1] <= 17.1 * count
    assert flops[0] <= 1.02 * flops[1]
    # No temporary the size of the parameters, such as a negated momentum. (JAX
    # 0.10 needs none at all; 0.5 copies the largest leaves.)
    memory = [one.memory_analysis().temp_size_in_bytes for one in (ours, base)]
    assert memory[0] - memory[1] < 0.9 * 4 * count


def test_in_an_unmodified_train_state():
  pytest.importorskip("flax", reason="TrainState is Flax's")
  from flax import linen as nn
  from flax.training import train_state

  model = nn.Dense(1)
  x = jax.random.normal(jax.random.key(0), (16, 4))
  y = x @ jnp.array([[1.0], [-2.0], [0.5], [0.0]])
  tx = asam_jax.momentum_sam(optax.adam(0.05), rho=0.05)
  state = train_state.TrainState.create(
      apply_fn=model.apply, params=model.init(jax.random.key(1), x), tx=tx
  )
  loss = lambda params: jnp.mean((model.apply(params, x) - y) ** 2)  # noqa: E731
  step = jax.jit(
      lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params))
  )
  for _ in range(300):
    state = step(state)
  assert loss(asam_jax.eval_params(state.opt_state)) < 1e-3
  assert loss(state.params) > loss(asam_jax.eval_params(state.opt_state))


def test_resumes_from_a_checkpoint():
  tx = asam_jax.momentum_sam(optax.adam(0.05), optax.linear_schedule(0.1, 0.5, 9))
  loss, start, _ = problems.regression()
  row = problems.Row(lambda *args: tx, 0.0, needs_grad_fn=False)
  step = jax.jit(problems.step_function(tx, loss, row))
  params, state = start, tx.init(start)
  saved = None
  for i in range(6):
    if i == 3:
      saved = jax.tree.map(np.array, (params, state))
    params, state = step(params, state)
  restored = jax.tree.map(jnp.asarray, saved)
  for _ in range(3):
    restored = step(*restored)
  chex.assert_trees_all_equal(restored, (params, state))


def test_parameters_may_be_replaced():
  # Going on from the clean parameters (or any others) leads back to w + epsilon.
  tx = asam_jax.carried(optax.sgd(0.1), asam_jax.ascent(0.5))
  params = jnp.array([1.0, 2.0])
  _, state = run(tx, 3, params, grad=lambda w: 2 * w)
  grads, clean = jnp.array([0.3, -0.1]), asam_jax.eval_params(state)
  update = jax.jit(tx.update)
  points = []
  for point in (clean, clean + 0.25):
    updates, _ = update(grads, state, point)
    points.append(point + updates)
  chex.assert_trees_all_close(*points, rtol=1e-6)


def test_eval_params_finds_the_state():
  params = {"w": jnp.arange(3.0)}
  tx = asam_jax.carried(optax.sgd(0.1), asam_jax.ascent())
  injected = optax.inject_hyperparams(
      lambda rho: asam_jax.momentum_sam(optax.sgd(0.1), rho)
  )(rho=0.1)
  accumulated = optax.MultiSteps(tx, 2)
  for outer in (tx, optax.chain(optax.identity(), tx), accumulated, injected):
    chex.assert_trees_all_equal(asam_jax.eval_params(outer.init(params)), params)


def test_gradient_accumulation_is_the_large_batch():
  tx = asam_jax.carried(optax.sgd(0.1), asam_jax.ascent(0.3))
  accumulated = optax.MultiSteps(tx, 2).gradient_transformation()
  params = expected = jnp.array([1.0, 2.0])
  state, large = accumulated.init(params), tx.init(params)
  accumulated_update, large_update = jax.jit(accumulated.update), jax.jit(tx.update)
  for i in range(6):
    g = jnp.array([2.0, 1.0]) * params * (0.5 if i % 2 else 1.5)
    updates, state = accumulated_update(g, state, params)
    params = params + updates
    if i % 2:
      updates, large = large_update(jnp.array([2.0, 1.0]) * expected, large, expected)
      expected = expected + updates
  chex.assert_trees_all_close(params, expected, rtol=1e-6)


def test_abstract_parameters_give_an_abstract_state():
  tx = asam_jax.carried(optax.sgd(0.1), asam_jax.ascent(), dtype=jnp.float32)
  abstract = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
  state = tx.init(abstract)
  expected = jax.eval_shape(tx.init, abstract)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)


WITHOUT_STEPS = asam_jax.Geometry(perturb={"w": True, "steps": False})
# Optax's own optimizers can't multiply a float0.
FLOATS_ONLY = optax.masked(optax.sgd(0.1), {"w": True, "steps": False})


def test_parameters_changed_from_outside_are_ignored():
  tx = asam_jax.carried(optax.sgd(0.1), asam_jax.ascent(0.1))
  params = {"w": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}
  state = tx.init(params)
  grads = jax.tree.map(jnp.ones_like, params)
  elsewhere = jax.tree.map(lambda w: w + 5.0, params)
  results = []
  for start in (params, elsewhere):
    updates, after = tx.update(grads, state, start)
    results.append((optax.apply_updates(start, updates), after))
  chex.assert_trees_all_close(*results, atol=1e-6)


@pytest.mark.parametrize("make", [
    lambda base_tx: asam_jax.carried(base_tx, asam_jax.ascent(
        0.1, perturb={"w": True, "steps": False})),
    lambda base_tx: asam_jax.momentum_sam(
        base_tx, 0.1, perturb={"w": True, "steps": False}),
    lambda base_tx: asam_jax.looksam(base_tx, 0.1, k=2, geometry=WITHOUT_STEPS),
    lambda base_tx: asam_jax.ae_sam(base_tx, 0.1, geometry=WITHOUT_STEPS),
    lambda base_tx: asam_jax.gsam(base_tx, 0.1, geometry=WITHOUT_STEPS),
    lambda base_tx: asam_jax.friendly_sam(base_tx, 0.1, geometry=WITHOUT_STEPS),
    lambda base_tx: asam_jax.adaptive_sam(
        base_tx, 0.1, perturb={"w": True, "steps": False}),
], ids=["carried", "momentum_sam", "looksam", "ae_sam", "gsam", "friendly_sam", "asam"])
def test_integer_leaves_are_left_alone(make):
  params = {"w": jnp.array([1.0, -2.0]), "steps": jnp.array([3, 4])}
  grad_fn = jax.grad(lambda w: jnp.sum(w["w"] ** 2), allow_int=True)
  tx = make(FLOATS_ONLY)
  state, w = tx.init(params), params
  for _ in range(3):
    updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
    w = {"w": w["w"] + updates["w"], "steps": w["steps"]}
  assert bool(jnp.isfinite(w["w"]).all())
  assert bool((w["w"] != params["w"]).all())


def test_errors():
  params = {"w": jnp.ones(2), "b": jnp.ones(3)}
  tx = asam_jax.carried(optax.sgd(0.1), asam_jax.ascent())
  state = tx.init(params)
  with pytest.raises(ValueError, match="params=None"):
    tx.update(params, state)
  with pytest.raises(TypeError, match="gradient has the structure"):
    tx.update((params, {}), state, params)
  momentum_tx = asam_jax.momentum_sam(optax.sgd(0.1))
  grads = {"w": jnp.ones(()), "b": jnp.ones(3)}
  with pytest.raises(TypeError, match=r"gradient\['w'\] has shape"):
    momentum_tx.update(grads, momentum_tx.init(params), params)
  with pytest.raises(TypeError, match=r"dtype=.*int32"):
    asam_jax.carried(optax.sgd(0.1), asam_jax.ascent(), dtype=jnp.int32)
  with pytest.raises(ValueError, match=r"decay=1\.0"):
    asam_jax.momentum_sam(optax.sgd(0.1), decay=1.0)
  with pytest.raises(ValueError, match="rho=-1"):
    asam_jax.momentum_sam(optax.sgd(0.1), rho=-1)
  with pytest.raises(ValueError, match="0 CarriedStates"):
    asam_jax.eval_params(optax.sgd(0.1).init(params))
  with pytest.raises(ValueError, match="2 CarriedStates"):
    asam_jax.eval_params((state, state))
