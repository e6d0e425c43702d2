"""Microbatches: equal to the whole batch, or to one ascent for each, in less memory."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from tests import problems

ROWS = 24
RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(ROWS, 6)))
Y = np.sin(X.sum(1, keepdims=True))
BATCH = {"x": X, "y": Y}
W = {
    "kernel": np.float32(0.5 * RNG.normal(size=(6, 8))),
    "bias": np.float32(0.1 * RNG.normal(size=8)),
    "out": np.float32(0.5 * RNG.normal(size=(8, 1))),
}
per_batch = functools.partial(asam_jax.microbatched, size=4)


@jax.jit
def loss(w, batch):
  hidden = jnp.tanh(batch["x"] @ w["kernel"] + w["bias"])
  return jnp.mean((hidden @ w["out"] - batch["y"]) ** 2)


# Of the whole batch: what microbatches are compared with.
plain = jax.jit(asam_jax.value_and_grad(loss))
gradient = jax.jit(jax.grad(loss))


def piece(i, size=4):
  """The i-th microbatch: every so manieth row, so that devices keep theirs."""
  return jax.tree.map(lambda x: x[i :: ROWS // size], BATCH)


def share(i, devices):
  """The rows of the i-th device."""
  rows = ROWS // devices
  return jax.tree.map(lambda x: x[rows * i : rows * (i + 1)], BATCH)


def mean(trees):
  return jax.tree.map(lambda *xs: np.mean([np.float64(x) for x in xs], 0), *trees)


def test_one_ascent_for_the_batch_is_the_whole_batch():
  expected = jax.jit(asam_jax.value_and_grad(loss, with_info=True))(W, BATCH)
  got = jax.jit(
      asam_jax.value_and_grad(loss, with_info=True, accumulate=per_batch)
  )(W, BATCH)
  chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=1e-6)


def test_the_same_through_the_optimizer():
  tx = asam_jax.adaptive_sam(optax.sgd(0.1, momentum=0.9), rho=0.5)

  @functools.partial(jax.jit, static_argnums=0)
  def step(grad, w, state):
    grad_fn = lambda w: grad(w, BATCH)  # noqa: E731
    updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
    return optax.apply_updates(w, updates), state

  def run(grad):
    w, state = W, tx.init(W)
    for _ in range(3):
      w, state = step(grad, w, state)
    return w

  got, expected = run(asam_jax.microbatched(gradient, 4)), run(gradient)
  chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=1e-6)


def test_one_ascent_for_each_microbatch_is_written_out():
  # m-sharpness: the mean over i of grad L_i(w + epsilon_i), the oracle's epsilon_i.
  def one(i):
    g = gradient(W, piece(i))
    names = sorted(W)
    ts = [
        problems.oracle_factor(W[n], 0.01, "none" if n == "bias" else "elementwise")
        for n in names
    ]
    epsilons, _ = problems.oracle_perturbation([g[n] for n in names], ts, 0.5, 2)
    point = {n: W[n] + np.float32(e) for n, e in zip(names, epsilons, strict=True)}
    return loss(W, piece(i)), gradient(point, piece(i))

  expected = mean([one(i) for i in range(6)])
  got = jax.jit(asam_jax.microbatched(asam_jax.value_and_grad(loss), 4))(W, BATCH)
  chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=1e-6)
  whole = plain(W, BATCH)
  difference = np.subtract(whole[1]["out"], got[1]["out"])
  assert np.abs(difference).max() > 1e-3  # another method


def test_info_and_aux_of_microbatches():
  def with_aux(w, batch):
    return loss(w, batch), {
        "mean": batch["y"].mean(),
        "correct": jnp.sum(batch["y"] > 0),
    }

  fun = asam_jax.value_and_grad(with_aux, has_aux=True, with_info=True)
  fun = jax.jit(fun)
  (value, aux), _, info = jax.jit(asam_jax.microbatched(fun, 4))(W, BATCH)
  np.testing.assert_allclose(value, loss(W, BATCH), rtol=1e-5)
  np.testing.assert_allclose(aux["mean"], Y.mean(), rtol=1e-5)
  assert aux["correct"] == np.sum(Y > 0)  # a count: added up
  infos = [fun(W, piece(i))[2] for i in range(6)]
  chex.assert_trees_all_close(
      info, asam_jax.AscentInfo(*mean(infos)), rtol=1e-4, atol=1e-6
  )
  (_, aux), _ = jax.jit(
      asam_jax.value_and_grad(with_aux, has_aux=True, accumulate=per_batch)
  )(W, BATCH)
  assert aux["correct"] == np.sum(Y > 0)


@pytest.mark.skipif(
    not hasattr(optax, "microbatching"), reason="this Optax has no microbatching"
)
def test_optax_microbatching_in_the_same_places():
  microbatch = functools.partial(
      optax.microbatching.microbatch,
      argnums=1,
      microbatch_size=4,
      accumulator=optax.microbatching.AccumulationType.MEAN,
  )
  got = jax.jit(asam_jax.value_and_grad(loss, accumulate=microbatch))(W, BATCH)
  chex.assert_trees_all_close(got, plain(W, BATCH), rtol=2e-5, atol=1e-6)
  fun = asam_jax.value_and_grad(loss)  # the same rows in each microbatch
  chex.assert_trees_all_close(
      jax.jit(microbatch(fun))(W, BATCH),
      jax.jit(asam_jax.microbatched(fun, 4))(W, BATCH),
      rtol=2e-5,
      atol=1e-6,
  )


def test_a_batch_of_random_keys():
  def noisy(w, batch, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, (6,)))(keys)
    return loss(w, {"x": batch["x"] + noise, "y": batch["y"]})

  keys = jax.random.split(jax.random.key(7), ROWS)
  split = functools.partial(asam_jax.microbatched, size=4, argnums=(1, -1))
  got = jax.jit(asam_jax.value_and_grad(noisy, accumulate=split))(W, BATCH, keys)
  expected = jax.jit(asam_jax.value_and_grad(noisy))(W, BATCH, keys)
  chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=1e-6)


def test_bfloat16_gradients_are_added_up_in_float32():
  # The mean of 512 microbatches, of which a bfloat16 sum stops at 256.
  x = jnp.ones(512)
  got = asam_jax.microbatched(jax.grad(lambda w, x: w * x.mean().astype(w.dtype)), 1)(
      jnp.ones((), jnp.bfloat16), x
  )
  assert got == 1
  assert got.dtype == jnp.bfloat16


def deep(w, x):
  hidden = x
  for _ in range(4):
    hidden = jnp.tanh(hidden @ w["in"]) @ w["in"].T
  return jnp.mean((hidden @ w["in"] @ w["out"]) ** 2)


def temporary(fun, rows):
  """Bytes of the compiled function of deep's weights and so many rows."""
  w = {"in": np.ones((32, 64), np.float32), "out": np.ones((64, 1), np.float32)}
  x = jax.ShapeDtypeStruct((rows, 32), jnp.float32)
  return jax.jit(fun).lower(w, x).compile().memory_analysis().temp_size_in_bytes


@functools.cache
def temporary_of_one_ascent(rows):
  return temporary(asam_jax.value_and_grad(deep), rows)


@pytest.mark.parametrize("inner", [True, False], ids=["per microbatch", "per batch"])
def test_memory_is_that_of_one_microbatch(inner):
  split = functools.partial(asam_jax.microbatched, size=64)  # 64 microbatches
  if inner:
    fun = split(asam_jax.value_and_grad(deep))
  else:
    fun = asam_jax.value_and_grad(deep, accumulate=split)
  pieces = temporary(fun, 4096)
  bound, whole = temporary_of_one_ascent(64), temporary_of_one_ascent(4096)
  gradients = 4 * 4 * (32 * 64 + 64)
  assert pieces < bound + gradients < whole / 10


@pytest.mark.skipif(
    not hasattr(jax.lax, "pcast"), reason="this JAX does not track what varies"
)
def test_in_shard_map_with_averaging():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
  spec = jax.sharding.PartitionSpec
  split = functools.partial(asam_jax.microbatched, size=2)
  fun = asam_jax.value_and_grad(loss, axis_name="data", accumulate=split)

  def body(w, batch):
    value, grads = fun(jax.lax.pcast(w, "data", to="varying"), batch)
    return jax.lax.pmean(value, "data"), grads

  run = jax.shard_map(
      body, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=(spec(), spec())
  )
  got = jax.jit(run)(W, BATCH)
  expected = mean([plain(W, share(i, 4)) for i in range(4)])
  chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_sizes_that_are_none(size):
  with pytest.raises((ValueError, TypeError), match=r"size=.* must be an int >= 1"):
    asam_jax.microbatched(loss, size)


def test_batches_that_do_not_fit():
  fun = asam_jax.microbatched(loss, 5)
  with pytest.raises(ValueError, match=r"size=5 does not divide .* 24 rows"):
    fun(W, BATCH)
  with pytest.raises(ValueError, match="no rows; choose a divisor"):
    asam_jax.microbatched(loss, 4)(W, {"x": X, "y": jnp.zeros(())})
  with pytest.raises(ValueError, match=r"have \[12, 24\] rows"):
    asam_jax.microbatched(loss, 4)(W, {"x": X, "y": Y[:12]})
  with pytest.raises(TypeError, match=r"argnums=\(2,\) with 2 positional"):
    asam_jax.microbatched(loss, 4, argnums=2)(W, BATCH)
  with pytest.raises(TypeError, match="dtype bool has no mean"):
    asam_jax.microbatched(lambda w, x: x.mean() > 0, 4)(W, X)
