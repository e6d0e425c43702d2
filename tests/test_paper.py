"""What the paper shows: its update rule, its toy figures, its invariance."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from tests import problems

# Figure 3: |w1 ReLU(w2) - 0.04| from two starts that are rescalings of each other.


def toy_loss(w):
  return jnp.abs(w[0] * jax.nn.relu(w[1]) - 0.04)


@functools.partial(jax.jit, static_argnums=0)
def toy_step(tx, w, state):
  grads = jax.grad(toy_loss)(w)
  updates, state = tx.update(grads, state, w, grad_fn=jax.grad(toy_loss))
  return optax.apply_updates(w, updates), state


def toy_trajectory(tx, start, steps):
  w = jnp.array(start)
  state, points = tx.init(w), [w]
  for _ in range(steps):
    w, state = toy_step(tx, w, state)
    points.append(w)
  return np.array(points, np.float64)


def toy_transcription(start, steps, adaptive, rho=0.05, rate=0.05):
  def slope(w):
    above = w[1] > 0
    sign = np.sign(w[0] * max(w[1], 0.0) - 0.04)
    return sign * np.array([max(w[1], 0.0), w[0] * above])

  w = np.array(start)
  points = [w]
  for _ in range(steps):
    g = slope(w)
    t = np.abs(w) if adaptive else np.ones(2)
    norm = np.linalg.norm(t * g)
    w = w - rate * slope(w + (rho * t**2 * g / norm if norm else 0 * g))
    points.append(w)
  return np.array(points)


def distance(point, path):
  """From a point to the polyline through path."""
  shortest = np.inf
  for a, b in itertools.pairwise(path):
    length = (b - a) @ (b - a)
    along = np.clip((point - a) @ (b - a) / length, 0, 1) if length else 0.0
    shortest = min(shortest, float(np.linalg.norm(a + along * (b - a) - point)))
  return shortest


STARTS = {"left": (0.2, 0.05), "right": (0.3, 0.1 / 3)}
TOY_OPTIMIZERS = {
    False: asam_jax.sam(optax.sgd(0.05), rho=0.05),
    True: asam_jax.adaptive_sam(optax.sgd(0.05), rho=0.05, eta=0.0),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_figure_3_step_by_step(adaptive, start):
  # Later on float32 and float64 may cross the valley at different steps.
  steps = 40
  with problems.enable_x64(True):
    path = toy_trajectory(TOY_OPTIMIZERS[adaptive], STARTS[start], steps)
  expected = toy_transcription(STARTS[start], steps, adaptive)
  np.testing.assert_allclose(path, expected, atol=1e-9)


def test_figure_3_published_points():
  sam = toy_trajectory(TOY_OPTIMIZERS[False], STARTS["left"], 120)
  assert distance(np.array([0.238, 0.169]), sam[11:15]) < 0.001
  assert distance(np.array([0.205, 0.195]), sam[90:]) < 0.001
  left = toy_trajectory(TOY_OPTIMIZERS[True], STARTS["left"], 13)
  assert distance(np.array([0.250, 0.160]), left[9:]) < 0.0013
  right = toy_trajectory(TOY_OPTIMIZERS[True], STARTS["right"], 8)
  assert distance(np.array([0.321, 0.125]), right[4:]) < 0.0013


def test_figure_3_sam_is_stuck_on_the_right():
  stuck = toy_trajectory(TOY_OPTIMIZERS[False], STARTS["right"], 50)
  np.testing.assert_array_equal(stuck, np.broadcast_to(stuck[0], stuck.shape))
  assert toy_loss(jnp.array(stuck[-1])) > 0.029


def test_figure_1_the_ellipsoid_moves_along_and_the_ball_does_not():
  w, scale = np.float32([1.0, 1.0]), np.float32([3.0, 1 / 3])
  angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)

  @functools.partial(jax.jit, static_argnums=0)
  def boundary(tx, w, directions):
    return jax.vmap(lambda g: tx.update(g, tx.init(w), w)[0])(directions)

  directions = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
  adaptive = asam_jax.ascent(0.5, 0.0)
  at_w = boundary(adaptive, w, directions)
  # The gradient at Aw is A^-1 times the one at w.
  at_aw = boundary(adaptive, scale * w, directions / scale)
  np.testing.assert_allclose(at_aw, at_w * scale, rtol=1e-5, atol=1e-7)
  plain = asam_jax.ascent(0.5, normalization="none")
  for ball in (boundary(plain, w, directions), boundary(plain, scale * w, directions)):
    np.testing.assert_allclose(np.linalg.norm(ball, axis=1), 0.5, rtol=1e-5)


# The official update rule on a network with every kind of leaf that it names.


@functools.cache
def network(seed=0):
  """Parameters of convolution, batch norm, ReLU, two dense layers; their gradient."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return 0.5 * rng.normal(size=shape)

  params = {
      "conv": {"kernel": normal(3, 3, 2, 4), "bias": normal(4)},
      "norm": {"scale": 1 + normal(4), "bias": normal(4)},
      "dense1": {"kernel": normal(36, 5), "bias": normal(5)},
      "dense2": {"kernel": normal(5, 3), "bias": normal(3)},
  }

  def loss(params, x, y):
    h = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1, 1), "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ) + params["conv"]["bias"]
    mean, variance = h.mean((0, 1, 2)), h.var((0, 1, 2))
    h = (h - mean) / jnp.sqrt(variance + 1e-5)
    h = jax.nn.relu(h * params["norm"]["scale"] + params["norm"]["bias"])
    h = h.reshape(h.shape[0], -1)
    for name in ("dense1", "dense2"):
      h = h @ params[name]["kernel"] + params[name]["bias"]
      h = jax.nn.relu(h) if name == "dense1" else h
    return optax.softmax_cross_entropy_with_integer_labels(h, y).mean()

  return params, jax.jit(jax.grad(loss))


def batches(steps, seed=1):
  rng = np.random.default_rng(seed)
  for _ in range(steps):
    yield rng.normal(size=(8, 5, 5, 2)), rng.integers(0, 3, 8)


def official_steps(params, gradient, data, rho, eta, rate, momentum, decay, adaptive):
  """The reference implementation's loop, written out on a dict of arrays."""
  w = {
      (layer, name): np.asarray(leaf)
      for layer, leaves in params.items()
      for name, leaf in leaves.items()
  }
  velocity = {key: np.zeros_like(leaf) for key, leaf in w.items()}

  def slope(w, x, y):
    tree = {}
    for (layer, name), leaf in w.items():
      tree.setdefault(layer, {})[name] = leaf
    tree = gradient(tree, x, y)
    return {key: np.asarray(tree[key[0]][key[1]]) for key in w}

  for x, y in data:
    g = slope(w, x, y)
    t = {
        key: np.abs(leaf) + eta if adaptive and key[1] != "bias" else np.ones(())
        for key, leaf in w.items()
    }
    norm = np.sqrt(sum(((t[key] * g[key]) ** 2).sum() for key in w))
    moved = {key: w[key] + rho * t[key] ** 2 * g[key] / norm for key in w}
    g = slope(moved, x, y)  # the same batch, and no decay in it
    for key in w:
      velocity[key] = momentum * velocity[key] + g[key] + decay * w[key]
      w[key] = w[key] - rate * velocity[key]
    yield w


@pytest.mark.parametrize("adaptive", [True, False])
def test_official_update_rule_over_50_steps(adaptive):
  with problems.enable_x64(True):
    params, gradient = network()
    base_tx = optax.chain(optax.add_decayed_weights(5e-3), optax.sgd(0.05, 0.9))
    if adaptive:
      tx = asam_jax.adaptive_sam(base_tx, rho=0.5, eta=0.01)
    else:
      tx = asam_jax.sam(base_tx, rho=0.5)

    @jax.jit
    def step(params, state, x, y):
      def grad_fn(params):
        return gradient(params, x, y)

      updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
      return optax.apply_updates(params, updates), state

    expected = official_steps(
        params, gradient, batches(50), 0.5, 0.01, 0.05, 0.9, 5e-3, adaptive
    )
    state = tx.init(params)
    for (x, y), w in zip(batches(50), expected, strict=True):
      params, state = step(params, state, x, y)
      for (layer, name), leaf in w.items():
        np.testing.assert_allclose(
            params[layer][name], leaf, rtol=1e-8, atol=1e-10, err_msg=f"{layer}.{name}"
        )


# Scale invariance of ReLU networks.


@functools.cache
def relu_network(seed=0):
  rng = np.random.default_rng(seed)
  sizes = [4, 8, 6, 3]
  params = [
      {"kernel": rng.normal(size=(m, n)), "bias": 0.3 * rng.normal(size=n)}
      for m, n in itertools.pairwise(sizes)
  ]
  x, y = rng.normal(size=(32, 4)), rng.integers(0, 3, 32)

  @jax.jit
  def loss(params):
    h = x
    for i, layer in enumerate(params):
      h = h @ layer["kernel"] + layer["bias"]
      h = jax.nn.relu(h) if i + 1 < len(params) else h
    return optax.softmax_cross_entropy_with_integer_labels(h, y).mean()

  return params, loss


def node_rescaling(params, seed=0):
  """A, as factors of each leaf, that rescales the hidden nodes at random."""
  rng = np.random.default_rng(seed)
  factors, incoming = [], np.ones(params[0]["kernel"].shape[0])
  for i, layer in enumerate(params):
    width = layer["bias"].size
    last = i + 1 == len(params)
    outgoing = np.ones(width) if last else 10 ** rng.uniform(-1.5, 1.5, width)
    factors.append({
        "kernel": outgoing / incoming[:, None],
        "bias": outgoing,
    })
    incoming = outgoing
  return factors


def everything(path, leaf):
  return True


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, np.inf])
def test_scale_invariance(p):
  with problems.enable_x64(True):
    params, loss = relu_network()
    adaptive = asam_jax.ascent(0.5, 0.0, p, normalize=everything)
    plain = asam_jax.ascent(0.5, p=p, normalization="none")

    @functools.partial(jax.jit, static_argnums=0)
    def measure(tx, w):
      epsilon, state = tx.update(jax.grad(loss)(w), tx.init(w), w)
      return loss(optax.apply_updates(w, epsilon)), state.sharpness

    for seed in range(3):
      scale = node_rescaling(params, seed)
      twin = jax.tree.map(np.multiply, scale, params)
      np.testing.assert_allclose(loss(twin), loss(params), rtol=1e-12)

      adaptive_here, adaptive_there = measure(adaptive, params), measure(adaptive, twin)
      np.testing.assert_allclose(adaptive_there, adaptive_here, rtol=1e-9)
      ratio = np.divide(measure(plain, twin), measure(plain, params))
      assert np.abs(np.log(ratio)).max() > 0.1


def test_corresponding_trajectories():
  # The base step must commute with rescaling too: here it is T^2 g.
  base_tx = optax.GradientTransformation(
      lambda params: optax.EmptyState(),
      lambda g, state, w: (jax.tree.map(lambda g, w: -0.05 * w * w * g, g, w), state),
  )
  with problems.enable_x64(True):
    params, loss = relu_network()
    scale = node_rescaling(params)

    @functools.partial(jax.jit, static_argnums=0)
    def trajectory(tx, w):
      def step(carry, _):
        w, state = carry
        updates, state = tx.update(
            jax.grad(loss)(w), state, w, grad_fn=jax.grad(loss)
        )
        return (optax.apply_updates(w, updates), state), None

      return jax.lax.scan(step, (w, tx.init(w)), length=30)[0][0]

    def mismatch(tx):
      here = trajectory(tx, params)
      there = trajectory(tx, jax.tree.map(np.multiply, scale, params))
      back = jax.tree.map(np.divide, there, scale)
      moved = jax.tree.map(np.subtract, here, params)
      gap = jax.tree.map(np.subtract, here, back)
      return problems.oracle_norm(jax.tree.leaves(gap), 2) / problems.oracle_norm(
          jax.tree.leaves(moved), 2
      )

    adaptive = asam_jax.adaptive_sam(base_tx, 0.2, 0.0, normalize=everything)
    assert mismatch(adaptive) < 1e-9
    assert mismatch(asam_jax.sam(base_tx, 0.2)) > 0.01
    # Close, not equal: eta and the biases break the symmetry.
    assert 1e-9 < mismatch(asam_jax.adaptive_sam(base_tx, 0.2)) < 1
