"""What Markdown pages hold: their blocks of code, and their links."""

import doctest
import importlib.util
from pathlib import Path
import re
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
_FENCE = re.compile(
    r"^(?P<fence>`{3,})(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=fence)\s*$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
  """One block of code; ``language`` is what stands behind the fence."""

  language: str
  code: str


def blocks(text: str, language: str | None = None) -> list[Block]:
  found = [
      Block(match["language"].strip(), match["code"]) for match in _FENCE.finditer(text)
  ]
  return [b for b in found if language is None or b.language == language]


def prose(text: str) -> str:
  """The page without its blocks."""
  return _FENCE.sub("", text)


def patched(code: str, diff: str) -> str:
  """The code with a diff applied: additions alone are imports, and go on top."""
  removed, added = [], []
  for line in [*diff.splitlines(), " "]:
    if line.startswith("-"):
      removed.append(line[1:])
    elif line.startswith("+"):
      added.append(line[1:])
    elif removed:
      old, new = "\n".join(removed), "\n".join(added)
      assert code.count(old) == 1, f"the diff does not fit: {old!r}"
      code, removed, added = code.replace(old, new), [], []
    elif added:
      assert all(text.startswith("import ") for text in added)
      code, added = "\n".join([*added, code]), []
  return code


def run(text: str, name: str) -> dict:
  """Runs a page from top to bottom, and gives the names that it leaves.

  A diff is applied to the last Python block above it, and the result is run; the
  sessions (``>>>``) are compared with what they print.
  """
  scope: dict = {}
  last = None
  for number, (language, code) in enumerate(blocks(text)):
    where = f"{name}, block {number}"
    if language == "python" and ">>>" in code:
      _session(code, where)
    elif language == "python":
      exec(compile(code, where, "exec"), scope)
      last = code
    elif language == "diff" and last is not None:
      exec(compile(patched(last, code), where, "exec"), scope)
  return scope


def _session(code: str, where: str) -> None:
  test = doctest.DocTestParser().get_doctest(code, {}, where, where, 0)
  assert doctest.DocTestRunner().run(test).failed == 0, where


def modules(text: str) -> list[str]:
  """What the page's commands run by ``python -m``, within quotes too."""
  code = "".join(b.code for language in ("sh", "bash") for b in blocks(text, language))
  return re.findall(r"python[\d.]*\s+-m\s+([\w.]+)", code)


def exists(module: str) -> bool:
  return importlib.util.find_spec(module) is not None


def links(text: str) -> list[str]:
  """The targets of the page's links and pictures, but those to the web."""
  found = re.findall(r"\]\(([^)\s]+)\)", prose(text))
  return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(text: str) -> set[str]:
  """The headings' names in addresses, as code hosts and MyST make them."""
  titles = re.findall(r"^#+ +(.+?)\s*$", prose(text), re.MULTILINE)
  plain = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
  return {title.strip().replace(" ", "-") for title in plain}
