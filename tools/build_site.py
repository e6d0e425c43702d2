"""The site of docs/, built strictly: a warning is an error.

    python -m tools.build_site

writes it to ``build/site``; open ``build/site/index.html``. It needs the extra
``asam_jax[docs]`` and no network.
"""

import argparse
from pathlib import Path
import subprocess
import sys

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path) -> None:
  """Every page afresh, so that what a former build left can hide nothing."""
  subprocess.run(
      [sys.executable, "-m", "sphinx", "--builder", "html", "--fail-on-warning",
       "--nitpicky", "--keep-going", "--fresh-env", "--write-all", "--quiet",
       "--doctree-dir", str(folder.parent / "doctrees"), str(ROOT / "docs"),
       str(folder)],
      check=True,
      cwd=ROOT,
  )


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--folder", type=Path, default=ROOT / "build/site")
  options = parser.parse_args()
  build(options.folder)
  print(f"built {options.folder / 'index.html'}")


if __name__ == "__main__":
  main()
