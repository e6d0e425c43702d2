"""Low precision: what rounding takes, what brings it back, and loss scaling."""

import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import asam_jax
from tests import problems

MILLION = 1_000_000
NUMPY = {jnp.bfloat16: ml_dtypes.bfloat16, jnp.float16: np.float16}
LOW = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])


@functools.cache
def million(dtype):
  """Weights with standard deviation 0.05, and a gradient."""
  rng = np.random.default_rng(0)
  w, g = 0.05 * rng.normal(size=MILLION), rng.normal(size=MILLION)
  return jnp.asarray(w, dtype), jnp.asarray(g, jnp.float32)


def linear(w, g):
  return jnp.sum(w.astype(jnp.float32) * g)


@pytest.mark.parametrize("jit", [False, True])
def test_what_rounding_takes_is_reported(jit):
  w, g = million(jnp.bfloat16)
  fun = asam_jax.value_and_grad(linear, rho=0.05, normalization="none", with_info=True)
  *_, info = (jax.jit(fun) if jit else fun)(w, g)
  # The same in NumPy, with the bfloat16 of ml_dtypes.
  g16 = np.asarray(g, ml_dtypes.bfloat16).astype(np.float64)
  epsilon = (0.05 * g16 / np.linalg.norm(g16)).astype(ml_dtypes.bfloat16)
  start = np.asarray(w)
  move = (start + epsilon).astype(np.float64) - start.astype(np.float64)
  assert np.mean(move != 0) == pytest.approx(0.22, abs=0.01)
  np.testing.assert_allclose(info.radius, np.linalg.norm(move), rtol=1e-3)
  np.testing.assert_allclose(
      info.kept_share, move @ g16 / (0.05 * np.linalg.norm(g16)), rtol=1e-3
  )
  assert info.radius == pytest.approx(0.041, abs=0.001)
  assert info.kept_share == pytest.approx(0.52, abs=0.01)


def test_float32_weights_keep_all_of_it():
  w, g = million(jnp.float32)
  fun = asam_jax.value_and_grad(linear, rho=0.05, normalization="none", with_info=True)
  *_, info = jax.jit(fun)(w, g)
  np.testing.assert_allclose([info.radius, info.kept_share], [0.05, 1], rtol=1e-3)


@pytest.mark.parametrize("jit", [False, True])
def test_stochastic_rounding_brings_it_back(jit):
  w, g = million(jnp.bfloat16)
  tx = optax.chain(
      asam_jax.ascent(0.05, normalization="none"), asam_jax.stochastic_rounding(1)
  )

  def point(w, g):
    epsilon, _ = tx.update(g.astype(w.dtype), tx.init(w), w)
    return optax.apply_updates(w, epsilon)

  got = (jax.jit(point) if jit else point)(w, g)
  assert got.dtype == w.dtype
  move = np.asarray(got, np.float64) - np.asarray(w, np.float64)
  g16 = np.asarray(g.astype(w.dtype), np.float64)
  share = move @ g16 / (0.05 * np.linalg.norm(g16))
  # The sum of a million roundings, each with an error below half a spacing.
  spread = np.linalg.norm(np.abs(w.astype(jnp.float32)) * 2**-8 * g16) / 2
  assert spread / (0.05 * np.linalg.norm(g16)) < 0.01
  assert share == pytest.approx(1, abs=0.01)


@LOW
def test_the_expected_perturbation_is_right(dtype):
  # Zero, both signs, powers of two, subnormal numbers, moves large and small.
  w = np.array([0, 1, -1, 0.7, -0.3, 2**-14, -(2**-16), 100, 1.99, 0.001, 5, -1])
  e = np.array([1e-3, 1e-3, 1e-3, -1e-4, 5e-4, 3e-6, 1e-7, 0.01, 0.01, 1, 0, 3e-3])
  w, e = jnp.asarray(w, dtype), jnp.asarray(e, dtype)
  target = np.asarray(w, np.float64) + np.asarray(e, np.float64)

  @jax.jit
  @jax.vmap
  def draw(key):
    link = asam_jax.stochastic_rounding(key)
    return optax.apply_updates(w, link.update(e, link.init(w), w)[0])

  count = 20_000
  draws = np.asarray(draw(jax.random.split(jax.random.key(0), count)))
  assert draws.dtype == NUMPY[dtype]
  for i in range(len(target)):
    values = np.unique(draws[:, i].astype(np.float64))
    # One or two values, and no number of the dtype lies between them and the target.
    assert len(values) <= 2
    assert values[0] <= target[i] <= values[-1] or len(values) == 1
    if len(values) == 2:
      up = np.nextafter(NUMPY[dtype](values[0]), NUMPY[dtype](np.inf))
      assert float(up) == values[1]
    width = values[-1] - values[0]
    share = (target[i] - values[0]) / width if width else 0.0
    deviation = width * np.sqrt(share * (1 - share) / count)
    mean = draws[:, i].astype(np.float64).mean()
    assert abs(mean - target[i]) <= 4.5 * deviation + 2e-7 * abs(target[i]), i


def test_where_nothing_is_coarse_nothing_changes():
  params = {"wide": jnp.ones(3), "narrow": jnp.ones(3, jnp.bfloat16), "none": None}
  epsilon = {"wide": jnp.full(3, 1e-3), "narrow": jnp.zeros(3, jnp.bfloat16)}
  epsilon["none"] = None
  tx = asam_jax.stochastic_rounding(0)
  got, _ = jax.jit(tx.update)(epsilon, tx.init(params), params)
  chex.assert_trees_all_equal(got["wide"], epsilon["wide"])
  chex.assert_trees_all_equal(
      optax.apply_updates(params, got)["narrow"], params["narrow"]
  )
  assert got["none"] is None


def test_not_finite_is_not_hidden():
  w = jnp.ones(3, jnp.bfloat16)
  tx = asam_jax.stochastic_rounding(0)
  epsilon = jnp.array([jnp.nan, jnp.inf, -jnp.inf], jnp.bfloat16)
  updates, _ = jax.jit(tx.update)(epsilon, tx.init(w), w)
  got = optax.apply_updates(w, updates)
  np.testing.assert_array_equal(np.float32(got), [np.nan, np.inf, -np.inf])


@pytest.mark.parametrize("key", [0, jax.random.key(0)], ids=["seed", "key"])
def test_keys_advance_and_the_state_stays_as_it_is(key):
  ascent_tx = optax.chain(asam_jax.ascent(0.05), asam_jax.stochastic_rounding(key))
  tx = optax.chain(asam_jax.perturbed_gradient(ascent_tx), optax.sgd(0.0))
  w = jax.random.normal(jax.random.key(1), (64,), jnp.bfloat16)

  @jax.jit
  def step(state):
    """(the point that the gradient is taken at, the new state)."""
    points = []

    def grad_fn(point):
      points.append(point)
      return point

    _, state = tx.update(w, state, w, grad_fn=grad_fn)
    return points[0], state

  start = tx.init(w)
  first, state = step(start)
  second, after = step(state)
  chex.assert_trees_all_equal_shapes_and_dtypes(start, state, after)
  assert (np.asarray(first) != np.asarray(second)).any()
  np.testing.assert_array_equal(step(start)[0], first)

  def body(carry, _):
    w, state = carry
    updates, state = tx.update(w, state, w, grad_fn=lambda point: point)
    return (optax.apply_updates(w, updates), state), None

  jax.lax.scan(body, (w, start), length=2)
  with pytest.raises(ValueError, match="params=None"):
    asam_jax.stochastic_rounding(0).update(w, state[0].ascent[1])


# How much of what the perturbation adds to the gradient arrives, on a network.


@functools.cache
def network():
  @jax.jit
  def draw():
    keys = jax.random.split(jax.random.key(3), 5)
    x = jax.random.normal(keys[0], (64, 32))
    y = jax.random.randint(keys[1], (64,), 0, 10)
    return x, y, {
        "a": jax.random.normal(keys[2], (32, 128)) / 32**0.5,
        "b": jax.random.normal(keys[3], (128, 128)) / 128**0.5,
        "c": jax.random.normal(keys[4], (128, 10)) / 128**0.5,
    }

  x, y, w = draw()

  def loss(w):
    hidden = jax.nn.relu(jax.nn.relu(x @ w["a"]) @ w["b"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ w["c"], y).mean()

  return w, loss


@jax.jit
def gradient(w):
  """Of the network's loss, with a pass in float32, in the dtypes of the weights."""
  _, loss = network()
  return jax.grad(
      lambda w: loss(jax.tree.map(lambda x: x.astype(jnp.float32), w))
  )(w)


@jax.jit
def narrowed(tree):
  return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


def flat(tree):
  leaves = jax.tree.leaves(tree)
  return np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])


@pytest.mark.parametrize(
    ("normalization", "rho"), [("elementwise", 0.1), ("none", 0.02)]
)
def test_share_of_the_sharpness_gradient_that_arrives(normalization, rho):
  w, _ = network()
  low = narrowed(w)
  wide = jax.tree.map(lambda x: np.asarray(x, np.float32), low)
  ascent_tx = asam_jax.ascent(rho, normalization=normalization)

  @jax.jit
  def point_at(params, grads, key=None):
    links = [ascent_tx] + ([] if key is None else [asam_jax.stochastic_rounding(key)])
    tx = optax.chain(*links)
    return optax.apply_updates(params, tx.update(grads, tx.init(params), params)[0])

  def added(params, points):
    gradients = [flat(gradient(point)) - flat(gradient(params)) for point in points]
    return np.mean(gradients, axis=0)

  g = gradient(wide)
  g_low = narrowed(g)
  truth = added(wide, [point_at(wide, g)])
  share = lambda got: got @ truth / (truth @ truth)  # noqa: E731
  nearest = share(added(low, [point_at(low, g_low)]))
  keys = jax.random.split(jax.random.key(0), 16)
  stochastic = share(added(low, [point_at(low, g_low, key) for key in keys]))
  # Float32 master weights that the forward pass casts.
  g_low = gradient(narrowed(w))
  master = share(flat(gradient(narrowed(point_at(w, g_low)))) - flat(g_low))
  assert nearest < 0.95
  # The rest is curvature: the noise of the rounding is longer than epsilon here.
  assert stochastic == pytest.approx(1, abs=0.08)
  assert abs(1 - stochastic) < (1 - nearest) / 2
  assert master == pytest.approx(1, abs=0.1)


def test_master_weights_with_a_bfloat16_forward_pass():
  w, loss = network()

  def mixed(w):
    return loss(jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), w))

  tx = asam_jax.sam(optax.sgd(0.1), 0.05, with_info=True)

  @jax.jit
  def step(w):
    value, grads = jax.value_and_grad(mixed)(w)
    return tx.update(grads, tx.init(w), w, value=value, value_fn=mixed)

  updates, state = step(w)
  info = optax.tree_utils.tree_get(state, "info")
  np.testing.assert_allclose([info.radius, info.kept_share], [0.05, 1], rtol=1e-3)
  names = sorted(w)
  gradient = jax.jit(jax.grad(mixed))
  g = gradient(w)
  epsilons, _ = problems.oracle_perturbation(
      [g[n] for n in names], [np.ones(w[n].shape) for n in names], 0.05, 2
  )
  point = {
      n: np.asarray(w[n]) + np.float32(e) for n, e in zip(names, epsilons, strict=True)
  }
  expected = -0.1 * flat(gradient(point))
  # Where w + epsilon is in the middle of two bfloat16s, the last bit decides.
  error = np.linalg.norm(flat(updates) - expected) / np.linalg.norm(expected)
  assert error < 5e-3
  chex.assert_trees_all_equal_dtypes(updates, w)


# Loss scaling.


@pytest.mark.parametrize("p", [2, 3])
def test_the_direction_does_not_depend_on_the_loss_scale(p):
  w, loss = network()
  scale = 2.0**12

  @jax.jit
  def step(w, scale):
    gradient = jax.grad(lambda w: scale * loss(w))
    base_tx = optax.chain(optax.scale(1 / scale), optax.adam(0.1))
    tx = asam_jax.adaptive_sam(base_tx, 0.3, p=p)
    return tx.update(gradient(w), tx.init(w), w, grad_fn=gradient)[0]

  chex.assert_trees_all_close(step(w, scale), step(w, 1.0), rtol=1e-4, atol=1e-5)

  # The other door: the gradient comes out scaled once.
  @jax.jit
  def function(w, scale):
    grads = asam_jax.grad(lambda w: scale * loss(w), rho=0.3, p=p)(w)
    return jax.tree.map(lambda g: g / scale, grads)

  chex.assert_trees_all_close(
      function(w, scale), function(w, 1.0), rtol=1e-4, atol=1e-7
  )


def half_loss(w, scale):
  """A float16 pass whose gradient is about 1e-9: zero in float16, unless scaled."""
  w = w.astype(jnp.float16)
  tiny = jnp.float16(2.0**-12)
  inner = (tiny * (tiny * (w * w)).sum()).astype(jnp.float32)
  return jnp.float32(2.0**-7) * inner * scale


@functools.partial(jax.jit, static_argnums=0)
def half_step(tx, w, state, scale):
  """(the clean gradient, the updates, the new state)."""
  grad_fn = jax.grad(lambda w: half_loss(w, scale))
  grads = grad_fn(w)
  return grads, *tx.update(grads, state, w, grad_fn=grad_fn)


def test_float16_pass_with_loss_scaling():
  w = jnp.array([1.0, -2.0, 0.5])
  scale = 2.0**16
  tx = asam_jax.adaptive_sam(
      optax.chain(optax.scale(1 / scale), optax.sgd(2.0**31)), 0.5, 0.0
  )
  grads, *_ = half_step(tx, w, tx.init(w), 1.0)
  assert (np.asarray(grads) == 0).all()  # the disease
  _, updates, _ = half_step(tx, w, tx.init(w), scale)
  (epsilon,), _ = problems.oracle_perturbation([2 * w], [np.abs(w)], 0.5, 2)
  np.testing.assert_allclose(updates, -2 * (w + epsilon), rtol=5e-3)


def test_a_scale_that_overflows_skips_the_step_and_a_lower_one_goes_on():
  w, scale, seen = jnp.array([1.0, -2.0, 0.5]), 2.0**40, []
  base_tx = optax.sgd(2.0**31)
  tx = asam_jax.skip_nonfinite(
      optax.chain(optax.scale_by_learning_rate(1.0, flip_sign=False), base_tx),
      asam_jax.perturbed_gradient(asam_jax.ascent(0.5, 0.0)),
  )
  state = tx.init(w)
  for _ in range(8):
    _, updates, after = half_step(tx, w, state, scale)
    if after.skipped > state.skipped:
      assert (np.asarray(updates) == 0).all()
      scale /= 2.0**4
    else:
      seen.append(updates / scale)
    state = after
  assert 1 <= state.skipped < 8
  (epsilon,), _ = problems.oracle_perturbation([2 * w], [np.abs(w)], 0.5, 2)
  np.testing.assert_allclose(seen[-1], -2 * (w + epsilon), rtol=5e-3)
