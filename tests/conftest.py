"""Four host devices for the multi-device tests, set before JAX starts."""

import gc
import os

_FLAG = "--xla_force_host_platform_device_count=4"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()

# Traces and compiled programs stay alive in JAX's caches. To look through them all
# again and again for garbage took an eighth of the suite's time.
gc.set_threshold(100_000, 20, 100)
