"""The benchmark runs, compares like with like, and writes what it prints."""

import json

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import compile_time
from benchmarks import networks
from benchmarks import perturbation
from benchmarks import step_cost
from benchmarks import steps
from benchmarks import timing


def test_main_writes_a_row_for_each_method(tmp_path, capsys, monkeypatch):
  # One layer is quicker to compile.
  monkeypatch.setitem(networks.NETWORKS, "mlp", (lambda: nn.Dense(10), (3,)))
  output = tmp_path / "new" / "rows.jsonl"
  rows = step_cost.main([
      *("--parts", "perturbation", "mlp", "--output", str(output)),
      *("--parameters", "60", "--leaves", "3", "--repeats", "2"),
      *("--batch-size", "2", "--sample-seconds", "0.0001"),
  ])
  header, *written = [json.loads(line) for line in output.read_text().splitlines()]
  assert written == rows
  assert {"date", "jax", "cpu", "cores", "command"} <= header.keys()
  methods = len(perturbation.VARIANTS)
  assert [row["part"] for row in rows] == ["perturbation"] * methods + ["mlp"] * 9
  assert {row["parameters"] for row in rows[:methods]} == {60}
  for row in rows:
    low, median, high = row["ratio"]
    assert 0 < low <= median <= high < np.inf
  printed = capsys.readouterr().out
  assert all(f"| {row['method']} |" in printed for row in rows)
  plain = rows[methods]
  assert plain["ratio"] == [1, 1, 1]


def test_some_steps_against_one(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(networks.NETWORKS, "mlp", (lambda: nn.Dense(10), (3,)))
  opaque = "optax.contrib.sam, opaque"
  rows = step_cost.main([
      *("--parts", "mlp", "--methods", "adaptive_sam", "--against", opaque),
      *("--repeats", "3", "--batch-size", "2", "--sample-seconds", "0.0001"),
      *("--output", str(tmp_path / "rows.jsonl")),
  ])
  by_name = {row["method"]: row for row in rows}
  by_hand = {"ASAM by hand", "SAM by hand"}
  assert set(by_name) == {"plain SGD", "adaptive_sam", opaque, *by_hand}
  assert by_name[opaque]["ratio_against"] == [1, 1, 1]
  assert by_name[opaque]["error_against"] == 0
  assert by_name["adaptive_sam"]["error_against"] > 0
  assert f"time / {opaque} | error |" in capsys.readouterr().out


def test_error_of_the_median():
  # Of n normal numbers it is sqrt(pi / 2 / n).
  values = np.random.default_rng(0).normal(size=4000)
  expected = np.sqrt(np.pi / 2 / 4000)
  assert timing.median_error(values) == pytest.approx(expected, rel=0.15)


def test_each_perturbation_is_the_equation():
  rng = np.random.default_rng(0)
  ws, gs = rng.normal(size=(2, 3, 4, 5))
  factors = np.abs(ws) + perturbation.ETA
  norm = np.sqrt(np.sum((factors * gs) ** 2))
  expected = perturbation.RHO * factors**2 * gs / norm
  for variant in perturbation.VARIANTS.values():
    actual = jax.jit(variant)(list(np.float32(ws)), list(np.float32(gs)))
    np.testing.assert_allclose(np.stack(actual), expected, rtol=1e-5)


@pytest.fixture(scope="module")
def after_two_steps():
  """A logistic regression, which is quick to compile."""

  def loss(params, batch):
    x, y = batch
    return jnp.mean(jnp.logaddexp(0, -y * (x @ params["kernel"] + params["bias"])))

  rng = np.random.default_rng(0)
  x = np.float32(rng.normal(size=(8, 5)))
  batch = (x, np.sign(x[:, 0] + np.float32(0.1)))
  results = {}
  for name, method in steps.steps(loss).items():
    # In NumPy: jnp.array(0.5) has a weak type, for which the step compiles once more.
    params = {"kernel": np.float32([1.0, -2.0, 0.5, 0.0, 1.0]), "bias": np.float32(0.5)}
    state = method.init(params)
    step = jax.jit(method.step)
    for _ in range(2 * method.calls):
      params, state, _ = step(params, state, batch)
    results[name] = params
  return results


@pytest.mark.parametrize(
    ("method", "by_hand"),
    [
        ("adaptive_sam", "ASAM by hand"),
        ("value_and_grad", "ASAM by hand"),
        ("sam", "SAM by hand"),
        ("optax.contrib.sam, opaque", "SAM by hand"),
        ("optax.contrib.sam, transparent", "SAM by hand"),
    ],
)
def test_what_is_compared_makes_the_same_step(after_two_steps, method, by_hand):
  actual, expected = after_two_steps[method], after_two_steps[by_hand]
  chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)
  plain = after_two_steps["plain SGD"]
  moved = jax.tree.map(lambda a, b: np.abs(np.subtract(a, b)).max(), actual, plain)
  assert max(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.parametrize(
    ("name", "parameters"), [("mlp", 85_002), ("cnn", 35_914), ("resnet", 78_042)]
)
def test_networks_are_what_they_are_called(name, parameters):
  problem = networks.problem(name, 2)
  variables = jax.eval_shape(problem.init)
  assert variables.keys() == {"params"}  # no batch statistics
  assert sum(w.size for w in jax.tree.leaves(variables)) == parameters
  assert jax.eval_shape(problem.loss, variables, problem.batch).shape == ()


def test_interleaved_measures_each_case_once_a_round():
  order = []
  times = timing.interleaved(
      {name: lambda name=name: order.append(name) or len(order) for name in "abc"}, 4
  )
  rounds = np.array(order).reshape(-1, 3)
  assert all(set(names) == set("abc") for names in rounds)
  assert len({tuple(names) for names in rounds}) > 1  # the order changes
  for name, measured in times.items():  # the first two rounds are not counted
    assert measured.tolist() == [i + 1 for i in range(6, 18) if order[i] == name]


def test_quartiles():
  assert timing.quartiles(np.array([4.0, 1.0, 2.0, 3.0, 5.0])) == [2, 3, 4]
  assert timing.show([2.0, 3.0, 4.0]) == "3.00 [2.00, 4.00]"


def test_too_few_parameters_for_the_leaves():
  with pytest.raises(ValueError, match="parameters=3 is too few for leaves=5"):
    perturbation.shapes(3, 5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--repeats", "0"], "--repeats 0: at least one round"),
        (["--against", "asam"], "argument --against: invalid choice: 'asam'"),
        (["--methods", "sam", "asam"], "argument --methods: invalid choice: 'asam'"),
    ],
)
def test_bad_options(bad, message, capsys):
  with pytest.raises(SystemExit):
    step_cost.parse(bad)
  assert message in capsys.readouterr().err


def test_what_is_compiled_without_the_loop_has_none():
  for cases in (compile_time.step_cases("mlp"), compile_time.tree_cases(3)):
    for name, lower in cases.items():
      ours = name.startswith(("adaptive_sam", "value_and_grad", "asam_jax"))
      has_loop = ours and not name.endswith(compile_time.NO_LOOP)
      assert ("stablehlo.while" in lower().as_text()) == has_loop, name


def test_compile_time_of_steps_and_of_trees(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(networks.NETWORKS, "mlp", (lambda: nn.Dense(10), (3,)))
  path = tmp_path / "new" / "rows.jsonl"
  compile_time.main(["--networks", "mlp", "--leaves", "3", "5", "--rounds", "2",
                     "--output", str(path)])
  header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert {"date", "jax", "cpu", "cores", "command"} <= header.keys()
  assert [(row["part"], row["method"]) for row in rows] == [
      *(("mlp", name) for name in compile_time.METHODS),
      *((f"{leaves} leaves", name)
        for leaves in (3, 5) for name in compile_time.SPELLINGS),
  ]
  for row in rows:
    for key in ("lower_seconds", "compile_seconds"):
      assert len(row[key]) == (2 if row["part"] == "mlp" else 1)
      assert all(seconds > 0 for seconds in row[key])
  assert capsys.readouterr().out.count(" s to compile") == len(rows)
