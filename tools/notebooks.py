"""The notebooks of ``examples/notebooks``: makes them, runs them, compares them.

A notebook is a pair. The ``.py``, in jupytext's percent format, is what people edit and
review; the ``.ipynb`` has the outputs, and is made from it:

    python -m tools.notebooks                       # check every pair, as CI does
    python -m tools.notebooks --write               # make every .ipynb anew
    python -m tools.notebooks --write 4_sharpness   # or one

Either way the code runs in a fresh kernel, and an error, a warning or anything else on
the standard error fails. A check also fails where pair and notebook differ, and where
an output is not the stored one: in text, numbers count to their last digit but one;
pictures are compared from afar. Cells tagged ``varies`` train networks, which chaos
makes differ from one processor to the next: there numbers and pictures are let be.
Cells tagged ``skip-execution`` install things and are not run.

What has run is kept in ``runs/notebooks`` under a digest of the pair, the package and
the versions around it, and runs again only if one of these changes.
"""

import argparse
import base64
import hashlib
from importlib import metadata
import io
import math
import os
from pathlib import Path
import platform
import re
import resource
import sys
import tempfile
import time
from typing import Any

import jupytext
import nbclient
import nbclient.exceptions
import nbformat
import numpy as np
from PIL import Image

from tools import home

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples/notebooks"
CACHE = ROOT / "runs/notebooks"
# What the notebooks' first cell installs. --write puts it into every notebook.
REQUIREMENT = home.requirement("examples,nnx,sharpness")
SECONDS = 60  # on two cores
BYTES = 300_000
AROUND = ("flax", "ipykernel", "jax", "jaxlib", "matplotlib", "numpy", "optax",
          "orbax-checkpoint", "scikit-learn", "scipy")
# First of all in the kernel, and seen by nobody.
# The kernel's own warnings aren't the notebook's.
STRICT = """import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", module="ipykernel|IPython|jupyter|traitlets")
del warnings"""
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?")


def names() -> list[str]:
  """The pairs there are."""
  return sorted(path.stem for path in FOLDER.glob("*.py"))


def of_script(name: str) -> Any:
  """The notebook that the ``.py`` of a pair says, without outputs."""
  notebook = jupytext.read(FOLDER / f"{name}.py")
  notebook.metadata = nbformat.from_dict({
      "jupytext": {"formats": "ipynb,py:percent"},
      "kernelspec": notebook.metadata["kernelspec"],
      "language_info": {"name": "python"},
  })
  notebook.nbformat, notebook.nbformat_minor = 4, 5
  for number, cell in enumerate(notebook.cells):
    cell.id = f"cell-{number:02}"  # the same at each making
    tags = cell.metadata.get("tags")
    cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
  return notebook


def of_notebook(name: str) -> Any:
  """The notebook of a pair, with its outputs."""
  return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def disagreements(name: str) -> list[str]:
  """Where the two of a pair do not say the same."""
  if not (FOLDER / f"{name}.ipynb").exists():
    return [f"{name}.ipynb is missing"]
  script, notebook = ([tuple(map(str, (c.cell_type, c.source, c.metadata)))
                       for c in n.cells] for n in (of_script(name), of_notebook(name)))
  if len(script) != len(notebook):
    return [f"{name}.py has {len(script)} cells, the .ipynb {len(notebook)}"]
  pairs = zip(script, notebook, strict=True)
  return [
      f"{name}: cell {number} differs from the .py:\n{ours[1]}"
      for number, (ours, theirs) in enumerate(pairs) if ours != theirs
  ]


def digest(name: str) -> str:
  """Of all that an execution depends on."""
  total = hashlib.sha256(platform.python_version().encode())
  files = [FOLDER / f"{name}.py", *sorted((ROOT / "asam_jax").rglob("*.py"))]
  for path in files:
    total.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
  for package in AROUND:
    total.update(f"{package} {metadata.version(package)}".encode())
  return total.hexdigest()[:16]


def run(notebook: Any) -> tuple[Any, float]:
  """The notebook with the outputs of a fresh kernel, and the seconds it took.

  Of the clock and the processors' time the lesser: if others keep the machine busy,
  that is not the notebook's doing.
  """
  strict = nbformat.v4.new_code_cell(STRICT)
  notebook.cells.insert(0, strict)
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  with tempfile.TemporaryDirectory() as scratch:
    client = nbclient.NotebookClient(
        notebook, kernel_name="python3", timeout=600, record_timing=False,
        coalesce_streams=True, extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": scratch}},
    )
    start, before = time.monotonic(), _processors()
    client.execute(env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"})
    seconds = min(time.monotonic() - start, _processors() - before)
  del notebook.cells[0]
  count = 0
  for cell in notebook.cells:
    if cell.cell_type == "code":
      cell.metadata.pop("execution", None)
      skipped = "skip-execution" in cell.metadata.get("tags", ())
      cell.execution_count = None if skipped else (count := count + 1)
      for output in cell.outputs:
        if "execution_count" in output:
          output.execution_count = cell.execution_count
        if "image/png" in output.get("data", {}):
          output.data["image/png"] = smaller(output.data["image/png"])
  return notebook, seconds


def smaller(picture: str) -> str:
  """A picture in 128 colours, which is a third of the bytes and looks the same."""
  image, buffer = Image.open(io.BytesIO(base64.b64decode(picture))), io.BytesIO()
  image = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
  image.save(buffer, "png", optimize=True)
  return base64.b64encode(buffer.getvalue()).decode()


def _processors() -> float:
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def executed(name: str, anew: bool = False) -> Any:
  """The notebook of the ``.py``, run; from the cache if nothing has changed."""
  kept = CACHE / f"{name}-{digest(name)}.ipynb"
  if kept.exists() and not anew:
    print(f"{name}: has run before")
    return nbformat.read(kept, as_version=4)
  notebook, seconds = run(of_script(name))
  print(f"{name}: ran in {seconds:.0f} s", flush=True)
  if seconds > SECONDS and anew:  # to be mended where it is made
    raise RuntimeError(f"{name} took {seconds:.0f} s, more than {SECONDS}.")
  spoken = complaints(notebook)
  if spoken:
    raise RuntimeError(f"{name} wrote to the standard error:\n" + "\n".join(spoken))
  CACHE.mkdir(parents=True, exist_ok=True)
  for old in CACHE.glob(f"{name}-*.ipynb"):
    old.unlink()
  nbformat.write(notebook, kept)
  return notebook


def complaints(notebook: Any) -> list[str]:
  """All that went to the standard error."""
  return [
      output.text for cell in notebook.cells for output in cell.get("outputs", [])
      if output.output_type == "stream" and output.name == "stderr"
  ]


def changed(stored: Any, fresh: Any) -> list[str]:
  """Which outputs are not the stored ones, of notebooks with the same cells."""
  found = []
  for number, (old, new) in enumerate(zip(stored.cells, fresh.cells, strict=True)):
    if old.cell_type == "code":
      varies = "varies" in old.metadata.get("tags", ())
      texts, pictures = zip(*(_shown(cell) for cell in (old, new)), strict=True)
      if not same_text(*texts, varies=varies):
        found.append(f"cell {number} said\n{texts[0]}\nand says\n{texts[1]}")
      elif len(pictures[0]) != len(pictures[1]):
        found.append(f"cell {number} has another number of pictures")
      elif not varies and not all(map(same_picture, *pictures)):
        found.append(f"cell {number} shows another picture")
  return found


def _shown(cell: Any) -> tuple[str, list[str]]:
  """The text of a cell's outputs, and its pictures."""
  text, pictures = "", []
  for output in cell.outputs:
    data = output.get("data", {})
    text += output.get("text", data.get("text/plain", "")) + "\n"
    pictures += [data["image/png"]] if "image/png" in data else []
  return text, pictures


def same_text(old: str, new: str, varies: bool = False) -> bool:
  """Whether the words are the same and the numbers nearly so."""
  words = [" ".join(NUMBER.sub("#", text).split()) for text in (old, new)]
  if words[0] != words[1]:
    return False
  numbers = zip(*(NUMBER.findall(text) for text in (old, new)), strict=True)
  return varies or all(_near(*pair) for pair in numbers)


def _near(old: str, new: str) -> bool:
  mantissa, _, exponent = old.partition("e")
  last = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
  whole = last == 1  # a count, an axis: no rounding there
  return math.isclose(float(old), float(new), rel_tol=0 if whole else 1e-3,
                      abs_tol=0 if whole else 1.01 * last)


def same_picture(old: str, new: str) -> bool:
  """Whether two pictures look alike from afar, whatever drew their letters."""
  images = [Image.open(io.BytesIO(base64.b64decode(text))) for text in (old, new)]
  (width, height), (other_width, other_height) = (image.size for image in images)
  if max(abs(width / other_width - 1), abs(height / other_height - 1)) > 0.05:
    return False
  small = [np.asarray(image.convert("RGB").resize((48, 32)), float) for image in images]
  return bool(np.abs(small[0] - small[1]).mean() < 2.5)  # of 255


def write(name: str, notebook: Any) -> None:
  """The ``.ipynb`` of a pair."""
  nbformat.validate(notebook)
  nbformat.write(notebook, FOLDER / f"{name}.ipynb")


def put_requirement(name: str) -> None:
  """The one setting of where to install from, in a pair's ``.py``."""
  path = FOLDER / f"{name}.py"
  line = f'# %pip install -q "{REQUIREMENT}"'
  path.write_text(re.sub(r"^# %pip install .*$", line, path.read_text(), flags=re.M))


def check(name: str, notebook: Any) -> list[str]:
  """What is wrong with a pair whose code has run."""
  found = disagreements(name) or changed(of_notebook(name), notebook)
  if not found and (size := (FOLDER / f"{name}.ipynb").stat().st_size) > BYTES:
    found = [f"{size} bytes are more than {BYTES}"]
  return [f"{name}: {problem}" for problem in found]


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("names", nargs="*", metavar="name", help="pairs; default: all")
  parser.add_argument("--write", action="store_true", help="make the .ipynb anew")
  parser.add_argument("--anew", action="store_true", help="run what has run before")
  args = parser.parse_args()
  problems = []
  for name in args.names or names():
    try:
      if args.write:
        put_requirement(name)
      notebook = executed(name, args.anew)
      if args.write:
        write(name, notebook)
      problems += check(name, notebook)
    except (RuntimeError, nbclient.exceptions.CellExecutionError) as error:
      problems.append(f"{name}: {error}")
  print("\n".join(problems) or "All notebooks run and show what they did.")
  sys.exit(bool(problems))


if __name__ == "__main__":
  main()
