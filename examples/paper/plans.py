"""Lists of runs, in the order of their value, and which of them is next."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from typing import Any

from examples.paper import configs
from examples.paper import results
from examples.paper.config import Config
from examples.paper.config import key_of

replace = dataclasses.replace


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Radii to choose from on a validation split, with the first seed.

  If the best is at an end of those that were tried, the next one beyond is tried too,
  twice or half as large, ``extensions`` times at most. Of equal scores the one with
  the lower loss is the best. Its runs take ``share`` of the epochs, on a schedule of
  their own.
  """

  radii: tuple[float, ...]
  validation: int = 5000
  extensions: int = 1
  share: float = 1.0

  def run(self, config: Config, rho: float) -> Config:
    """The run that judges a radius, without a look at the test set."""
    epochs = max(1, round(self.share * config.epochs))
    return replace(
        config, name=f"{config.name}-sweep-{rho:g}", rho=rho, epochs=epochs,
        eval_every=epochs, validation=self.validation,
    )


@dataclasses.dataclass(frozen=True)
class Entry:
  """A row of a table.

  Attributes:
    config: the run, but for seed and radius.
    seeds: the seeds of the runs that count.
    sweep: radii to choose from; None: the radius of the configuration.
    like: the name of an earlier entry whose chosen radius is taken.
  """

  config: Config
  seeds: tuple[int, ...] = (0, 1, 2)
  sweep: Sweep | None = None
  like: str = ""


_Records = Mapping[str, dict[str, Any]]


def sweep_state(
    entry: Entry, records: _Records, failed: frozenset[str]
) -> tuple[float | None, list[Config]]:
  """(the radius chosen so far, the runs that are missing for the choice)."""
  sweep, first = entry.sweep, replace(entry.config, seed=entry.seeds[0])
  assert sweep is not None
  radii = sorted(sweep.radii)
  for extension in range(sweep.extensions + 1):
    runs = {rho: sweep.run(first, rho) for rho in radii}
    missing = [c for c in runs.values() if key_of(c) not in {*records, *failed}]
    if missing:
      return None, missing
    scores = {
        rho: results.rank(records[key_of(c)])
        for rho, c in runs.items() if key_of(c) in records
    }
    if not scores:
      return None, []
    best = max(scores, key=lambda rho: scores[rho])
    inside = radii[0] < best < radii[-1]
    if inside or len(radii) < 2 or extension == sweep.extensions:
      return best, []
    radii = sorted([*radii, best / 2 if best == radii[0] else best * 2])
  raise AssertionError("the last extension returns")


def chosen(
    plan: Sequence[Entry], entry: Entry, records: _Records,
    failed: frozenset[str] = frozenset(),
) -> float | None:
  """The radius of an entry, or None while it is not known."""
  if entry.like:
    others = [other for other in plan if other.config.name == entry.like]
    if not others:
      raise ValueError(f"{entry.config.name} is like {entry.like}, which is not there.")
    return chosen(plan, others[0], records, failed)
  if entry.sweep is None:
    return entry.config.rho
  return sweep_state(entry, records, failed)[0]


def missing(
    plan: Sequence[Entry], records: _Records, failed: frozenset[str] = frozenset()
) -> Iterator[Config]:
  """The runs that can be done now and are not, in order.

  A row whose radius is not known yet gives its sweep first; the runs that count follow
  when that is done.

  Args:
    plan: the rows.
    records: the finished runs by their key.
    failed: keys of runs that are not to be tried again.
  """
  for entry in plan:
    if entry.sweep is not None:
      yield from sweep_state(entry, records, failed)[1]
    rho = chosen(plan, entry, records, failed)
    if rho is None:
      continue
    for seed in entry.seeds:
      config = replace(entry.config, seed=seed, rho=rho)
      if key_of(config) not in {*records, *failed}:
        yield config


def of_table(table: str, seeds: Sequence[int]) -> list[Entry]:
  """The paper's own table, with the paper's radii."""
  rows = configs.correlation() if table == "correlation" else (
      c for c in configs.NAMED.values() if c.table == table
  )
  return [Entry(config, tuple(seeds)) for config in rows]
