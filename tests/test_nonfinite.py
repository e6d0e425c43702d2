"""A NaN or inf in either pass skips the step: nothing moves, and it is counted."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax

W = {"kernel": jnp.array([1.0, -2.0, 0.5]), "bias": jnp.array([0.5])}
BASES = {
    "adam": lambda: optax.adam(0.1),
    # Makes a finite update of an infinite gradient.
    "lion": lambda: optax.lion(0.1),
    # Makes none in most steps, so that the updates say nothing.
    "accumulation": lambda: optax.MultiSteps(
        optax.adam(0.1), 3
    ).gradient_transformation(),
    "typed keys": lambda: optax.chain(noise(), optax.sgd(0.1)),
}


def noise():
  def update(updates, key, params=None):
    key, now = jax.random.split(key)
    draw = 0.01 * jax.random.normal(now, ())
    return jax.tree.map(lambda g: g + draw, updates), key

  return optax.GradientTransformation(lambda params: jax.random.key(0), update)


def link(**options):
  ascent_tx = optax.chain(optax.ema(0.9), asam_jax.ascent(0.3, **options))
  return asam_jax.perturbed_gradient(ascent_tx)


def step(tx, w, state, clean=1.0, perturbed=1.0):
  """A step on a parabola; the factors spoil one entry of a pass's gradient."""
  return compiled_step(tx, w, state, clean, perturbed)


@functools.partial(jax.jit, static_argnums=0)
def compiled_step(tx, w, state, clean, perturbed):
  def spoiled(w, factor):
    return w | {"kernel": w["kernel"].at[1].multiply(factor)}

  updates, state = tx.update(
      spoiled(w, clean), state, w, grad_fn=functools.partial(spoiled, factor=perturbed)
  )
  return optax.apply_updates(w, updates), state


@functools.cache
def skipping(base):
  return asam_jax.skip_nonfinite(BASES[base](), link())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf])
@pytest.mark.parametrize("which", ["clean", "perturbed"])
def test_the_whole_step_is_skipped_and_counted(base, bad, which):
  tx = skipping(base)
  w, state = step(tx, W, tx.init(W))
  after, skipped = step(tx, w, state, **{which: bad})
  chex.assert_trees_all_equal(after, w)
  assert skipped.skipped == state.skipped + 1
  for new, old in zip(
      jax.tree.leaves((skipped.link, skipped.base)),
      jax.tree.leaves((state.link, state.base)),
      strict=True,
  ):
    assert new.dtype == old.dtype
    assert (new == old).all()
  # And goes on as if nothing had been.
  chex.assert_trees_all_close(step(tx, after, skipped)[0], step(tx, w, state)[0])


@pytest.mark.parametrize("base", BASES)
def test_without_a_nan_it_is_the_chain(base):
  tx = skipping(base)
  chain = optax.chain(link(), BASES[base]())
  got, expected = (W, tx.init(W)), (W, chain.init(W))
  for _ in range(4):
    got, expected = step(tx, *got), step(chain, *expected)
  chex.assert_trees_all_close(got[0], expected[0], rtol=1e-6)
  assert got[1].skipped == 0


def test_state_dtypes_and_one_compilation():
  tx = asam_jax.skip_nonfinite(
      optax.adam(0.1), asam_jax.perturbed_gradient(asam_jax.ascent(0.3))
  )
  run = jax.jit(lambda *args: step(tx, *args))
  state = tx.init(W)
  w = W
  for factor in (1.0, jnp.nan, 1.0):
    w, after = run(w, state, factor)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    state = after
  assert run._cache_size() == 1
  body = lambda carry, bad: (step(tx, *carry, bad), None)  # noqa: E731
  (_, state), _ = jax.lax.scan(body, (W, tx.init(W)), jnp.array([1.0, jnp.nan, 1.0]))
  assert state.skipped == 1


def test_the_log_is_of_the_skipped_step():
  recording = asam_jax.perturbed_gradient(
      asam_jax.ascent(0.3), info=asam_jax.Geometry()
  )
  tx = asam_jax.skip_nonfinite(optax.adam(0.1), recording)

  @jax.jit
  def step(w, state, clean=1.0, perturbed=1.0):
    grads = jax.tree.map(lambda x: clean * x, w)
    value_fn = lambda w: perturbed * jnp.sum(w["kernel"] ** 2)  # noqa: E731
    updates, state = tx.update(grads, state, w, value=clean, value_fn=value_fn)
    return optax.apply_updates(w, updates), state

  w, state = step(W, tx.init(W))
  w, state = step(w, state, clean=jnp.inf)
  info = optax.tree_utils.tree_get(state, "info")
  assert info.gradient_norm == jnp.inf
  assert info.nonfinite_steps == state.skipped == 1
  _, state = step(w, state, perturbed=jnp.nan)
  assert optax.tree_utils.tree_get(state, "info").nonfinite_steps == 2


def test_extra_arguments_reach_the_base():
  base_tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
  tx = asam_jax.skip_nonfinite(base_tx, link())
  updates, state = tx.update(
      W, tx.init(W), W, grad_fn=lambda w: w, value=jnp.array(2.0)
  )
  assert optax.tree_utils.tree_get(state, "best_value") == 2
  assert jnp.isfinite(updates["kernel"]).all()


def test_devices_agree_to_skip():
  # The gradient of one of four devices is bad; all must skip, or they part.
  tx = asam_jax.skip_nonfinite(
      optax.sgd(0.1),
      asam_jax.perturbed_gradient(asam_jax.ascent(0.3), axis_name="data"),
      axis_name="data",
  )
  run = jax.jit(jax.vmap(
      lambda clean: step(tx, W, tx.init(W), clean), axis_name="data"
  ))
  after, state = run(jnp.array([1.0, 1.0, jnp.inf, 1.0]))
  np.testing.assert_array_equal(state.skipped, 1)
  for i in range(4):
    chex.assert_trees_all_equal(
        jax.tree.map(lambda x, i=i: np.asarray(x)[i], after), W
    )


def test_apply_if_finite_around_is_not_enough():
  # The reason for skip_nonfinite: it looks at the incoming gradient alone.
  tx = optax.apply_if_finite(asam_jax.adaptive_sam(optax.sgd(0.1), 0.3), 5)
  after, state = step(tx, W, tx.init(W), clean=jnp.nan)
  chex.assert_trees_all_equal(after, W)
  assert state.total_notfinite == 1
  after, state = step(tx, W, tx.init(W), perturbed=jnp.inf)
  assert not np.isfinite(after["kernel"]).all()
  assert state.total_notfinite == 0


@functools.partial(jax.jit, static_argnums=0)
def adam_if_finite(p, bad):
  """(W after a step, the state)."""
  tx = optax.apply_if_finite(optax.adam(0.1), 5)

  def loss(w, factor):
    # At w itself the gradient is bad, at any other point it isn't.
    return jnp.sum(w["kernel"] ** 2) + jnp.sum(w["bias"] ** 2 * factor)

  _, grads = asam_jax.value_and_grad(loss, rho=0.3, p=float(p))(W, bad)
  updates, state = tx.update(grads, tx.init(W), W)
  return optax.apply_updates(W, updates), state


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("p", [1, 2, 3, jnp.inf])
def test_apply_if_finite_on_the_function_transformation(bad, p):
  # A bad clean gradient gives a NaN in the perturbed one, so one look is enough.
  w, state = adam_if_finite(p, bad)
  chex.assert_trees_all_equal(w, W)
  assert state.total_notfinite == 1


def test_apply_if_finite_around_one_gradient_methods():
  tx = optax.apply_if_finite(
      asam_jax.carried(optax.adam(0.1), asam_jax.ascent(0.3)), 5
  )
  w, state = W, tx.init(W)
  updates, state = tx.update(W, state, w)
  w = optax.apply_updates(w, updates)
  updates, after = tx.update(jax.tree.map(lambda x: jnp.nan * x, W), state, w)
  chex.assert_trees_all_equal(optax.apply_updates(w, updates), w)
  chex.assert_trees_all_equal(after.inner_state, state.inner_state)
  assert after.total_notfinite == 1
