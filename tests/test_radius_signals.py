"""What a radius could follow: each rule is its formula, and the tables are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("sklearn", reason="the examples need the extra 'examples'")

import asam_jax
from examples import radius_signals
from examples import radius_study

PARAMS = {"kernel": jnp.array([[2.0, -1.0]]), "bias": jnp.array([3.0])}
CLEAN = {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.array([0.5])}
PERTURBED = {"kernel": jnp.array([[1.5, 1.0]]), "bias": jnp.array([-0.5])}
OBSERVED = asam_jax.Observed(PARAMS, CLEAN, PERTURBED, 0.25, 0.36, jnp.array(2.0))


def factor(kind, cosine=0.6, rise=0.25, normalization="elementwise"):
  """By which the rule changes a radius of 1."""
  index = radius_signals.KINDS.index(kind)
  rule = radius_signals.rule_of(index, cosine, rise, 0.3, normalization)
  return float(rule.update(jnp.ones(()), OBSERVED))


def angle(scale):
  clean, perturbed = scale * np.array([1, 2, 0.5]), scale * np.array([1.5, 1, -0.5])
  return clean @ perturbed / np.linalg.norm(clean) / np.linalg.norm(perturbed)


def test_each_signal_is_its_formula():
  by_angle = (angle(np.ones(3)) - 0.6) / 0.4
  by_t = (angle(np.array([2.01, 1.01, 1.0])) - 0.6) / 0.4
  by_rise = (0.25 - 0.1) / 0.25  # from 0.5 to 0.6
  expected = {
      "cosine": by_angle, "cosine after T": by_t, "rise": by_rise,
      "careful": min(by_angle, by_rise), "mean": (by_angle + by_rise) / 2,
  }
  for kind, signal in expected.items():
    np.testing.assert_allclose(factor(kind), np.exp(0.05 * signal), rtol=1e-6)
  without = factor("cosine after T", normalization="none")
  assert without == pytest.approx(factor("cosine"))


def test_the_cosine_is_that_of_the_library():
  loss = lambda w: jnp.sum(w**4) + jnp.sum(w[:-1] * w[1:])  # noqa: E731
  index = radius_signals.KINDS.index("cosine")
  mine = radius_signals.rule_of(index, 0.8, 0.17, 0.0, "none")
  ends = []
  for rule in (asam_jax.auto_radius(0.8), mine):
    tx = asam_jax.sam(optax.sgd(1e-2), rule)
    w = jnp.array([1.0, -0.5, 2.0])
    state = tx.init(w)

    @jax.jit
    def step(w, state, tx=tx):
      value, grads = jax.value_and_grad(loss)(w)
      updates, state = tx.update(grads, state, w, value=value, value_fn=loss)
      return optax.apply_updates(w, updates), state

    for _ in range(20):
      w, state = step(w, state)
    ends.append(w)
  np.testing.assert_allclose(*ends, rtol=1e-6)


def test_a_tiny_study(tmp_path, capsys, monkeypatch):
  cell = radius_study.Cell("mlp", 0.4, "none", 2)
  monkeypatch.setattr(radius_signals, "cells", lambda networks: [cell])
  arguments = ["--scenes", "batches of 256", "--seeds", "2", "--steps", "2",
               "--results", str(tmp_path)]
  radius_signals.main(arguments)
  text = (tmp_path / "signals.md").read_text("utf-8")
  assert "**Batches of 256**" in text
  assert "| cosine: 0.8 |" in text
  assert "MLP, 40 % wrong, none, p = 2" in text
  monkeypatch.setattr(radius_signals, "train", lambda *_: pytest.fail("done before"))
  radius_signals.main(arguments)
  assert text in capsys.readouterr().out
