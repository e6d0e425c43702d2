"""The finished runs, as JSON lines: one file a table, one line a run."""

from collections.abc import Iterator
import contextlib
import math
import pathlib
from typing import Any

from examples import records as rows
from examples.paper.config import from_json
from examples.paper.config import key_of

try:
  import fcntl
except ImportError:  # no locks on this system: one process at a time, then
  fcntl = None


def path_of(folder: pathlib.Path, table: str) -> pathlib.Path:
  return folder / f"{table}.jsonl"


def measures_path(folder: pathlib.Path) -> pathlib.Path:
  """What ``examples.paper.correlation`` measured of the networks of its table."""
  return folder / "correlation_measures.json"


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The runs of a table; none where there is no file.

  The key is made anew from the configuration, in which fields that came later have
  their defaults.

  Raises:
    ValueError: for a line that is no run, with its number.
  """
  found = rows.read(path)
  for number, record in enumerate(found, start=1):
    try:
      record["key"] = key_of(from_json(record["config"]))
      record["history"][-1]["epoch"]
    except (ValueError, LookupError, TypeError) as error:
      raise ValueError(f"{path}, line {number}: not a run: {error!r}") from error
  return found


def read_all(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The runs of all tables in a folder."""
  return [r for path in sorted(folder.glob("*.jsonl")) for r in read(path)]


def add(path: pathlib.Path, record: dict[str, Any]) -> None:
  """Adds a run, in place of an earlier one of the same configuration."""
  with locked(path):
    others = [r for r in read(path) if r["key"] != record["key"]]
    rows.write(path, [*others, record])


def accuracy(record: dict[str, Any], best: bool = False) -> float:
  """Accuracy of the last epoch, or of the best that was looked at, in [0, 1]."""
  seen = [line["accuracy"] for line in record["history"] if "accuracy" in line]
  return max(seen) if best else seen[-1]


def score(record: dict[str, Any]) -> float:
  """What radii are chosen by, larger is better: BLEU of translators, else accuracy."""
  return record["history"][-1].get("bleu", accuracy(record))


def rank(record: dict[str, Any]) -> tuple[float, float]:
  """What decides between two radii: the score, and of equal ones the lower loss."""
  loss = record["history"][-1]["loss"]
  return score(record), -math.inf if math.isnan(loss) else -loss


def summary(record: dict[str, Any]) -> str:
  """A run in a few words."""
  last = record["history"][-1]
  words = [f"accuracy {100 * accuracy(record):.2f} %"]
  if "bleu" in last:
    words.append(f"BLEU {last['bleu']:.2f}")
  if record.get("diverged"):
    words.append("diverged")
  return ", ".join([*words, f"{record['seconds']:.0f} s of training"])


@contextlib.contextmanager
def locked(path: pathlib.Path, wait: bool = True) -> Iterator[bool]:
  """Holds what stands for the path, against other processes; whether it does.

  It does not if another process holds it and this one is not to wait.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  if fcntl is None:
    yield True
    return
  with open(path.with_name(f".{path.name}.lock"), "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      yield False
      return
    yield True
