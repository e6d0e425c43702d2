"""Runs what is missing of a list of runs: ``python -m examples.paper.run PLAN``.

  python -m examples.paper.run small --data PATH --labels PATH --results results/paper
  python -m examples.paper.run cifar10 --data PATH --seeds 0 1 2 3 4

A plan is "small", which two cores do in half a day, or a table of the paper, with its
own settings. Each finished run is a line of its table's file at once; the same command
goes on with what is missing, and inside a run where its last checkpoint was made.
Started in several processes, it shares the runs among them: on a CPU one process for
each core does more than one for all.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import pathlib
import sys
import time
import traceback

import jax
import tyro

from examples.paper import configs
from examples.paper import loop
from examples.paper import plans
from examples.paper import results
from examples.paper import small
from examples.paper.config import Config
from examples.paper.config import ConfigError
from examples.paper.config import folder_of
from examples.paper.config import key_of
from examples.paper.config import Options

_POLL = 2.0  # seconds between two looks for a run that no other process is at


@dataclasses.dataclass(frozen=True)
class Arguments:
  plan: tyro.conf.Positional[str]
  """small, or a table: cifar10, cifar100, imagenet, iwslt14, noise, normalization,
  correlation."""
  data: pathlib.Path | None = None
  """Folder or archive of the images. CIFAR is downloaded where it is left out."""
  labels: pathlib.Path | None = None
  """Folder of CIFAR-10N's labels, a file for each set."""
  text: pathlib.Path | None = None
  """Folder of the parallel text."""
  results: pathlib.Path = pathlib.Path("runs/paper/results")
  """Folder of the tables' JSON lines."""
  seeds: tuple[int, ...] = (0, 1, 2)
  """Seeds of a table's runs; the small plan has its own."""
  only: str = ""
  """Only the rows whose name begins so."""
  minutes: float = 0.0
  """Start no run after so many minutes; 0: go on to the end."""
  pause_file: pathlib.Path | None = None
  """While this file exists, no step is started."""
  checkpoint_steps: int = 0
  """Steps between checkpoints, besides that after each epoch."""
  keep_checkpoints: bool = False
  """Whether the last checkpoints stay."""
  devices: int = 1
  """Devices that share each batch; 0: all that there are."""
  progress: bool = True
  """Whether to show a progress bar."""
  dry: bool = False
  """Only say what is missing."""


def plan_of(arguments: Arguments) -> list[plans.Entry]:
  """The rows of the plan."""
  tables = {config.table for config in configs.NAMED.values()} | {"correlation"}
  if arguments.plan == "small":
    entries = list(small.PLAN)
  elif arguments.plan in tables:
    entries = plans.of_table(arguments.plan, arguments.seeds)
  else:
    raise ConfigError(
        f"plan={arguments.plan!r}: unknown; take small or one of"
        f" {', '.join(sorted(tables))}."
    )
  return entries


def options_for(config: Config, arguments: Arguments) -> Options:
  """Where and how a run of the plan is done."""
  return Options(
      data=arguments.text if config.dataset == "parallel" else arguments.data,
      labels=arguments.labels,
      results=arguments.results,
      pause_file=arguments.pause_file,
      checkpoint_steps=arguments.checkpoint_steps,
      keep_checkpoints=arguments.keep_checkpoints,
      devices=arguments.devices,
      progress=arguments.progress,
  )


def main(argv: Sequence[str] | None = None) -> None:
  arguments = tyro.cli(
      Arguments, args=argv, prog="python -m examples.paper.run", description=__doc__,
      config=(tyro.conf.FlagConversionOff,),
  )
  try:
    plan = plan_of(arguments)
    failed = _run_all(plan, arguments)
  except (ConfigError, ValueError) as error:
    sys.exit(f"error: {error}")
  if failed:
    sys.exit(f"{len(failed)} runs failed; the same command tries them again.")


def _run_all(plan: list[plans.Entry], arguments: Arguments) -> frozenset[str]:
  start, failed = time.monotonic(), frozenset()
  while True:
    # Read anew each time: another process may have added runs.
    records = {r["key"]: r for r in results.read_all(arguments.results)}
    waiting = [
        config for config in plans.missing(plan, records, failed)
        if config.name.startswith(arguments.only)
    ]
    if arguments.dry:
      print("\n".join(f"{c.name}, seed {c.seed}" for c in waiting) or "all is done")
      return failed
    if not waiting:
      return failed
    if arguments.minutes and time.monotonic() - start > 60 * arguments.minutes:
      print(f"{len(waiting)} runs are left at least.")
      return failed
    with _first_free(waiting, arguments) as config:
      if config is None:
        time.sleep(_POLL)
      elif not _run_one(config, arguments):
        failed |= {key_of(config)}


@contextlib.contextmanager
def _first_free(
    waiting: Sequence[Config], arguments: Arguments
) -> Iterator[Config | None]:
  """The first run that no other process is at, held; None: each has one."""
  with contextlib.ExitStack() as held:
    for config in waiting:
      folder = folder_of(config, options_for(config, arguments))
      if held.enter_context(results.locked(folder, wait=False)):
        # Another process may have done it since the records were read.
        path = results.path_of(arguments.results, config.table)
        if key_of(config) not in {r["key"] for r in results.read(path)}:
          yield config
          return
    yield None


def _run_one(config: Config, arguments: Arguments) -> bool:
  """Whether the run came to its end."""
  options = options_for(config, arguments)
  try:
    record = loop.run(config, options).record
  except Exception as error:
    print(f"{config.name}, seed {config.seed}: {error!r}", file=sys.stderr)
    if not isinstance(error, ConfigError):
      traceback.print_exc()
    return False
  finally:
    jax.clear_caches()  # the programs of one run are of no use to the next
  print(f"{config.name}, seed {config.seed}: {results.summary(record)}", flush=True)
  return True


if __name__ == "__main__":
  main()
