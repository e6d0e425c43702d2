"""The step stays readable: few functions, in few places."""

import ast
import dataclasses
from pathlib import Path
import sys

import jax
import jax.numpy as jnp
import optax

import asam_jax
from tests.sources import imported
from tools import mutate

ROOT = Path(asam_jax.__file__).parent


def test_an_update_passes_few_functions_in_few_modules():
  tx = asam_jax.adaptive_sam(optax.sgd(0.1))
  params = {"kernel": jnp.ones((17, 2)), "bias": jnp.ones(2)}
  loss = lambda w: jnp.sum((w["kernel"] + w["bias"]) ** 2)  # noqa: E731
  state, grads = tx.init(params), jax.grad(loss)(params)
  passed = set()

  def note(frame, event, _):
    path = Path(frame.f_code.co_filename)
    if event == "call" and ROOT in path.parents:
      passed.add((path.name, frame.f_code.co_qualname))

  @jax.jit
  def step(grads, state, params):
    return tx.update(grads, state, params, grad_fn=jax.grad(loss))

  jax.clear_caches()  # or what another test has traced would not be passed
  sys.setprofile(note)
  try:
    step.trace(grads, state, params)
  finally:
    sys.setprofile(None)
  # Expressions with a scope of their own are no functions to hop to.
  functions = {(m, f) for m, f in passed if not f.endswith((">",))}
  assert len({module for module, _ in functions}) <= 4, functions
  assert 10 <= len(functions) <= 18, functions


def parsed():
  """The modules of the package by their place in it, each as a syntax tree."""
  for path in sorted(ROOT.rglob("*.py")):
    yield path.relative_to(ROOT), ast.parse(path.read_text())


def test_no_file_is_long():
  lengths = {p.name: len(p.read_text().splitlines()) for p in ROOT.rglob("*.py")}
  assert max(lengths.values()) <= 440, lengths


def test_the_geometrys_arguments_are_spelled_in_few_places():
  fields = {f.name for f in dataclasses.fields(asam_jax.Geometry)} - {"param_specs"}
  spelled = {"Geometry"}
  for path, tree in parsed():
    for node in ast.walk(tree):
      if isinstance(node, ast.FunctionDef):
        arguments = {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
        if len(arguments & fields) >= 3:
          spelled.add(f"{path}:{node.name}")
  assert len(spelled) <= 9, spelled


def test_no_package_reaches_into_another_ones_private_modules():
  for path, tree in parsed():
    own = ("asam_jax", *path.parent.parts)
    for node in ast.walk(tree):
      for name in imported(node):
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part.startswith("_")), None)
        if first is not None and parts[0] != "__future__":
          assert tuple(parts[:first]) == own[:first], f"{path}: {name}"


def test_every_module_has_tests_that_see_its_mutants():
  modules = {str(path.with_suffix("")) for path, _ in parsed()}
  packages = {"landscape/__init__", "sharpness/__init__"}  # re-export alone
  assert set(mutate.TESTS) == modules - packages
  for names in mutate.TESTS.values():
    for name in names.split():
      *folder, file = name.split("/")
      path = ROOT.parent.joinpath("tests", *folder, f"test_{file}.py")
      assert path.is_file() or (ROOT.parent / "tests" / name).is_dir(), name
