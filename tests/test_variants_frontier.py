"""A tiny run of the frontier: every part of it, and what it writes."""

import importlib
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def frontier():
  pytest.importorskip("sklearn", reason="the examples need the extra 'examples'")
  return importlib.import_module("examples.frontier")


TINY = [
    "--networks", "mlp", "--noises", "0.4", "--rhos", "0.1", "0.5", "--tuning-seeds",
    "1", "--epochs", "2", "--cost-rounds", "2", "--cost-networks", "mlp",
]


def read(frontier, folder):
  return frontier.records.read(folder / frontier.RECORDS)


def test_a_tiny_run(frontier, tmp_path, monkeypatch, capsys):
  # For the methods with two steps, and for those with a door of their own.
  names = ["sgd", "looksam", "functional"]
  command = [*TINY, "--methods", *names, "--seeds", "2"]
  monkeypatch.chdir(tmp_path)
  table = frontier.main(command)
  folder = tmp_path / "runs" / "frontier"
  assert {path.name for path in tmp_path.iterdir()} == {"runs"}
  assert {path.name for path in folder.iterdir()} == {
      "frontier.jsonl", "frontier.md", "frontier.png", "frontier_time.png"}
  printed = capsys.readouterr().out
  assert "3 outcomes to train and the steps of 1 networks to time: about" in printed
  assert "3 of 3 outcomes" in printed
  rows = read(frontier, folder)
  kinds = {"accuracy": {}, "cost": {}}
  for row in rows:
    config = row["config"]
    kinds[config["kind"]][row.get("method", config.get("method"))] = row
  accuracies, costs = kinds.values()
  assert list(accuracies) == list(costs) == names
  for name, row in accuracies.items():
    assert np.shape(row["accuracy"]) == (2,)
    assert np.shape(row["validation"]) == (1 if name == "sgd" else 2, 1)
    assert row["rho"] in row["config"]["rhos"]
    assert row["versions"]["jax"]
    # Two epochs are enough to beat chance by far, on labels never trained on.
    assert np.mean(row["accuracy"]) > 0.4
  steps = 2 * (898 // 64)
  assert accuracies["sgd"]["ascents"] == 0
  assert accuracies["looksam"]["ascents"] == pytest.approx(-(-steps // 5) / steps)
  assert costs["sgd"]["flops"] == [1, 1]
  assert costs["looksam"]["flops"][0] < 1.03 < 2 < costs["looksam"]["flops"][1]
  assert 1.9 < costs["functional"]["flops"][0] < 2.1
  for name in ("frontier.png", "frontier_time.png"):
    assert (folder / name).stat().st_size > 10_000
  assert (folder / "frontier.md").read_text() == table
  assert "LookSAM" in table
  assert "nan" not in table

  # The very same command has nothing to do, and says so.
  frontier.main(command)
  assert read(frontier, folder) == rows
  printed = capsys.readouterr().out
  assert "0 outcomes to train and the steps of 0 networks to time: about 0 min" in (
      printed)
  assert "3 outcomes of the same configuration are in runs/frontier" in printed
  frontier.main([*command, "--report"])
  # Without outcomes of these options there is no table of others.
  with pytest.raises(SystemExit, match="no outcome of this configuration") as error:
    frontier.main([*command, "--report", "--epochs", "3"])
  assert "--epochs 2 --batch-size 64 --lr 0.1 --rhos 0.1 0.5" in str(error.value)


@pytest.fixture
def untrained(frontier, monkeypatch):
  """The frontier with a training that only notes what it was asked for."""
  asked = []

  def outcome(config):
    asked.append(config)
    return {
        "config": config,
        "validation": [[0.5] * config["tuning_seeds"]] * len(config["rhos"]),
        "rho": config["rhos"][-1],
        "accuracy": [0.9, 0.8, 0.7][: config["seeds"]],
        "ascents": 0.0,
    }

  monkeypatch.setattr(frontier, "tune_and_test", outcome)
  return frontier, asked


@pytest.mark.parametrize(
    "change",
    [
        ["--epochs", "3"], ["--batch-size", "32"], ["--lr", "0.2"], ["--seeds", "3"],
        ["--tuning-seeds", "2"], ["--rhos", "0.1"], ["--noises", "0.2"],
    ],
    ids=lambda change: change[0],
)
def test_another_configuration_is_run(untrained, tmp_path, change):
  frontier, asked = untrained
  command = [*TINY, "--methods", "asam", "--seeds", "2", "--cost-rounds", "0",
             "--results", str(tmp_path)]
  frontier.main(command)
  frontier.main(command)
  assert len(asked) == 1
  frontier.main([*command, *change])
  assert len(asked) == 2
  assert asked[0] != asked[1]
  table = frontier.main(command)  # of the first again, not of both
  assert len(asked) == 2
  assert table.count("| ASAM | 0.5 |") == 1


@pytest.mark.parametrize("seeds", [1, 2, 3])
@pytest.mark.parametrize("methods", [["asam"], ["sgd", "asam", "sam"]])
def test_few_seeds_and_few_methods_are_clear(untrained, tmp_path, seeds, methods):
  frontier, _ = untrained
  command = [*TINY, "--methods", *methods, "--seeds", str(seeds), "--cost-rounds",
             "0", "--results", str(tmp_path)]
  table = frontier.main(command)
  assert "nan" not in table
  row = next(line for line in table.splitlines() if line.startswith("| ASAM |"))
  expected = {1: "90.00", 2: "85.00 ± 5.00", 3: "80.00 ± 5.77"}[seeds]
  # As good as SGD here, or there is no SGD: no gain, and so no share of it.
  assert row == f"| ASAM | 0.5 | {expected} | {seeds} | - | - | - | +0 |"


def test_default_trains_everything_on_a_clone(frontier, monkeypatch, tmp_path, capsys):
  """Nothing that the repository holds is taken for an outcome of the user's."""
  asked = []

  def stop(config):
    asked.append(config)
    raise KeyboardInterrupt

  monkeypatch.chdir(tmp_path)
  (tmp_path / "results").symlink_to(ROOT / "results", target_is_directory=True)
  monkeypatch.setattr(frontier, "tune_and_test", stop)
  with pytest.raises(KeyboardInterrupt):
    frontier.main([])
  assert len(asked) == 1
  printed = capsys.readouterr().out
  count = len(frontier.methods.METHODS) * 4
  assert re.match(rf"{count} outcomes to train and the steps of 5 networks", printed)
  minutes = int(re.search(r"about (\d+) min", printed)[1])
  assert 15 <= minutes <= 90
  assert "same configuration" not in printed


def test_committed_outcomes_are_those_of_the_default(frontier):
  args = frontier.parse(["--report", "--results", str(ROOT / "results/frontier")])
  rows = read(frontier, args.results)
  for config in frontier.configs(args):
    assert frontier.records.find(rows, config) is not None, config


def test_forecast(frontier):
  configs = frontier.configs(frontier.parse(["--networks", "mlp", "--noises", "0.4"]))
  by_method = {config["method"]: frontier.gradients(config) for config in configs}
  tuning, final = (898 - 180) // 64, 898 // 64
  assert by_method["sgd"] == 40 * (2 * tuning + 10 * final)
  assert by_method["asam"] == 2 * 40 * (7 * 2 * tuning + 10 * final)
  assert by_method["momentum"] == by_method["asam"] / 2
  assert by_method["iterated"] == by_method["asam"] * 1.5
  one, both = frontier.forecast(configs[:1], []), frontier.forecast(configs[:2], [])
  assert 0 < one < both
  few = frontier.cost_configs(frontier.parse(["--cost-rounds", "1"]))
  many = frontier.cost_configs(frontier.parse(["--cost-rounds", "60"]))
  assert 0 < frontier.forecast([], few) < frontier.forecast([], many)


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
      (["--noises", "1.5"], "--noises: 1.5: must be at least 0 and below 1"),
      (["--seeds", "0"], "--seeds: 0: must be at least 1"),
      (["--batch-size", "800"], "tuned on 718 examples"),
      (["--report", "--results", "nowhere"], "no file nowhere/frontier.jsonl"),
      (["--methods", "nothing"], "invalid choice"),
  ):
    with pytest.raises(SystemExit):
      frontier.parse(option)
    assert message in capsys.readouterr().err
