"""What the command lines of all examples share."""

import argparse
from collections.abc import Callable
import math
import pathlib
from typing import Any


class Formatter(
    argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
):
  """The description as it is written, and each option with its default."""


def parser(description: str | None) -> argparse.ArgumentParser:
  """A parser for a script with this docstring."""
  return argparse.ArgumentParser(description=description, formatter_class=Formatter)


def number(
    kind: Callable[[str], Any],
    least: float,
    most: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> Callable[[str], Any]:
  """A number for argparse, within bounds, which what it refuses is told.

  Args:
    kind: int or float.
    least: the lower bound.
    most: the upper bound.
    above: whether the lower bound itself is refused.
    below: whether the upper bound itself is refused.

  Returns:
    A function from the option's text to the number, for ``type=``.
  """

  def convert(text: str) -> Any:
    value = kind(text)
    inside = least < value if above else least <= value
    inside &= value < most if below else value <= most
    if not inside:
      bounds = f"{'above' if above else 'at least'} {least}"
      if not math.isinf(most):
        bounds += f" and {'below' if below else 'at most'} {most}"
      raise argparse.ArgumentTypeError(f"{text}: must be {bounds}")
    return value

  convert.__name__ = getattr(kind, "__name__", "number")
  return convert


def add_results(parser: Any, name: str, files: str) -> None:
  """The option for the output folder.

  Args:
    parser: a parser or a group of one.
    name: of the example; the default is ``runs/<name>``, which git ignores.
    files: what the folder gets, for the help.
  """
  parser.add_argument("--results", type=pathlib.Path, metavar="FOLDER",
                      default=pathlib.Path("runs") / name,
                      help=f"folder for {files}; made if it does not exist")


def distinct(values: list[Any]) -> list[Any]:
  """The values in their order, each once."""
  return list(dict.fromkeys(values))
