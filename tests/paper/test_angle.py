"""What the gradients of both passes say of a radius, noted while a row is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from examples import records
from examples.paper import angle
from examples.paper import small
from tests.paper.tiny import CONFIG
from tests.paper.tiny import tiny  # noqa: F401


def test_the_watched_optimizer_is_the_same_and_says_what_the_info_does():
  loss = lambda w: jnp.sum(w**4)  # noqa: E731
  plain = asam_jax.adaptive_sam(optax.sgd(0.1), 0.5, with_info=True)
  tx = angle.watched(asam_jax.adaptive_sam(optax.sgd(0.1), 0.5))
  w = jnp.array([1.0, 2.0, -0.5])
  grads = jax.grad(loss)(w)
  expected, state = plain.update(
      grads, plain.init(w), w, value=loss(w), value_fn=loss)
  got, watched = tx.update(grads, tx.init(w), w, grad_fn=jax.grad(loss))
  info = optax.tree_utils.tree_get(state, "info")
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  np.testing.assert_allclose(
      watched.said, [info.cosine, info.radius, info.predicted_gap], rtol=1e-5)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("given", [["--rho", "0.5"], ["--cosine", "0.8"]])
def test_a_row_is_trained_and_reported(given, tmp_path, monkeypatch, capsys):
  row = dataclasses.replace(CONFIG, validation=0)
  monkeypatch.setattr(small, "FEW", row)
  monkeypatch.setattr(angle, "HELD_OUT", 0)
  angle.main([*given, "--epochs", "2", "--results", str(tmp_path)])
  (found,) = records.read(tmp_path / "angle.jsonl")
  first, last = found["history"]
  assert (first["epoch"], last["epoch"]) == (1, 2)
  assert -1 <= last["cosine"] <= 1
  assert last["gap"] > 0
  capsys.readouterr()
  angle.main(["--report", "--results", str(tmp_path)])
  assert f"{last['cosine']:.3f}" in capsys.readouterr().out
