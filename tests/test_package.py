"""The public surface: documented, typed, and free of needless imports."""

import inspect
import re
import subprocess
import sys

import pytest

import asam_jax

PUBLIC = [name for name in asam_jax.__all__ if not name.startswith("__")]


def test_all_is_what_is_there():
  public = {
      name
      for name, value in vars(asam_jax).items()
      if not name.startswith("_") and not inspect.ismodule(value)
  }
  assert public == set(PUBLIC)
  assert asam_jax.__all__ == sorted(asam_jax.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_are_documented(name):
  doc = inspect.getdoc(getattr(asam_jax, name))
  assert doc
  if inspect.isclass(getattr(asam_jax, name)):
    return
  for section in ("Args:", "Returns:", "Examples:"):
    assert section in doc, f"{name} has no section {section}"
  for argument in inspect.signature(getattr(asam_jax, name)).parameters:
    assert re.search(rf"^ +\*{{0,2}}{argument}: ", doc, re.M), f"{name}: {argument}"


def test_core_imports_nothing_but_jax_and_optax():
  blocked = "import sys; sys.modules.update(flax=None, matplotlib=None, sklearn=None)"
  subprocess.run([sys.executable, "-c", blocked + "\nimport asam_jax"], check=True)
  # Optax may bring some of these along by itself; then it isn't our doing.
  code = """
import sys, optax
extras = {"flax", "matplotlib", "sklearn", "tqdm", "haiku", "equinox", "jaxtyping"}
extras -= set(sys.modules)
import asam_jax
assert not extras & set(sys.modules), extras & set(sys.modules)
"""
  subprocess.run([sys.executable, "-c", code], check=True)


def test_types_are_public():
  import importlib.resources

  assert (importlib.resources.files(asam_jax) / "py.typed").is_file()
