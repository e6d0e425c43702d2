"""The notebooks: pairs that agree, fit for readers elsewhere; and the tool for them.

``tools/notebooks.py`` runs them all; here nothing of theirs is run.
"""

import ast
import base64
import io
import re
import sys

import pytest

for package in ("jupytext", "nbclient", "ipykernel", "PIL", "matplotlib"):
  pytest.importorskip(package, reason="the notebooks need the extra 'notebooks'")

import nbclient.exceptions  # noqa: E402
import nbformat  # noqa: E402
from PIL import Image  # noqa: E402

from examples import style  # noqa: E402
from tools import notebooks  # noqa: E402

NAMES = notebooks.names()
# What a notebook may import: what its first cell installs, and what comes with Python.
INSTALLED = {"asam_jax", "flax", "jax", "matplotlib", "numpy", "optax", "orbax",
             "scipy", "sklearn"}
each = pytest.mark.parametrize("name", NAMES)


def code(name):
  cells = [c for c in notebooks.of_notebook(name).cells if c.cell_type == "code"]
  return cells[0], cells[1:]


def texts(name):
  """All that is read: sources and the words of outputs, not the pictures."""
  for cell in notebooks.of_notebook(name).cells:
    yield cell.source
    for output in cell.get("outputs", []):
      yield output.get("text", "") + output.get("data", {}).get("text/plain", "")


def parsed(name):
  return ast.parse("\n".join(cell.source for cell in code(name)[1]))


def test_each_has_its_pair():
  assert {path.stem for path in notebooks.FOLDER.glob("*.ipynb")} == set(NAMES)
  assert [name.split("_")[0] for name in NAMES] == sorted({n[0] for n in NAMES})


@each
def test_pair_agrees(name):
  assert notebooks.disagreements(name) == []


@each
def test_is_small(name):
  assert (notebooks.FOLDER / f"{name}.ipynb").stat().st_size <= notebooks.BYTES


@each
def test_installs_first(name):
  notebook = notebooks.of_notebook(name)
  assert notebook.cells[0].source.startswith("# ")  # a title
  first, rest = code(name)
  lines = [x for x in first.source.splitlines() if not x.startswith("# ")]
  assert lines == [f'%pip install -q "{notebooks.REQUIREMENT}"']
  assert first.metadata.tags == ["skip-execution"]
  assert not first.outputs
  assert not any("%pip" in cell.source for cell in rest)


@each
def test_has_run_in_order_without_errors(name):
  _, cells = code(name)
  assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
  kinds = {o.output_type for cell in cells for o in cell.outputs}
  assert kinds <= {"stream", "display_data", "execute_result"}
  assert {o.name for c in cells for o in c.outputs if o.output_type == "stream"} <= {
      "stdout"}


@each
def test_shows_no_machine_and_no_timing(name):
  for text in texts(name):
    assert not re.search(r"/(home|root|tmp|work|Users|usr|var|opt)/", text), text
    assert not re.search(r"\d ?(ms|s|sec|seconds|minutes)\b", text), text


@each
def test_needs_what_it_installs_and_no_more(name):
  for node in ast.walk(parsed(name)):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    for full in names:
      top, *rest = full.split(".")
      assert top in INSTALLED or top in sys.stdlib_module_names, full
      assert not (top == "asam_jax" and any(x.startswith("_") for x in rest)), full


@each
def test_one_colour_per_method(name):
  """The colours of all the project's pictures."""
  known = {look.label: look.color for look in style.METHODS.values()}
  (colors,) = [
      ast.literal_eval(node.value)
      for node in ast.walk(parsed(name))
      if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COLORS"
  ]
  assert colors
  assert colors == {label: known[label] for label in colors}


@each
def test_every_picture_has_its_axes_named(name):
  drawing = [c.source for c in code(name)[1] if "plt.show()" in c.source]
  assert drawing
  for source in drawing:
    named = "xlabel" in source and "ylabel" in source
    assert named or "landscape.plot_" in source or 'axis("off")' in source, source


def notebook_of(*sources):
  cells = [nbformat.v4.new_code_cell(source) for source in sources]
  return nbformat.v4.new_notebook(cells=cells)


def test_a_run_keeps_outputs_and_fails_on_a_warning():
  result, seconds = notebooks.run(notebook_of("print('a')", "print(1 + 1)"))
  assert [c.outputs[0].text for c in result.cells] == ["a\n", "2\n"]
  assert [c.execution_count for c in result.cells] == [1, 2]
  assert seconds > 0
  warning = "import warnings\nwarnings.warn('this one')"
  with pytest.raises(nbclient.exceptions.CellExecutionError, match="this one"):
    notebooks.run(notebook_of(warning))


def test_standard_error_is_a_complaint():
  notebook = notebook_of("1", "2")
  cells = notebook.cells
  cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text="fine")]
  assert notebooks.complaints(notebook) == []
  cells[1].outputs = [nbformat.v4.new_output("stream", name="stderr", text="look out")]
  assert notebooks.complaints(notebook) == ["look out"]


def test_text_is_compared_to_the_last_digit_but_one():
  same = notebooks.same_text
  assert same("loss 0.123, 5 steps", "loss  0.124, 5 steps")
  assert not same("loss 0.123", "loss 0.126")
  assert not same("5 steps", "6 steps")
  assert not same("loss 0.123", "rise 0.123")
  assert same("at 1.23e-05", "at 1.24e-05")
  assert not same("at 1.23e-05", "at 1.23e-04")
  assert same("94.2 %", "88.0 %", varies=True)
  assert not same("94.2 %", "94.2 % 1", varies=True)
  assert not same("94.2 %", "nan %", varies=True)


def picture(color, size=(300, 200)):
  buffer = io.BytesIO()
  image = Image.new("RGB", size, "white")
  image.paste(color, (60, 50, 240, 150))
  image.save(buffer, "png")
  return base64.b64encode(buffer.getvalue()).decode()


def test_pictures_are_compared_from_afar():
  assert notebooks.same_picture(picture("red"), picture("red", (304, 201)))
  assert not notebooks.same_picture(picture("red"), picture("blue"))
  assert not notebooks.same_picture(picture("red"), picture("red", (400, 200)))
  assert notebooks.same_picture(picture("red"), notebooks.smaller(picture("red")))


def test_changed_outputs_are_told():
  def said(text, tags=()):
    notebook = notebook_of("f()")
    notebook.cells[0].outputs = [
        nbformat.v4.new_output("stream", name="stdout", text=text)]
    notebook.cells[0].metadata["tags"] = list(tags)
    return notebook

  assert notebooks.changed(said("1.50"), said("1.50")) == []
  assert len(notebooks.changed(said("1.50"), said("1.60"))) == 1
  assert notebooks.changed(said("1.50", ["varies"]), said("1.60")) == []


def test_digest_follows_the_pair_the_package_and_the_versions(monkeypatch, tmp_path):
  pair, module = tmp_path / "examples/notebooks/a.py", tmp_path / "asam_jax/b.py"
  for path in (pair, module):
    path.parent.mkdir(parents=True)
    path.write_text("1")
  monkeypatch.setattr(notebooks, "ROOT", tmp_path)
  monkeypatch.setattr(notebooks, "FOLDER", pair.parent)
  digests = [notebooks.digest("a"), notebooks.digest("a")]
  pair.write_text("2")
  digests.append(notebooks.digest("a"))
  module.write_text("2")
  digests.append(notebooks.digest("a"))
  monkeypatch.setattr(notebooks, "AROUND", ("pytest",))
  digests.append(notebooks.digest("a"))
  assert digests[0] == digests[1]
  assert len(set(digests)) == 4
