"""The study's page says what its records say, and its networks are trained apart."""

import importlib
import inspect
import json
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

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


def test_page_quotes_the_training(example):
  report, records = example("sharpness_training_report"), example("records")
  folder = ROOT / "results" / "sharpness_training"
  page = (ROOT / "examples" / "sharpness_study.md").read_text()
  assert report.table(records.read(folder / "log.jsonl")) in page


@pytest.fixture
def study(example, monkeypatch, tmp_path):
  """The study on one batch size, with a training that only counts."""
  module = example("sharpness_study")
  networks = module.networks
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(networks.GRID, "batch_size", (8,))
  trained = []

  def train(batch_size, chosen, epochs, seed):
    trained.append(epochs)
    keys = jax.random.split(jax.random.key(seed), len(chosen))
    return jax.vmap(networks.init)(keys)

  monkeypatch.setattr(networks, "train", train)
  monkeypatch.setattr(module, "MEASURES", {"adaptive, p=2": ("elementwise", 2, (0.1,))})
  return module, trained


def test_only_networks_of_the_very_configuration_are_taken(study):
  module, trained = study
  module.main(["train", "--epochs", "3"])
  module.main(["train", "--epochs", "3"])
  assert trained == [3]
  with pytest.raises(SystemExit, match=r"8\.npz was trained with .*\"epochs\": 3"):
    module.main(["measure", "--epochs", "4"])
  module.main(["train", "--epochs", "4"])
  assert trained == [3, 4]
  rows, params = module.load(module.parser().parse_args(["measure", "--epochs", "4"]))
  assert len(rows) == 125
  assert jax.tree.leaves(params)[0].shape[0] == 125


def test_measures_replace_their_files_when_all_is_measured(study, monkeypatch):
  module, _ = study
  folder = pathlib.Path("runs/sharpness_study")
  command = ["measure", "--epochs", "1", "--least-accuracy", "0.15", "--chunk", "4"]

  def worst_case(loss, params, rho, *args, **options):
    return SimpleNamespace(value=rho * loss(params))

  monkeypatch.setattr(module.sharpness, "worst_case", worst_case)
  with pytest.raises(SystemExit, match=r"no file .*8\.npz; run the stage train first"):
    module.main(command)
  module.main(["train", "--epochs", "1"])
  module.main(command)
  paths = [folder / "networks.jsonl", folder / "measures.jsonl"]
  before = [path.read_bytes() for path in paths]
  count, kept, measures = module.sharpness_report.read(folder)
  assert count == 125
  assert len(kept) == len(measures["adaptive, p=2"][0.1]) > 0
  for row in map(json.loads, paths[1].read_text().splitlines()):
    assert row["config"] == {
        "epochs": 1, "seed": 0, "least_accuracy": 0.15, "steps": 20, "restarts": 0}

  def interrupt(*args, **options):
    raise KeyboardInterrupt

  monkeypatch.setattr(module.sharpness, "worst_case", interrupt)
  with pytest.raises(KeyboardInterrupt):
    module.main([*command, "--steps", "3"])
  assert [path.read_bytes() for path in paths] == before

  # A file of another configuration beside it is not read as if it belonged there.
  paths[0].write_bytes(before[0].replace(b'"steps": 20', b'"steps": 3'))
  with pytest.raises(SystemExit, match="are of different configurations"):
    module.main(["report"])


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
