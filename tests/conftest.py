"""Settings that must be made before JAX starts."""

import gc
import os
import subprocess
import sys

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
