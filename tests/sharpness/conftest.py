"""Checks the shapes and dtypes in the annotations while these tests run.

The users' calls are not checked. Modules that something imported before (a doctest,
say) are dropped, or the hook would come too late for them.
"""

import sys

import jax
import jaxtyping
import pytest

from tests.sharpness import typecheck

PACKAGES = ("asam_jax.sharpness", "asam_jax.landscape")

for _name in [n for n in sys.modules if n.startswith(PACKAGES)]:
  del sys.modules[_name]

with jaxtyping.install_import_hook(PACKAGES, f"{typecheck.__name__}.check"):
  import asam_jax.landscape  # noqa: F401
  import asam_jax.sharpness  # noqa: F401


@pytest.fixture(autouse=True)
def _quick_compilation():
  """These tests compile far more than they compute."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
