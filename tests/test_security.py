"""Nothing in the repository unpickles, as SECURITY.md says."""

import ast

import pytest

from tests import pages

FOLDERS = ("asam_jax", "benchmarks", "docs", "examples", "tools")
SOURCES = sorted(p for f in FOLDERS for p in (pages.ROOT / f).rglob("*.py"))
FORBIDDEN = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "torch"}


def unpickles(source):
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module or ""]
    elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
      names = [] if ast.unparse(node.value) == "False" else ["pickle"]
    else:
      names = []
    if FORBIDDEN & {name.split(".")[0] for name in names}:
      return True
  return False


@pytest.mark.parametrize(
    "path", SOURCES, ids=lambda path: path.relative_to(pages.ROOT).as_posix()
)
def test_nothing_is_unpickled(path):
  assert not unpickles(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from joblib import load", "np.load(path, allow_pickle=True)",
     "import torch.serialization"],
)
def test_it_would_be_seen(source):
  assert unpickles(source)
