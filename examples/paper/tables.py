"""Tables, pictures and page of results: ``python -m examples.paper.tables``.

  python -m examples.paper.tables --results results/paper --page docs/results.md
      --pictures results/paper

Everything is made from the JSON lines of the finished runs; nothing is trained.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import sys

import tyro

from examples import records as rows
from examples.paper import page
from examples.paper import pictures
from examples.paper import results


@dataclasses.dataclass(frozen=True)
class Arguments:
  results: pathlib.Path = pathlib.Path("runs/paper/results")
  """Folder of the JSON lines."""
  page: pathlib.Path = pathlib.Path("runs/paper/results.md")
  """The page, in Markdown."""
  pictures: pathlib.Path = pathlib.Path("runs/paper/pictures")
  """Folder of the pictures."""


def main(argv: Sequence[str] | None = None) -> None:
  arguments = tyro.cli(
      Arguments, args=argv, prog="python -m examples.paper.tables",
      description=__doc__,
  )
  try:
    records = results.read_all(arguments.results)
  except ValueError as error:
    sys.exit(f"error: {error}")
  if not records:
    sys.exit(
        f"error: no runs in {arguments.results}; train first, with python -m"
        " examples.paper.run."
    )
  drawn = pictures.draw_all(records, arguments.pictures)
  rows.replace(arguments.page, page.page(records, drawn, arguments.page.parent))
  print(f"{len(records)} runs; {arguments.page}, {len(drawn)} pictures")


if __name__ == "__main__":
  main()
