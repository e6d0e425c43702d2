"""The command line: the name of a configuration, and fields to change."""

from collections.abc import Sequence
import dataclasses
import sys
from typing import Any

import tyro

from examples.paper import configs
from examples.paper.config import Config
from examples.paper.config import ConfigError
from examples.paper.config import Options


@dataclasses.dataclass(frozen=True)
class _Arguments:
  config: Config
  options: Options = dataclasses.field(default_factory=Options)


def listing() -> str:
  """The names of all configurations, a table a paragraph."""
  tables: dict[str, list[str]] = {}
  for name, config in configs.NAMED.items():
    tables.setdefault(config.table, []).append(name)
  return "\n".join(
      f"{table}:\n  " + "\n  ".join(names) for table, names in tables.items()
  )


def named(name: str) -> Config:
  """The configuration of this name; raises ConfigError with close ones."""
  if name in configs.NAMED:
    return configs.NAMED[name]
  close = [other for other in configs.NAMED if set(name.split("-")) & set(
      other.split("-"))]
  raise ConfigError(
      f"{name!r} is no configuration; there are {', '.join(close or configs.NAMED)}."
  )


def parse(argv: Sequence[str] | None, prog: str) -> tuple[Config, Options]:
  """The configuration and the options of a command line.

  Raises:
    ConfigError: for an unknown configuration.
    SystemExit: for ``--help`` and for fields that can't be read.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  if not argv or argv[0] in ("-h", "--help"):
    print(f"usage: {prog} CONFIGURATION [--field VALUE ...]\n")
    print(f"{prog} CONFIGURATION --help explains every field.\n\n{listing()}")
    raise SystemExit(0)
  config = named(argv[0])
  arguments: Any = tyro.cli(
      _Arguments,
      prog=f"{prog} {argv[0]}",
      description=f"Trains {argv[0]}.",
      args=argv[1:],
      default=_Arguments(config),
      config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
  )
  return arguments.config, arguments.options
