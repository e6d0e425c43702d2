"""Kills processes at random moments, and sees that the run loses nothing.

    python -m examples.multihost_kill --times 20

It runs the two processes of ``python -m examples.multihost`` to their end once. Then
it starts them again and again in another directory, each time kills one of them
(SIGKILL) at a random moment of the time that the first run took, and waits for the
other to end: it must, with an error, within the heartbeat's time and five seconds. At
last it lets the run come to its end, and compares the loss of every step with the
undisturbed run's. Where a run is done before its process is killed, the next one starts
afresh.
"""

import argparse
from collections.abc import Sequence
import json
import pathlib
import random
import sys
import time
from typing import Any

from examples import multihost_launch
from examples import options
from examples import records
from examples.multihost_launch import Processes

COUNT = 2


def parser() -> argparse.ArgumentParser:
  """The options."""
  parser = options.parser(__doc__)
  add = parser.add_argument
  count = options.number(int, 1)
  add("--times", type=count, default=20,
      help="number of processes to kill while they still run")
  add("--seed", type=int, default=0,
      help="seed; draws the moments, and which process is killed")
  add("--steps", type=count, default=200, help="number of steps of each run")
  add("--devices", type=count, default=4, help="number of devices of each process")
  add("--heartbeat", type=count, default=10,
      help="seconds of silence after which a process counts as dead")
  add("--directory", type=pathlib.Path, default=pathlib.Path("runs/multihost_kill"),
      help="folder for the runs and the record of the kills")
  return parser


def kill_one(
    processes: Processes, victim: int, moment: float, limit: float
) -> dict[str, Any]:
  """Kills a process of a run, and waits until the others have ended.

  Args:
    processes: those of the run, just started.
    victim: which is killed.
    moment: the seconds to wait before.
    limit: the seconds that the others have to end.

  Returns:
    What happened: ``done`` if all had ended well before, and otherwise ``seconds``
    from the kill to the last one's end and the ``statuses`` and ``account`` of all.
  """
  time.sleep(moment)
  killed = time.monotonic()
  processes.running[victim].kill()
  statuses = processes.wait(limit)
  return {
      "victim": victim,
      "moment": round(moment, 2),
      "done": not any(statuses),
      "seconds": round(time.monotonic() - killed, 2),
      "statuses": statuses,
      "overdue": sorted(processes.overdue),
      "account": processes.account(),
  }


def start(directory: pathlib.Path, given: Sequence[str], devices: int) -> Processes:
  """The processes of a run in that directory, from its last checkpoint on."""
  return Processes(
      [*given, "--directory", str(directory)], COUNT, devices, directory
  )


def finish(
    directory: pathlib.Path, given: Sequence[str], devices: int
) -> list[float]:
  """Lets a run come to its end, and returns the loss of each step."""
  processes = start(directory, given, devices)
  if any(processes.wait(60)):
    raise RuntimeError(processes.account())
  return json.loads((directory / "result.json").read_text())["losses"]


def saved_step(directory: pathlib.Path) -> int:
  """The last step of which there is a whole checkpoint."""
  names = (directory / "checkpoints").glob("*")
  return max((int(path.name) for path in names if path.name.isdigit()), default=0)


def main(arguments: Sequence[str] | None = None) -> int:
  """Kills, resumes, compares; returns 0 if all held."""
  args = parser().parse_args(arguments)
  limit = args.heartbeat + multihost_launch.GRACE_SECONDS
  random_number = random.Random(args.seed)
  root = args.directory / time.strftime("%Y%m%d-%H%M%S")
  common = ["--steps", str(args.steps), "--heartbeat", str(args.heartbeat)]
  started = time.monotonic()
  expected = finish(root / "alone", common, args.devices)
  duration = time.monotonic() - started
  print(f"undisturbed, the run takes {duration:.1f} s", flush=True)

  problems, runs = [], 0
  directory = root / "run-0"

  def compared() -> list[str]:
    ours = finish(directory, common, args.devices)
    difference = max(abs(a - b) for a, b in zip(ours, expected, strict=True))
    text = f"{directory}: losses differ by {difference:.1e} from the undisturbed run's"
    print(text, flush=True)
    return [] if difference <= 1e-6 else [text]

  kills = 0
  while kills < args.times:
    before = saved_step(directory)
    processes = start(directory, common, args.devices)
    try:
      victim = random_number.randrange(COUNT)
      moment = random_number.uniform(0, duration)
      record = kill_one(processes, victim, moment, limit)
    finally:
      processes.kill()
    record |= {"saved_before": before, "saved_after": saved_step(directory)}
    records.append(root / "kills.jsonl", record)
    kills += record["statuses"][victim] != 0
    print(f"{kills}: {line(record)}", flush=True)
    problems += [f"{kills}: {text}" for text in wrong(record, args.steps, limit)]
    if record["saved_after"] == args.steps:
      problems += compared()
      runs += 1
      directory = root / f"run-{runs}"
  problems += compared()
  print("\n".join(problems) or f"all held; {root}/kills.jsonl has the records")
  return 1 if problems else 0


def line(record: dict[str, Any]) -> str:
  """What happened, for the reader."""
  victim = record["victim"]
  if record["statuses"][victim] == 0:
    return f"not counted: process {victim} was done before {record['moment']} s"
  return (
      f"process {victim} killed after {record['moment']} s, saved steps:"
      f" {record['saved_before']} before, {record['saved_after']} now; the other"
      f" {multihost_launch.describe(record['statuses'][1 - victim])}, after"
      f" {record['seconds']} s"
  )


def wrong(record: dict[str, Any], steps: int, limit: float) -> list[str]:
  """What must not be in a record, in a run of so many steps."""
  problems = []
  if record["saved_after"] < record["saved_before"]:
    problems.append("saved steps were lost")
  if record["seconds"] > limit + 2:  # a busy machine is late with everything
    problems.append(f"the other took {record['seconds']} s to end, not {limit}")
  other = record["statuses"][1 - record["victim"]]
  if other == 0 and record["saved_after"] < steps:
    problems.append("the other ended as if all were well")
  return problems


if __name__ == "__main__":
  sys.exit(main())
