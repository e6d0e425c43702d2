"""Every page of examples/frameworks runs, learns, and stays a page."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the pages need the extra 'examples'")

PAGES = sorted((Path(__file__).parent.parent / "examples/frameworks").glob("*.py"))
NEEDS = {"linen": "flax", "nnx": "flax", "haiku": "haiku", "equinox": "equinox",
         "optimistix": "optimistix"}


def test_there_is_one_for_each_framework():
  assert {page.stem.split("_")[0] for page in PAGES} == {"plain", *NEEDS}


def load(page):
  spec = importlib.util.spec_from_file_location(f"page_{page.stem}", page)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_page(page, capsys):
  framework = NEEDS.get(page.stem.split("_")[0])
  if framework is not None:
    pytest.importorskip(framework, reason="an extra that is not installed")
  losses = load(page).main(steps=30)
  assert np.isfinite(losses).all()
  # From about log(10) = 2.3; batches are random and units dropped.
  assert np.mean(losses[-3:] if len(losses) > 2 else losses[-1]) < 0.6 * losses[0]
  printed = capsys.readouterr().out
  assert f"{losses[0]:.3f}" in printed
  assert f"{losses[-1]:.3f}" in printed
  text = page.read_text()
  assert f"python examples/frameworks/{page.name}" in text  # how to run it
  assert "asam_jax." in text
