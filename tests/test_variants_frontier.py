"""A tiny run of the frontier: every part of it, and what it writes."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import optax
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture
def frontier(monkeypatch):
  pytest.importorskip("sklearn", reason="the examples need the extra 'examples'")
  monkeypatch.syspath_prepend(str(EXAMPLES))
  import frontier  # pyright: ignore[reportMissingImports]

  return frontier


def test_a_tiny_run(frontier, tmp_path):
  names = ["sgd", "looksam"]  # the latter for the methods with two steps
  command = [
      "--methods", *names, "--networks", "mlp", "--noises", "0.4", "--rhos", "0.1",
      "0.5", "--tuning-seeds", "1", "--seeds", "2", "--epochs", "2", "--cost-rounds",
      "2", "--cost-networks", "mlp", "--results", str(tmp_path),
  ]
  table = frontier.main(command)
  lines = (tmp_path / "frontier.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  accuracies = {row["method"]: row for row in rows if row["kind"] == "accuracy"}
  costs = {row["method"]: row for row in rows if row["kind"] == "cost"}
  assert list(accuracies) == list(costs) == names
  for name, row in accuracies.items():
    assert np.shape(row["accuracy"]) == (2,)
    assert np.shape(row["validation"]) == (1 if name == "sgd" else 2, 1)
    assert row["rho"] in row["rhos"]
    assert row["versions"]["jax"]
    # Two epochs are enough to beat chance by far, on labels never trained on.
    assert np.mean(row["accuracy"]) > 0.4
  steps = 2 * (898 // 64)
  assert accuracies["sgd"]["ascents"] == 0
  assert accuracies["looksam"]["ascents"] == pytest.approx(-(-steps // 5) / steps)
  assert costs["sgd"]["flops"] == [1, 1]
  assert costs["looksam"]["flops"][0] < 1.03 < 2 < costs["looksam"]["flops"][1]
  assert (tmp_path / "frontier.png").stat().st_size > 10_000
  assert (tmp_path / "frontier.md").read_text() == table
  assert "LookSAM" in table
  # What is there is not run again.
  frontier.main([*command, "--cost-rounds", "0"])
  assert (tmp_path / "frontier.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize("name", ["asam", "momentum", "momentum_plain", "stale"])
def test_carried_methods_are_judged_without_their_perturbation(frontier, name):
  methods = frontier.methods
  tx = methods.METHODS[name].make(optax.sgd(0.0), 0.5, 10)
  start = jnp.array([1.0, 2.0])
  grads = jnp.array([0.3, -0.1])
  updates, state = tx.update(grads, tx.init(start), start, grad_fn=lambda w: grads)
  params = start + updates
  assert (params != start).any() == (name in methods.ONE_GRADIENT)
  np.testing.assert_array_equal(methods.clean_params(name, params, state), start)


def test_bad_options(frontier, capsys):
  for option, message in (
      (["--noises", "1.5"], "not in"),
      (["--seeds", "0"], "start at 1"),
      (["--methods", "nothing"], "invalid choice"),
  ):
    with pytest.raises(SystemExit):
      frontier.parse(option)
    assert message in capsys.readouterr().err
