"""Trains one configuration: ``python -m examples.paper.train CONFIGURATION``.

  python -m examples.paper.train cifar10-resnet20-asam --data PATH --seed 1

The line of the results is printed and added to its table, see ``--results``. A run
that was stopped, in whatever way, goes on where its last checkpoint was made; its last
parameters are those of a run that was never stopped, bit for bit.
"""

from collections.abc import Sequence
import sys

from examples.paper import cli
from examples.paper import loop
from examples.paper import results
from examples.paper.config import ConfigError


def main(argv: Sequence[str] | None = None) -> None:
  try:
    config, options = cli.parse(argv, "python -m examples.paper.train")
    record = loop.run(config, options).record
  except ConfigError as error:
    sys.exit(f"error: {error}")
  path = results.path_of(options.results, config.table)
  print(f"{config.name}, seed {config.seed}: {results.summary(record)}; {path}")


if __name__ == "__main__":
  main()
