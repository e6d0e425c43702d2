"""Every page of the site: its code runs, its commands and its links lead somewhere."""

import ast
from pathlib import Path
import re

import pytest

from tests import pages
from tools import home

DOCS = pages.ROOT / "docs"
PAGES = sorted(
    p for p in DOCS.rglob("*.md")
    if not {"notebooks", "_ext"} & set(p.relative_to(DOCS).parts)
)
OTHERS = [pages.ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
IDS = [p.relative_to(pages.ROOT).as_posix() for p in PAGES + OTHERS]
# Run by the tests that compare what they give.
RUN_ELSEWHERE = {
    path.stem.removeprefix("test_").removesuffix("_page")
    for path in (pages.ROOT / "tests").glob("test_*_page.py")
} | {"README"}
TEXT = {"text", "", "bibtex", "bash", "sh", "python", "diff", "yaml", "toml"}
NEEDS = {
    "measuring_sharpness": ("jaxtyping", "sharpness"),
}


def read(path):
  return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PAGES + OTHERS, ids=IDS)
def test_code(path):
  text = read(path)
  for block in pages.blocks(text):
    directive = re.fullmatch(r"\{([\w-]+)\}(.*)", block.language)
    if directive is None:
      assert block.language in TEXT, f"nothing checks a block of {block.language!r}"
    elif directive[1] in ("literalinclude", "include"):
      assert (path.parent / directive[2].strip()).exists(), block.language
      _starts_with_imports(path, directive[2].strip(), block.code)
    elif directive[1] == "code-block":  # of another framework: it need only be Python
      assert directive[2].strip() == "python"
      ast.parse(re.sub(r"^:.*\n", "", block.code, flags=re.MULTILINE))
    else:
      assert directive[1] in ("eval-rst", "toctree"), block.language
  if path.stem in RUN_ELSEWHERE:
    return
  if path.stem in NEEDS:
    module, extra = NEEDS[path.stem]
    pytest.importorskip(module, reason=f"the page needs the extra {extra!r}")
  pages.run(text, path.name)


def _starts_with_imports(path, target, options):
  """What is left out above is the file's docstring, and no more."""
  first = re.search(r"^:lines: (\d+)-$", options, re.MULTILINE)
  if first is not None:
    lines = read(path.parent / target).splitlines()
    start = int(first[1]) - 1
    assert lines[start].startswith(("import ", "from "))
    assert not any(line.startswith(("import ", "from ")) for line in lines[:start])


@pytest.mark.parametrize("path", PAGES + OTHERS, ids=IDS)
def test_commands_run_what_is_there(path):
  for module in pages.modules(read(path)):
    assert module in ("venv", "pip", "pytest") or pages.exists(module), module


@pytest.mark.parametrize("path", PAGES + OTHERS, ids=IDS)
def test_links(path):
  text = read(path)
  for link in pages.links(text):
    target, _, anchor = link.partition("#")
    goal = path.parent / target if target else path
    assert goal.exists(), link
    if anchor and goal.suffix == ".md":
      assert anchor in pages.anchors(read(goal)), link


def test_every_page_is_in_a_table_of_contents():
  shown = set()
  for page in PAGES:
    for block in pages.blocks(read(page)):
      if block.language == "{toctree}":
        lines = [x for x in block.code.splitlines() if x and not x.startswith(":")]
        for line in lines:
          found = list(page.parent.glob(line + ".md"))
          assert found or "*" in line, line
          shown |= {p.resolve() for p in found}
  assert {p.resolve() for p in PAGES} - shown == {(DOCS / "index.md").resolve()}


def test_no_page_has_an_invented_address():
  home = Path(pages.ROOT / "setup.cfg").read_text()
  if "\nurl = " in home:
    return
  for page in PAGES + OTHERS:
    assert not re.search(r"(github|gitlab)\.com/[\w-]+/asam_jax", read(page)), page


def test_the_address_is_one_setting(tmp_path, monkeypatch):
  monkeypatch.setattr(home, "ROOT", tmp_path)
  settings = tmp_path / "setup.cfg"
  settings.write_text("[metadata]\nname = asam_jax\n# url = https://...\n")
  assert home.url() == ""
  assert home.requirement("nnx") == "asam_jax[nnx]"
  settings.write_text("[metadata]\nurl = https://example.org/asam_jax/\n")
  assert home.url() == "https://example.org/asam_jax"
  assert home.requirement("nnx") == "asam_jax[nnx] @ git+https://example.org/asam_jax"
