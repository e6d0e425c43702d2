"""The project's public home: one setting, ``url`` under ``[metadata]`` in setup.cfg.

    python -m tools.home

prints it, or nothing while it is not filled. What shows an address asks here: the
site's button and the install cells of the notebooks.
"""

import configparser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def url() -> str:
  """The address of the public repository, without a slash at its end; or ""."""
  settings = configparser.ConfigParser(interpolation=None)
  settings.read(ROOT / "setup.cfg")
  return settings.get("metadata", "url", fallback="").strip().rstrip("/")


def requirement(extra: str = "") -> str:
  """What pip installs: from the repository, or by name while that has no address."""
  name = f"asam_jax[{extra}]" if extra else "asam_jax"
  return f"{name} @ git+{url()}" if url() else name


if __name__ == "__main__":
  print(url())
