"""Defects that were found in other implementations, each kept out by a test.

The numbers are those of the original reports: an example input, what the equations
say, and what was returned instead.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax

# Before 0.2.5 optax.MultiSteps takes no functions among the extra arguments.
OPTAX_ACCUMULATES_FUNCTIONS = (
    tuple(int(n) for n in optax.__version__.split(".")[:3]) >= (0, 2, 5)
)


@functools.partial(jax.jit, static_argnames="normalization")
def perturbation(w, g, rho=0.5, eta=0.01, normalization="elementwise"):
  tx = asam_jax.ascent(rho, eta, normalization=normalization)
  return tx.update(g, tx.init(w), w)[0]


def one_step(tx, w, grad_fn, **extra):
  @jax.jit
  def step(w):
    updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn, **extra)
    return optax.apply_updates(w, updates), state

  return step(w)


BOTH = pytest.mark.parametrize(
    "make", [asam_jax.adaptive_sam, asam_jax.sam], ids=["asam", "sam"]
)


@BOTH
def test_stationary_point_gives_no_nan(make):
  w = jnp.array([1.0, 2.0])
  after, _ = one_step(make(optax.sgd(1.0)), w, jnp.zeros_like)
  np.testing.assert_array_equal(after, w)


def test_stationary_point_in_float16_gives_no_nan():
  # A guard of 1e-12 is zero in float16.
  w = jnp.ones(4, jnp.float16)
  np.testing.assert_array_equal(perturbation(w, jnp.zeros_like(w)), np.zeros(4))


@BOTH
def test_typed_keys_in_the_base_state(make):
  def add_noise(updates, key, params=None):
    noise = 0.01 * jax.random.normal(key, updates.shape)
    return updates + noise, jax.random.split(key, 1)[0]

  noise = optax.GradientTransformation(lambda w: jax.random.key(0), add_noise)
  tx = make(optax.chain(noise, optax.sgd(0.1)))
  after, state = one_step(tx, jnp.ones(3), lambda w: 2 * w)
  assert np.isfinite(after).all()
  assert any(
      jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state)
  )


def test_accumulation_inside_sees_every_micro_batch():
  # With rho = 0 on the micro-gradients [-1, 0] and [0, -10]: a step of [0.5, 5].
  tx = asam_jax.adaptive_sam(
      optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(), 0.0
  )
  calls = []

  @jax.jit
  def step(w, state, g):
    def grad_fn(w):
      calls.append(1)
      return g + 0 * w

    updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
    return optax.apply_updates(w, updates), state

  w = jnp.zeros(2)
  state = tx.init(w)
  for g in (jnp.array([-1.0, 0.0]), jnp.array([0.0, -10.0])):
    w, state = step(w, state, g)
  np.testing.assert_allclose(w, [0.5, 5.0])
  assert len(calls) == 2  # in the one step that is traced for both


def test_accumulation_around_the_function_transformation():
  tx = optax.MultiSteps(optax.sgd(1.0), 2)

  @jax.jit
  def step(w, state, g):
    grads = asam_jax.grad(lambda w: g @ w, rho=0.0)(w)
    updates, state = tx.update(grads, state, w)
    return optax.apply_updates(w, updates), state

  w = jnp.zeros(2)
  state = tx.init(w)
  for g in (jnp.array([-1.0, 0.0]), jnp.array([0.0, -10.0])):
    w, state = step(w, state, g)
  np.testing.assert_allclose(w, [0.5, 5.0])


def test_accumulation_around_the_optimizer_is_what_the_docs_say():
  # Documented as wrong: grad_fn knows the last micro-batch only.
  assert "MultiSteps" in (asam_jax.adaptive_sam.__doc__ or "")
  tx = optax.MultiSteps(asam_jax.adaptive_sam(optax.sgd(1.0), 0.0), 2)
  w = jnp.zeros(2)
  state = tx.init(w)
  for g in (jnp.array([-1.0, 0.0]), jnp.array([0.0, -10.0])):
    if not OPTAX_ACCUMULATES_FUNCTIONS:
      with pytest.raises(TypeError, match="function"):
        tx.update(g, state, w, grad_fn=lambda w, g=g: g + 0 * w)
      return
    updates, state = tx.update(g, state, w, grad_fn=lambda w, g=g: g + 0 * w)
    w = optax.apply_updates(w, updates)
  np.testing.assert_allclose(w, [0.0, 10.0])


def test_value_reaches_links_after_and_inside():
  def run(tx):
    w = jnp.ones(2)
    return one_step(tx, w, lambda w: 2 * w, value=jnp.array(1.0))[0]

  plateau = optax.contrib.reduce_on_plateau()
  inside = run(asam_jax.adaptive_sam(optax.chain(optax.sgd(0.1), plateau), 0.0))
  after = run(optax.chain(asam_jax.adaptive_sam(optax.sgd(0.1), 0.0), plateau))
  np.testing.assert_allclose(inside, [0.8, 0.8])
  np.testing.assert_allclose(after, [0.8, 0.8])


def test_links_in_front_touch_the_ascent_alone():
  # The docs say so: the descent is clipped inside the base optimizer.
  def grad_fn(w):
    return 100.0 * w

  w = jnp.ones(2)
  front = optax.chain(
      optax.clip_by_global_norm(1.0), asam_jax.adaptive_sam(optax.sgd(1.0), 0.0)
  )
  inside = asam_jax.adaptive_sam(
      optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), 0.0
  )
  np.testing.assert_allclose(
      np.linalg.norm(one_step(front, w, grad_fn)[0] - w), 141.42, rtol=1e-4
  )
  np.testing.assert_allclose(
      np.linalg.norm(one_step(inside, w, grad_fn)[0] - w), 1.0, rtol=1e-5
  )
  assert "In front of" in (asam_jax.adaptive_sam.__doc__ or "")


@BOTH
def test_schedules_of_rho_advance(make):
  tx = make(optax.identity(), optax.linear_schedule(0.1, 0.4, 3))
  w = jnp.array([0.0, 1.0])

  @jax.jit
  def radius(state):
    point, state = tx.update(w, state, w, grad_fn=lambda point: point)
    return jnp.linalg.norm(point - w), state

  state, reached = tx.init(w), []
  for _ in range(4):
    length, state = radius(state)
    reached.append(length)
  scale = 1.0 if make is asam_jax.sam else 1.01  # T = |w| + eta
  np.testing.assert_allclose(reached, scale * np.array([0.1, 0.2, 0.3, 0.4]), rtol=1e-5)


def test_float16_norms_do_not_overflow():
  w = jnp.zeros(1_000_000, jnp.float16)
  epsilon = perturbation(w, jnp.ones_like(w), 0.05, normalization="none")
  assert (np.asarray(epsilon) > 0).all()
  w = jnp.zeros(4, jnp.float16)
  epsilon = perturbation(w, jnp.full_like(w, 300), 0.05, normalization="none")
  np.testing.assert_allclose(epsilon, 0.025 * np.ones(4), rtol=1e-3)


def test_bfloat16_norms_are_summed_in_float32():
  params = [jnp.zeros((), jnp.bfloat16) for _ in range(300)]
  grads = [jnp.ones((), jnp.bfloat16) for _ in range(300)]
  tx = asam_jax.ascent(1.0, normalization="none")
  epsilon, _ = tx.update(grads, tx.init(params), params)
  # 1 / sqrt(300); a bfloat16 sum of ones stops at 256 and gives 1 / 16.
  np.testing.assert_allclose(np.float32(epsilon[0]), 300**-0.5, rtol=5e-3)


def test_trees_of_mixed_precision_keep_their_dtypes():
  params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float32)}
  epsilon = perturbation(params, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(epsilon, params)


def test_links_that_use_params_inside_and_around():
  w = jnp.array([1.0, 0.0])
  decay = optax.add_decayed_weights(0.5)

  def grad_fn(w):
    return jnp.array([1.0, 0.5])

  inside = asam_jax.adaptive_sam(optax.chain(decay, optax.sgd(1.0)), 0.1)
  np.testing.assert_allclose(one_step(inside, w, grad_fn)[0] - w, [-1.5, -0.5])
  around = optax.chain(
      asam_jax.adaptive_sam(optax.identity(), 0.1), decay, optax.sgd(1.0)
  )
  np.testing.assert_allclose(one_step(around, w, grad_fn)[0] - w, [-1.5, -0.5])


def test_adaptive_means_two_factors_of_t():
  w, g = jnp.array([2.0, 0.5]), jnp.array([3.0, 4.0])
  epsilon = perturbation(w, g, 0.1, 0.0)
  # |w| g / ||g|| would be [0.120, 0.040], and not scale-invariant.
  np.testing.assert_allclose(epsilon, [0.18974, 0.015811], rtol=1e-4)


def test_the_norm_is_global():
  # Normalized leaf by leaf the radius would grow as 0.5, 1 and 2.
  for leaves in (1, 4, 16):
    w = {str(i): np.full(16 // leaves, 2.0, np.float32) for i in range(leaves)}
    epsilon = perturbation(w, w, 0.5, 0.0)
    total = sum(((np.asarray(e) / 2) ** 2).sum() for e in epsilon.values())
    np.testing.assert_allclose(total**0.5, 0.5, rtol=1e-6)


def test_the_weights_matter():
  g = jnp.array([1.0, 1.0])
  a = perturbation(jnp.array([1.0, 2.0]), g)
  b = perturbation(jnp.array([2.0, 1.0]), g)
  np.testing.assert_allclose(a, b[::-1], rtol=1e-6)
  assert abs(float(a[0] - a[1])) > 0.1


def test_zero_weights_move_if_eta_is_positive():
  w, g = jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0])
  # eta adds; as a factor it would give 0 for ever.
  np.testing.assert_allclose(perturbation(w, g, 0.5, 0.01), [0.005, 0.0], rtol=1e-5)
  epsilon = perturbation(jnp.zeros(2), g, 0.5, 0.01, normalization="layerwise")
  np.testing.assert_allclose(epsilon, [0.005, 0.0], rtol=1e-5)


def test_zero_weights_do_no_harm_if_eta_is_zero():
  w, g = jnp.array([0.0, 1.0]), jnp.array([1.0, 1.0])
  np.testing.assert_allclose(perturbation(w, g, 0.1, 0.0), [0.0, 0.1], rtol=1e-6)


@BOTH
def test_parameters_that_a_pass_does_not_use_stay(make):
  # Used in one of the passes only, as with stochastic depth; or in none.
  tx = make(optax.sgd(0.0))
  w = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}

  def gradient(used):
    return jax.grad(lambda w: jnp.sum(w[used] ** 2))

  @jax.jit
  def step(w, state):
    updates, state = tx.update(gradient("a")(w), state, w, grad_fn=gradient("b"))
    return optax.apply_updates(w, updates), state

  after, state = w, tx.init(w)
  for _ in range(4):
    after, state = step(after, state)
  chex.assert_trees_all_equal(after, w)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_nothing_drifts(dtype):
  # Adding and subtracting epsilon in place drifts by 3e-3 in 1000 bfloat16 steps.
  tx = asam_jax.adaptive_sam(optax.sgd(0.0))
  w = jnp.linspace(-1, 1, 50).astype(dtype)

  def step(carry, _):
    w, state = carry
    updates, state = tx.update(w, state, w, grad_fn=lambda w: w)
    return (optax.apply_updates(w, updates), state), None

  (after, _), _ = jax.lax.scan(step, (w, tx.init(w)), length=1000)
  np.testing.assert_array_equal(after, w)


def test_flax_names_are_normalized():
  # A rule keyed on "weight" silently turns a Flax model's ASAM into SAM.
  rows = asam_jax.describe({"kernel": 1.0, "scale": 1.0, "embedding": 1.0, "bias": 1.0})
  assert [row.operator for row in rows] == ["none", *["elementwise"] * 3]
  w, g = jnp.array([9.0]), jnp.array([1.0])
  epsilon = perturbation({"kernel": w}, {"kernel": g}, 0.316, 0.0)
  np.testing.assert_allclose(epsilon["kernel"], 9 * 0.316, rtol=1e-6)
