"""The study's page says what its records say, and its networks are trained apart."""

import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "results" / "sharpness_study"
PACKAGES = ("asam_jax.sharpness", "asam_jax.landscape")


@pytest.fixture
def example():
  pytest.importorskip("sklearn", reason="the examples need the extra 'examples'")
  return lambda name: importlib.import_module(f"examples.{name}")


def test_page_quotes_the_records(example):
  report = example("sharpness_report")
  count, kept, measures = report.read(RESULTS)
  page = (ROOT / "examples" / "sharpness_study.md").read_text()
  assert f"= {count} networks" in page
  assert f"The {len(kept)} networks" in page
  assert min(row["train_accuracy"] for row in kept) >= 0.99
  gap, everyone = report.gaps(kept), np.arange(len(kept))
  taus = []
  for name, by_rho in measures.items():
    rho = report.best_rho(by_rho, gap, everyone)
    assert f"{name.replace('inf', '∞')}, ρ={rho:g} |" in page
    taus.append(f"{report.tau_of(by_rho[rho], gap, everyone):+.3f}")
  row = next(line for line in page.splitlines() if line.startswith("| Kendall"))
  assert re.findall(r"([+-]\d\.\d{3}) \[", row) == taus


def test_networks_are_trained_side_by_side_but_apart(example):
  networks = example("sharpness_networks")
  chosen = [networks.Setting(0.1, 0.0, 0.0), networks.Setting(0.1, 0.5, 0.0)]
  params = jax.device_get(networks.train(128, chosen, epochs=1, seed=0))
  norms = [sum(np.sum(np.square(leaf[i])) for leaf in jax.tree.leaves(params))
           for i in (0, 1)]
  assert norms[1] < 0.9 * norms[0]  # weight decay shrank the second alone
  loss, accuracy = networks.evaluate(params, networks.digits()[0])
  assert loss.shape == accuracy.shape == (2,)


@pytest.mark.parametrize("package", PACKAGES)
def test_public_functions_are_documented(package):
  module = importlib.import_module(package)
  assert module.__all__ == sorted(module.__all__)
  for name in module.__all__:
    member = getattr(module, name)
    doc = inspect.getdoc(member)
    assert doc, name
    if inspect.isclass(member):
      continue
    for section in ("Args:", "Returns:", "Examples:"):
      assert section in doc, f"{name} has no section {section}"
    for argument in inspect.signature(member).parameters:
      assert re.search(rf"^ +\*{{0,2}}{argument}: ", doc, re.M), f"{name}: {argument}"


def test_plots_and_progress_are_imported_on_demand():
  code = (
      "import sys; sys.modules.update(matplotlib=None, tqdm=None);"
      " import asam_jax.sharpness, asam_jax.landscape")
  subprocess.run([sys.executable, "-c", code], check=True)
