"""The verdict on a radius: each of the four, from made-up and from real steps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import asam_jax

STEPS = 40


def infos(cosine, last, first=2.3, **others):
  """A run whose loss falls evenly, with this cosine at all its late steps."""
  value = np.linspace(first, last, STEPS)
  entries = dict.fromkeys(asam_jax.AscentInfo._fields, np.ones(STEPS))
  entries |= {"value": value, "cosine": np.where(np.arange(STEPS) < 30, 0.1, cosine)}
  return asam_jax.AscentInfo(**entries | others)


@pytest.mark.parametrize(("cosine", "last", "verdict"), [
    (0.99, 0.5, "too small"), (0.94, 0.5, "too small"), (0.92, 0.5, "about right"),
    (0.71, 0.5, "about right"), (0.69, 0.5, "too large"), (-0.5, 0.5, "too large"),
    (0.9, 2.29, "collapsed"), (0.3, 2.29, "collapsed"), (0.3, 2.4, "collapsed"),
    (0.8, 2.1, "about right"), (math.nan, 0.5, "collapsed"),
    (0.8, math.nan, "collapsed"), (0.8, -4.0, "about right"),
])
def test_verdicts(cosine, last, verdict):
  assert asam_jax.radius_verdict(infos(cosine, last)).verdict == verdict


def test_a_list_of_steps_is_the_same_as_arrays_over_them():
  whole = infos(0.8, 0.5, rise=np.full(STEPS, 0.25), radius=np.full(STEPS, 0.7))
  steps = [jax.tree.map(lambda x, i=i: jnp.array(x[i]), whole) for i in range(STEPS)]
  expected = asam_jax.radius_verdict(whole)
  np.testing.assert_allclose(
      asam_jax.radius_verdict(steps)[1:], expected[1:], rtol=1e-6)
  epochs = jax.tree.map(lambda x: x.reshape(4, 10), whole)
  assert asam_jax.radius_verdict(epochs) == expected
  assert str(expected) == (
      "radius 0.7 about right: cosine 0.80 (right from 0.70 to 0.93), linearity 1.00,"
      " rise 0.250, loss 2.3 -> 0.708"
  )


def test_the_numbers_are_medians_of_the_last_quarter():
  linearity = np.r_[np.full(30, 9.0), np.arange(10.0)]
  found = asam_jax.radius_verdict(infos(0.8, 0.5, linearity=linearity))
  assert found.linearity == 4.5
  assert found.chance == 2.3
  odd = np.full(STEPS, 0.8)
  odd[-1] = math.nan  # one bad step is no median, but a NaN in it shows
  assert math.isnan(asam_jax.radius_verdict(infos(0.8, 0.5, rise=odd)).rise)


def test_chance_may_be_given():
  # Fine-tuning: the loss starts low and hardly falls.
  run = infos(0.8, 0.299, first=0.3)
  assert asam_jax.radius_verdict(run).verdict == "collapsed"
  found = asam_jax.radius_verdict(run, chance=math.log(10))
  assert found.verdict == "about right"
  assert found.chance == math.log(10)
  # A loss below zero falls by a share of its size.
  assert asam_jax.radius_verdict(infos(0.8, -1.01, first=-1)).verdict == "collapsed"
  assert asam_jax.radius_verdict(infos(0.8, -1.1, first=-1)).verdict == "about right"


def test_a_run_at_four_radii():
  # The loss of a softmax over two inputs, one scale for all radii.
  x = np.float32(np.random.default_rng(0).normal(size=(64, 4)))
  labels = np.argmax(x, 1)

  def loss(w):
    logits = jnp.tanh(x @ w["in"]) @ w["out"]
    return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(64), labels])

  def run(rho):
    fun = asam_jax.value_and_grad(loss, rho=rho, with_info=True)
    rng = np.random.default_rng(1)
    start = {"in": jnp.asarray(rng.normal(size=(4, 16)), jnp.float32),
             "out": jnp.asarray(rng.normal(size=(16, 4)) / 9, jnp.float32)}

    def step(w, _):
      _, grads, info = fun(w)
      return jax.tree.map(lambda w, g: w - 0.3 * g, w, grads), info

    return jax.jit(lambda w: jax.lax.scan(step, w, length=150)[1])(start)

  cosines = [asam_jax.radius_verdict(run(rho)).cosine for rho in (0.01, 0.3)]
  assert asam_jax.radius_verdict(run(0.01)).verdict == "too small"
  assert cosines[0] > cosines[1]
  assert asam_jax.radius_verdict(run(30.0)).verdict in ("too large", "collapsed")


def test_traced_infos_are_refused():
  with pytest.raises(TypeError, match="is traced; return the infos from jit"):
    jax.jit(lambda run: asam_jax.radius_verdict(run)[1])(infos(0.8, 0.5))
