"""What holds for every example: where it writes, what it imports, what --help says."""

import ast
import importlib
import pathlib
import re
import shutil
import subprocess

import pytest

from tests.sources import imported

pytest.importorskip("sklearn", reason="the examples need the extra 'examples'")
pytest.importorskip("matplotlib", reason="the examples need the extra 'examples'")

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("examples", "benchmarks", "tests")
SCRIPTS = [
    "examples.quickstart",
    "examples.frontier",
    "examples.multihost",
    "examples.multihost_kill",
    "examples.radius_choice",
    "examples.radius_gauge",
    "examples.radius_study",
    "examples.sharpness_study",
    "examples.sharpness_training",
    "benchmarks.compile_time",
    "benchmarks.pod.__main__",
    "benchmarks.scale",
    "benchmarks.step_cost",
]


def parser_of(name):
  return importlib.import_module(name).parser()


def actions_of(name):
  """The options and arguments of a script, --help left out."""
  return [a for a in parser_of(name)._actions if a.dest != "help"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_says_what_it_is(name):
  text = re.sub(r"\s+", " ", parser_of(name).format_help())
  for action in actions_of(name):
    said = (action.help or "").split()
    assert len(said) >= 3, f"{name}: {action.dest} has no help"
    if action.option_strings:  # with the default: format_help adds it
      start = text.index(" ".join(said)[:20])
      assert "(default: " in text[start:], action.dest
  # Numbers have a unit, or are numbers of something.
  for action in actions_of(name):
    if isinstance(action.default, (int, float)) and action.nargs != 0:
      unit = r"number of|fraction|seconds|rate|added|exponent|first seed|draws"
      assert re.search(unit, action.help or ""), f"{name}: unit of {action.dest}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_default_outputs_are_ignored_by_git(name):
  defaults = [
      value for action in actions_of(name)
      for value in (
          action.default if isinstance(action.default, list) else [action.default])
  ]
  paths = [value for value in defaults if isinstance(value, pathlib.Path)]
  assert paths
  for path in paths:
    assert not path.is_absolute()
    assert path.parts[0] == "runs", f"{name} writes to {path}"
  ignored = (ROOT / ".gitignore").read_text().splitlines()
  assert "/runs/" in ignored


def test_nothing_tracked_is_under_runs():
  if shutil.which("git") is None or not (ROOT / ".git").exists():
    pytest.skip("not a git clone")
  command = ["git", "ls-files", "--", "runs"]
  listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
  assert listed.stdout == b""


def sources(*folders):
  for folder in folders:
    yield from sorted((ROOT / folder).rglob("*.py"))


def dotted(node):
  """``a.b.c`` of such an expression; else nothing."""
  parts = []
  while isinstance(node, ast.Attribute):
    parts.append(node.attr)
    node = node.value
  return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def reaches(tree):
  """What a module takes by the back door: search paths and private modules."""
  for node in ast.walk(tree):
    names = imported(node)
    if isinstance(node, ast.Attribute):
      names = [dotted(node)]
      if names == ["sys.path"] or node.attr == "syspath_prepend":
        yield "a search path"
    for name in names:
      house, *parts = name.split(".")
      private = any(re.match(r"_[a-z]", part) for part in parts)
      if house in ("asam_jax", "examples", "benchmarks") and private:
        yield name


def test_back_doors_are_seen():
  code = (
      "import sys; sys.path.append('x'); import asam_jax._norm;"
      " from asam_jax.sharpness import _geometry, worst_case;"
      " import asam_jax; asam_jax._norm.f; asam_jax.__version__"
  )
  found = list(reaches(ast.parse(code)))
  assert set(found) == {
      "a search path", "asam_jax._norm", "asam_jax.sharpness._geometry",
      "asam_jax._norm.f",
  }


def test_no_search_paths_and_no_private_modules():
  for path in sources(*FOLDERS):
    found = set(reaches(ast.parse(path.read_text())))
    if path.is_relative_to(ROOT / "tests"):  # tests may look at what they test
      found = {name for name in found if name == "a search path"}
    assert not found, path


def test_pages_name_commands_that_exist():
  pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md"),
           *ROOT.glob("results/**/*.md"), *ROOT.glob("docs/**/*.md")]
  named = set()
  for page in pages:
    text = re.sub(r"\s+", " ", page.read_text())
    assert not re.search(r"python (examples|benchmarks)/", text), page
    named |= set(re.findall(r"python -m ((?:examples|benchmarks)[\w.]+)", text))
  assert "examples.quickstart" in named
  for name in named:
    assert importlib.util.find_spec(name) is not None, name


def test_every_picture_is_shown_somewhere():
  pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md"),
           *ROOT.glob("results/**/*.md")]
  shown = {
      (page.parent / link).resolve()
      for page in pages
      for link in re.findall(r"!\[[^\]]*\]\(([^)#]+)\)", page.read_text())
  }
  for picture in (ROOT / "results").rglob("*.png"):
    assert picture.resolve() in shown, picture
  front = (ROOT / "docs" / "which_method.md").read_text()
  assert "](../results/frontier/frontier.png)" in front
