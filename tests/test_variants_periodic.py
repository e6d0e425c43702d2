"""Second gradients at some steps only: which steps, what between, what it costs."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from tests import problems
from tests.test_variants import asam
from tests.test_variants import check
from tests.test_variants import epsilon_of
from tests.test_variants import flops
from tests.test_variants import gradient
from tests.test_variants import jax_gradient

KEY = jax.random.key(3)
CHOICES = {
    "every_third": lambda step: step % 3 == 0,
    "last_half": lambda step: step >= 10,
    "late": asam_jax.late(20, 0.3),
    "first_quarter": lambda step: step < 5,
    "random": lambda step: jax.random.bernoulli(jax.random.fold_in(KEY, step), 0.4),
    "always": lambda step: step >= 0,
    "never": lambda step: step < 0,
}


@pytest.mark.parametrize("name", CHOICES)
def test_choice_of_steps_against_numpy(name):
  when = CHOICES[name]
  with problems.enable_x64(True):  # the random draws depend on it
    chosen = np.asarray(jax.vmap(when)(np.arange(20)))

  def step(w, i):
    i = 0 if i is None else i
    g = gradient(w)
    return (gradient(w + epsilon_of(g, w)) if chosen[i] else g), i + 1

  check(asam_jax.sometimes(asam(), when), step)


def test_random_steps_are_the_fraction_asked_for():
  chosen = np.asarray(jax.vmap(CHOICES["random"])(np.arange(300)))
  assert 0.3 < chosen.mean() < 0.5


@pytest.mark.parametrize(
    ("total", "share", "count"),
    [(20, 0.3, 6), (10, 0.7, 7), (200, 0.125, 25), (7, 0, 0), (7, 1, 7), (3, 0.1, 0),
     (np.int64(10), np.float32(0.1), 1), (10, jnp.array(0.2), 2)],
)
def test_late_is_the_last_share(total, share, count):
  chosen = asam_jax.late(total, share)
  expected = [False] * (int(total) - count) + [True] * count
  decisions = [chosen(step) for step in range(int(total))]
  assert decisions == expected
  assert all(isinstance(decision, bool) for decision in decisions)
  traced = np.asarray(jax.jit(jax.vmap(chosen))(np.arange(int(total))))
  assert traced.tolist() == expected


@pytest.mark.parametrize("k", [2, 5])
def test_looksam_against_numpy(k):
  alpha = 0.7

  def step(w, memory):
    t, g_v = memory or (0, None)
    g = gradient(w)
    if t % k:
      return (
          g + alpha * np.linalg.norm(g) / np.linalg.norm(g_v) * g_v,
          (t + 1, g_v),
      )
    h = gradient(w + epsilon_of(g, w))
    cosine = g @ h / np.linalg.norm(g) / np.linalg.norm(h)
    return h, (t + 1, h - np.linalg.norm(h) * cosine * g / np.linalg.norm(g))

  check(
      asam_jax.sometimes(asam(), lambda step: step % k == 0, reuse=alpha), step
  )


def test_ae_sam_against_numpy():
  delta, total = 0.9, 20
  taken = []

  def step(w, memory):
    t, mean, variance = memory or (0, 0.0, np.exp(-10))
    g = gradient(w)
    mean = delta * mean + (1 - delta) * (g @ g)
    variance = delta * variance + (1 - delta) * (g @ g - mean) ** 2
    c = 1 - 2 * t / total
    use_sam = g @ g >= mean + c * np.sqrt(variance)
    taken.append(use_sam)
    h = gradient(w + epsilon_of(g, w)) if use_sam else g
    return h, (t + 1, mean, variance)

  gate = asam_jax.above_average(optax.linear_schedule(1.0, -1.0, total), delta)
  check(asam_jax.sometimes(asam(), gate), step)
  assert 3 < sum(taken) < 17


compiled_gradient = jax.jit(jax_gradient)


def counting(counts):
  """jax_gradient that counts how often it really runs."""

  def grad_fn(w):
    jax.debug.callback(lambda: counts.append(1))
    return jax_gradient(w)

  return grad_fn


@pytest.mark.parametrize("reuse", [0.0, 0.7])
def test_skipped_gradients_are_not_computed(reuse):
  counts = []
  grad_fn = counting(counts)
  tx = asam_jax.sometimes(asam(), lambda step: step % 3 == 0, reuse=reuse)
  w = jnp.array([1.0, 2.0, 3.0])
  state = tx.init(w)
  step = jax.jit(lambda g, state: tx.update(g, state, w, grad_fn=grad_fn)[1])
  for _ in range(9):
    state = step(w, state)
  jax.effects_barrier()
  assert len(counts) == 3


@pytest.mark.parametrize("reuse", [0.0, 0.7])
def test_choice_outside_jit_is_the_choice_inside(reuse):
  # For a function of the step and for a gate that looks at the gradient.
  for when in (lambda step: step % 3 == 0, asam_jax.above_average(0.0)):
    link = asam_jax.sometimes(asam(), when, reuse=reuse)
    tx = optax.chain(link, optax.sgd(0.05, momentum=0.9))

    @functools.partial(jax.jit, static_argnames="ascend")
    def step(params, state, grads, ascend=None, tx=tx):
      updates, state = tx.update(
          grads, state, params, grad_fn=jax_gradient, ascend=ascend
      )
      return optax.apply_updates(params, updates), state

    if isinstance(when, asam_jax.Gate):
      decide = jax.jit(when.update)
    start = jnp.array([1.5, 0.7, -0.4])
    inside = outside = (start, tx.init(start))
    taken = set()
    for i in range(9):
      inside = step(*inside, compiled_gradient(inside[0]))
      grads = compiled_gradient(outside[0])
      if isinstance(when, asam_jax.Gate):
        gate_state = optax.tree_utils.tree_get(outside[1], "gate")
        ascend = bool(decide(grads, gate_state)[0])
      else:
        ascend = when(i)
      taken.add(ascend)
      outside = step(*outside, grads, ascend=ascend)
      chex.assert_trees_all_close(inside, outside, rtol=1e-5, atol=1e-6)
    assert taken == {True, False}


def test_looksam_flops_averaged_over_steps():
  # Two compiled steps; k = 5. A perceptron at batch 64.
  sizes = [(64, 256), (256, 256), (256, 10)]
  rng = np.random.default_rng(0)
  params = [np.float32(0.1 * rng.normal(size=size)) for size in sizes]
  x = np.float32(rng.normal(size=(64, 64)))
  y = np.arange(64) % 10

  def loss(params):
    hidden = x
    for kernel in params[:-1]:
      hidden = jax.nn.relu(hidden @ kernel)
    logits = hidden @ params[-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  def cost(tx, **extra):
    def step(params, state):
      updates, state = tx.update(jax.grad(loss)(params), state, params, **extra)
      return optax.apply_updates(params, updates), state

    return flops(step, params, tx.init(params))

  base_tx = optax.sgd(0.1, momentum=0.9)
  look = asam_jax.sometimes(asam(), lambda step: step % 5 == 0, reuse=0.7)
  tx = optax.chain(look, base_tx)
  on = cost(tx, ascend=True, grad_fn=jax.grad(loss))
  off = cost(tx, ascend=False)
  sgd = cost(base_tx)
  assert off <= 1.03 * sgd
  assert (on + 4 * off) / 5 <= 1.25 * sgd


def test_a_direction_that_adds_up():
  # A linear loss: the clean and the perturbed gradient are equal, so every step
  # must see the gradient itself.
  g = np.float32([10.0, 0.0])
  link = asam_jax.sometimes(asam(), lambda step: step % 5 == 0, reuse=0.7)
  w = jnp.array([1.0, 2.0])
  step = jax.jit(lambda g, state: link.update(g, state, w, grad_fn=lambda w: g))
  state = link.init(w)
  for _ in range(7):
    got, state = step(g, state)
    np.testing.assert_array_equal(got, g)


def test_rounding_is_no_direction():
  # What two compilations of one gradient differ by must not be blown up.
  rng = np.random.default_rng(0)
  g = np.float32(rng.normal(size=50))
  h = np.nextafter(g, np.float32(np.inf) * rng.choice([-1, 1], size=50), dtype=g.dtype)
  assert (g != h).all()
  link = asam_jax.sometimes(asam(), lambda step: step == 0, reuse=0.7)
  w = jnp.ones(50)
  step = jax.jit(lambda g, h, state: link.update(g, state, w, grad_fn=lambda w: h))
  _, state = step(g, h, link.init(w))
  got, _ = step(g, h, state)
  np.testing.assert_array_equal(got, g)


def test_every_step_is_the_link_itself():
  link = asam_jax.sometimes(asam(), lambda step: True)
  w = jnp.array([1.0, 2.0, 3.0])
  got, _ = link.update(w, link.init(w), w, grad_fn=jax_gradient)
  expected, _ = asam().update(w, asam().init(w), w, grad_fn=jax_gradient)
  chex.assert_trees_all_equal(got, expected)


@pytest.mark.parametrize("gate", [lambda t: t % 4 == 0, asam_jax.above_average()])
def test_resumes_in_mid_interval(gate):
  loss, start, _ = problems.regression()
  link = asam_jax.sometimes(asam(), gate, reuse=0.7)
  tx = optax.chain(link, optax.sgd(0.01, momentum=0.9))
  row = problems.Row(lambda *args: tx, 0.0)
  step = jax.jit(problems.step_function(tx, loss, row))
  carry, saved = (start, tx.init(start)), None
  for i in range(7):
    if i == 2:
      saved = jax.tree.map(np.array, carry)
    carry = step(*carry)
  resumed = jax.tree.map(jnp.asarray, saved)
  for _ in range(5):
    resumed = step(*resumed)
  chex.assert_trees_all_equal(resumed, carry)


def test_schedule_of_the_link_counts_perturbed_steps():
  link = asam_jax.sometimes(asam(), lambda step: step % 2 == 0)
  w = jnp.array([1.0, 2.0, 3.0])
  state = link.init(w)
  step = jax.jit(lambda state: link.update(w, state, w, grad_fn=jax_gradient)[1])
  for _ in range(5):
    state = step(state)
  assert state.gate == 5
  assert optax.tree_utils.tree_get(state.link, "count") == 3


def test_a_bad_gradient_does_not_switch_the_gate_off():
  gate = asam_jax.above_average(0.0)
  state, update = gate.init(jnp.zeros(2)), jax.jit(gate.update)
  _, before = update(np.float32([1.0, 0.0]), state)
  for bad in (np.nan, np.inf, 1e30):
    _, after = update(np.float32([bad, 0.0]), before)
    chex.assert_trees_all_equal(after[1:], before[1:])
  decision, _ = update(np.float32([3.0, 0.0]), after)
  assert decision


def test_errors():
  with pytest.raises(ValueError, match="reuse=-1"):
    asam_jax.sometimes(asam(), lambda step: True, reuse=-1)
  with pytest.raises(TypeError, match="when=5"):
    asam_jax.sometimes(asam(), 5)  # pyright: ignore
  with pytest.raises(ValueError, match="decay=1"):
    asam_jax.above_average(decay=1)
  w = jnp.ones(2)
  link = asam_jax.sometimes(asam(), lambda step: step % 5)
  with pytest.raises(TypeError, match="scalar bool"):
    link.update(w, link.init(w), w, grad_fn=lambda w: w)
  link = asam_jax.sometimes(asam(), lambda step: step % 5 == 0)
  with pytest.raises(ValueError, match="params=None"):
    link.update(w, link.init(w))
  with pytest.raises(ValueError, match="grad_fn=None"):
    link.update(w, link.init(w), w)
  with pytest.raises(TypeError, match="the gradient has the structure"):
    link.update((w, w), link.init(w), w, grad_fn=lambda w: w)
