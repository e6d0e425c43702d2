"""Settings that must be made before JAX starts, and what many tests share."""

import contextlib
import gc
import os
import subprocess
import sys
import zlib

import pytest

# For the multi-device tests.
DEVICES = "--xla_force_host_platform_device_count=8"
# Most of the suite's time would go into compiling small programs well. Whoever wants
# what users run sets ASAM_JAX_TESTS_OPTIMIZED; the suite then takes twice as long.
QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def _add_flags(flags):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


def _accepted(flags):
  """Whether this XLA knows the flags: it ends the process if it doesn't know one."""
  env = {**os.environ, "XLA_FLAGS": flags}
  code = "import jax; jax.devices()"
  run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
  return run.returncode == 0


if DEVICES not in os.environ.get("XLA_FLAGS", ""):  # else a parent process was here
  _add_flags(DEVICES)
  if "ASAM_JAX_TESTS_OPTIMIZED" not in os.environ:
    every = " ".join(QUICK)  # one look is enough where all are known
    _add_flags(every if _accepted(every) else " ".join(filter(_accepted, QUICK)))

# Traces and compiled programs stay alive in JAX's caches. To look through them all
# again and again for garbage took an eighth of the suite's time.
gc.set_threshold(100_000, 20, 100)


def drawn(names, part, parts):
  """Which cases make a part of the tests: of each test one at least.

  Drawn by their names and not counted off, as every third of a grid of three by
  something would have one column of it alone.

  Args:
    names: of all the cases, such as ``"test_x.py::test_y[2-elementwise]"``.
    part: which part, 0 to parts - 1.
    parts: into how many parts the cases fall.

  Returns:
    A set of names.
  """
  cases = {}
  for name in names:
    cases.setdefault(name.partition("[")[0], []).append(name)
  kept = set()
  for some in cases.values():
    of_part = [x for x in some if zlib.crc32(x.encode()) % parts == part]
    kept |= set(of_part or some[:1])
  return kept


def pytest_collection_modifyitems(config, items):
  """ASAM_JAX_TESTS_PART=1/3 leaves two thirds of the cases out, and pytest says so."""
  part, _, parts = os.environ.get("ASAM_JAX_TESTS_PART", "0/1").partition("/")
  kept = drawn([item.nodeid for item in items], int(part), int(parts))
  left_out = [item for item in items if item.nodeid not in kept]
  if left_out:
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item.nodeid in kept]


@pytest.fixture
def drawings(monkeypatch):
  """The figures that a test draws, which are closed by then but can be read."""
  from examples import style  # which needs an extra

  kept, picture = [], style.picture

  @contextlib.contextmanager
  def keep(*args, **options):
    with picture(*args, **options) as (figure, axes):
      kept.append(figure)
      yield figure, axes

  monkeypatch.setattr(style, "picture", keep)
  return kept
