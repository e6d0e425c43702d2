"""The API pages have every public name, and the docstrings fit the signatures."""

import dataclasses
import importlib
import inspect
import re

import pytest

import asam_jax
from tests import pages

NEEDS = {
    "asam_jax": "jax",
    "asam_jax.nnx": "flax",
    "asam_jax.sharpness": "jaxtyping",
    "asam_jax.landscape": "jaxtyping",
}
FOLDER = pages.ROOT / "docs/api"
TEXT = "".join(path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.md")))
ENTRIES = re.findall(r"^\.\. auto(?:function|class):: ([\w.]+)$", TEXT, re.MULTILINE)


def module_of(name):
  pytest.importorskip(NEEDS[name], reason=f"{name} needs an extra")
  return importlib.import_module(name)


def public(module):
  return [name for name in module.__all__ if not name.startswith("__")]


@pytest.mark.parametrize("name", NEEDS)
def test_every_public_name_has_one_entry(name):
  module = module_of(name)
  expected = [f"{name}.{each}" for each in public(module)]
  entries = [entry for entry in ENTRIES if entry.rpartition(".")[0] == name]
  assert sorted(entries) == sorted(expected)


def section(doc, title):
  """The names that a section of a docstring describes, in their order."""
  found = re.search(rf"^{title}:\n((?:  .*\n|\n)+)", doc + "\n", re.MULTILINE)
  return re.findall(r"^  \*{0,2}(\w+): ", found[1], re.MULTILINE) if found else []


def callables(module):
  return [n for n in public(module) if inspect.isfunction(getattr(module, n))]


def classes(module):
  return [n for n in public(module) if inspect.isclass(getattr(module, n))]


@pytest.mark.parametrize("name", NEEDS)
def test_the_arguments_described_are_those_of_the_signature(name):
  module = module_of(name)
  assert callables(module)
  for each in callables(module):
    function = getattr(module, each)
    doc = inspect.getdoc(function) or ""
    arguments = list(inspect.signature(function).parameters)
    assert section(doc, "Args") == arguments, f"{name}.{each}"
    for title in ("Returns:", "Examples:"):
      assert f"\n{title}\n" in doc, f"{name}.{each} has no section {title}"


def test_the_arguments_of_methods_are_described():
  methods = re.findall(r":: ([\w.]+)\n +:members: (.+)", TEXT)
  assert methods
  for entry, members in methods:
    cls = getattr(asam_jax, entry.removeprefix("asam_jax."))
    for each in members.split(", "):
      method = inspect.getattr_static(cls, each)
      doc = inspect.getdoc(method)
      assert doc, f"{entry}.{each}"
      if inspect.isfunction(method):
        _, *arguments = inspect.signature(method).parameters
        assert section(doc, "Args") == arguments, f"{entry}.{each}"


@pytest.mark.parametrize("name", NEEDS)
def test_the_attributes_described_are_the_fields(name):
  module = module_of(name)
  for each in classes(module):
    cls = getattr(module, each)
    if dataclasses.is_dataclass(cls):
      fields = [field.name for field in dataclasses.fields(cls)]
    elif cls is not asam_jax.Description:  # a tuple of rows, which has no fields
      fields = list(cls._fields)
    else:
      continue
    doc = inspect.getdoc(cls) or ""
    described = section(doc, "Attributes") or section(doc, "Args")
    assert described == fields, f"{name}.{each}"


@pytest.mark.parametrize("name", NEEDS)
def test_signatures_are_readable(name):
  module = module_of(name)
  for each in callables(module):
    parameters = inspect.signature(getattr(module, each)).parameters.values()
    for parameter in parameters:
      shown = inspect.formatannotation(parameter.annotation)
      assert len(shown) <= 60, f"{name}.{each}: {shown}"
      assert "._" not in shown, f"{name}.{each} names what is private: {shown}"
