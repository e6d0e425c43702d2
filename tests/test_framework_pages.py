"""Every page of examples/frameworks runs, learns, and stays a page."""

import importlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the pages need the extra 'examples'")

FOLDER = Path(__file__).parent.parent / "examples/frameworks"
PAGES = sorted(page for page in FOLDER.glob("*.py") if page.stem != "__init__")
NEEDS = {"linen": "flax", "nnx": "flax", "haiku": "haiku", "equinox": "equinox",
         "optimistix": "optimistix"}


def test_there_is_one_for_each_framework():
  assert {page.stem.split("_")[0] for page in PAGES} == {"plain", *NEEDS}


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_page(page, capsys):
  framework = NEEDS.get(page.stem.split("_")[0])
  if framework is not None:
    pytest.importorskip(framework, reason="an extra that is not installed")
  module = importlib.import_module(f"examples.frameworks.{page.stem}")
  losses = module.main(steps=30)
  assert np.isfinite(losses).all()
  # From about log(10) = 2.3; batches are random and units dropped.
  assert np.mean(losses[-3:] if len(losses) > 2 else losses[-1]) < 0.6 * losses[0]
  printed = capsys.readouterr().out
  assert f"{losses[0]:.3f}" in printed
  assert f"{losses[-1]:.3f}" in printed
  text = page.read_text()
  assert f"python -m examples.frameworks.{page.stem}" in text  # how to run it
  assert "asam_jax." in text
