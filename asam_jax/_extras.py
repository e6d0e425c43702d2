"""What the core does not need: optional packages, and the extra that brings them."""

import importlib.util


def require(module: str, *packages: str) -> None:
  """Raises an ImportError that names the extra unless all packages are installed."""
  extra = "sharpness" if module == "landscape" else module
  missing = [name for name in packages if importlib.util.find_spec(name) is None]
  if missing:
    raise ModuleNotFoundError(
        f"{', '.join(missing)} is missing, which asam_jax.{module} needs beside jax and"
        f" optax; install the extra: pip install 'asam_jax[{extra}]'.",
        name=missing[0],
    )
