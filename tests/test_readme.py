"""The README's code runs: both loops, before and after their diffs."""

import doctest
import importlib
from pathlib import Path
import re

import jax
import jax.numpy as jnp
import pytest

import asam_jax
from benchmarks import timing
from examples import records

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
  return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def patched(code, diff):
  """The code with a diff applied: additions alone are imports, and go on top."""
  removed, added = [], []
  for line in [*diff.splitlines(), " "]:
    if line.startswith("-"):
      removed.append(line[1:])
    elif line.startswith("+"):
      added.append(line[1:])
    elif removed:
      old, new = "\n".join(removed), "\n".join(added)
      assert code.count(old) == 1, f"the diff does not fit: {old!r}"
      code, removed, added = code.replace(old, new), [], []
    elif added:
      assert all(text.startswith("import ") for text in added)
      code, added = "\n".join([*added, code]), []
  return code


def load_report(name):
  """A module of the examples that draws, which needs their extra."""
  pytest.importorskip("matplotlib", reason="the examples need the extra 'examples'")
  pytest.importorskip("sklearn", reason="the examples need the extra 'examples'")
  return importlib.import_module(f"examples.{name}")


def data():
  x = jax.random.normal(jax.random.key(0), (32, 3))
  y = x @ jnp.array([[1.0], [-2.0], [0.5]]) + 0.3
  return x, y


def loop(name):
  before = [code for code in blocks("python") if "train_step" in code]
  return dict(zip(["optax", "flax"], zip(before, blocks("diff"), strict=True),
                  strict=True))[name]


@pytest.mark.parametrize("change", [False, True], ids=["before", "after"])
def test_optax_loop(change):
  code, diff = loop("optax")
  scope = {}
  exec(patched(code, diff) if change else code, scope)
  x, y = data()
  params = {"kernel": jnp.zeros((3, 1)), "bias": jnp.zeros(1)}
  state, losses = scope["tx"].init(params), []
  for _ in range(30):
    params, state, loss = scope["train_step"](params, state, (x, y))
    losses.append(float(loss))
  assert losses[-1] < 0.1 * losses[0]
  assert has_ascent(state) == change


@pytest.mark.parametrize("change", [False, True], ids=["before", "after"])
def test_flax_loop(change):
  code, diff = loop("flax")
  scope = {}
  exec(patched(code, diff) if change else code, scope)
  state, losses = scope["state"], []
  first = scope["train_step"](state, data())[0]
  for _ in range(300):
    state, loss = scope["train_step"](state, data())
    losses.append(float(loss))
  assert losses[-1] < 0.1 * losses[0]
  # The first step of Adam differs from the plain one in the gradient's momentum.
  plain = {}
  exec(code, plain)
  other = plain["train_step"](plain["state"], data())[0]
  same = jax.tree.map(
      lambda a, b: bool((a == b).all()), first.opt_state[0].mu, other.opt_state[0].mu
  )
  assert all(jax.tree.leaves(same)) != change


def has_ascent(state):
  is_ascent = lambda x: isinstance(x, asam_jax.AscentState)  # noqa: E731
  return any(map(is_ascent, jax.tree.leaves(state, is_leaf=is_ascent)))


def test_examples():
  sessions = [code for code in blocks("python") if ">>>" in code]
  assert sessions
  parser = doctest.DocTestParser()
  for code in sessions:
    test = parser.get_doctest(code, {}, "README", "README.md", 0)
    assert doctest.DocTestRunner().run(test).failed == 0


def test_pictures_and_files_exist():
  links = re.findall(r"\]\(([^)#]+)\)", README)
  local = [link for link in links if not link.startswith("http")]
  assert local
  for link in local:
    assert (ROOT / link).exists(), link


def test_quickstart_table_is_that_of_the_results():
  quickstart_report = load_report("quickstart_report")
  rows = records.read(ROOT / "results/quickstart/results.jsonl")
  assert quickstart_report.table(rows) in README


def test_cost_table_is_that_of_the_results():
  folder = ROOT / "results/benchmarks"
  text = README.replace("\n", " ")

  def rows_of(name):
    return records.read(folder / f"{name}.jsonl")[1:]

  columns = ("ASAM by hand", "adaptive_sam", "value_and_grad", "sam")
  modes = ("optax.contrib.sam, opaque", "optax.contrib.sam, transparent")
  for name, label in (("mlp", "MLP"), ("resnet", "ResNet-8")):
    times = {row["method"]: timing.show(row["ratio"]) for row in rows_of(name)}
    cells = [*(times[key] for key in columns), " / ".join(times[key] for key in modes)]
    line = next(line for line in README.splitlines() if line.startswith(f"| {label}, "))
    assert line.endswith(" | " + " | ".join(cells) + " |")
  for name in ("mlp", "resnet_against_opaque"):
    by_hand = {row["method"]: row["ratio_to_by_hand"][1] for row in rows_of(name)}
    for method in ("adaptive_sam", "value_and_grad"):
      assert f"{by_hand[method]:.3f}" in text
  for row in rows_of("resnet_against_opaque"):
    if row["method"] in columns:
      assert row["against"] == "optax.contrib.sam, opaque"
      assert f"{row['ratio_against'][1]:.3f} ± {row['error_against']:.3f}" in text
  ours = [
      row["ratio"]
      for row in rows_of("perturbation")
      if row["method"] == "asam_jax.ascent"
  ]
  assert len(ours) == 2
  for ratio in ours:
    assert timing.show(ratio) in text


def test_frontier_table_is_that_of_the_results():
  report = load_report("frontier_report")
  results = records.read(ROOT / "results/frontier/frontier.jsonl")
  kinds = {"accuracy": [], "cost": []}
  for row in results:
    kinds[row["config"]["kind"]].append(row)
  rows = {
      network: {
          row.method: row for row in report.rows_of(*kinds.values(), network, 0.4)
      }
      for network in ("mlp", "cnn")
  }
  labels = {
      "ASAM every 2nd step": "every_2",
      "AE-SAM": "ae_sam",
      "LookSAM, k = 5": "looksam",
      "adaptive Momentum-SAM": "momentum",
      "stale-gradient ASAM": "stale",
  }
  for label, method in labels.items():
    cells = [
        f"{100 * row.share:.0f} % | {row.flops:.2f}"
        for row in (rows["mlp"][method], rows["cnn"][method])
    ]
    assert f"| {label} | {cells[0]} | {cells[1]} |" in README
  text = README.replace("\n", " ")
  for row in kinds["cost"]:
    if row["method"] == "momentum" and (
        row["config"]["network"] not in rows  # the larger ones, of the sentence below
    ):
      assert timing.show(row["time"][1]) in text
