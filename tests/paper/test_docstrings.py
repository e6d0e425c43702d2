"""The examples in the docstrings run."""

import doctest
import importlib

import pytest

MODULES = ["label_noise", "paper.models", "paper.text"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
  module = importlib.import_module(f"examples.{name}")
  failed, attempted = doctest.testmod(module)
  assert failed == 0
  assert attempted > 0
