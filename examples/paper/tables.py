"""Tables, pictures and page of results: ``python -m examples.paper.tables``.

  python -m examples.paper.tables --results results/paper --page docs/results.md
      --pictures results/paper

Everything is made from the JSON lines of the finished runs; nothing is trained.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import sys
from typing import Any

import tyro

from examples import records as rows
from examples.paper import groups
from examples.paper import page
from examples.paper import pictures
from examples.paper import results
from examples.paper import small


@dataclasses.dataclass(frozen=True)
class Arguments:
  results: pathlib.Path = pathlib.Path("runs/paper/results")
  """Folder of the JSON lines."""
  page: pathlib.Path = pathlib.Path("runs/paper/results.md")
  """The page, in Markdown."""
  pictures: pathlib.Path = pathlib.Path("runs/paper/pictures")
  """Folder of the pictures."""


def read(folder: pathlib.Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """(the finished runs, at the radii of the plan; what the correlation measured)."""
  records = groups.of_plan(results.read_all(folder), small.PLAN)
  return records, rows.read(results.measures_path(folder))


def main(argv: Sequence[str] | None = None) -> None:
  arguments = tyro.cli(
      Arguments, args=argv, prog="python -m examples.paper.tables",
      description=__doc__,
  )
  try:
    records, measured = read(arguments.results)
  except ValueError as error:
    sys.exit(f"error: {error}")
  if not records:
    sys.exit(
        f"error: no runs in {arguments.results}; train first, with python -m"
        " examples.paper.run."
    )
  drawn = pictures.draw_all(records, arguments.pictures)
  text = page.page(records, drawn, arguments.page.parent, measured)
  rows.replace(arguments.page, text)
  print(f"{len(records)} runs; {arguments.page}, {len(drawn)} pictures")


if __name__ == "__main__":
  main()
