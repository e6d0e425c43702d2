"""Kills training at random moments: the end is that of a run left alone, bit for bit.

  python -m tests.paper.kill_test --kills 20

Most of a short run is import and compilation. So the time to a kill is counted from the
first checkpoint that a process makes, and drawn from the time that training takes from
there on; a process that ends before is not counted. Not a part of the suite, which has
one kill; see test_resume.py.
"""

from collections.abc import Sequence
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from examples import options
from examples import records
from examples.multihost_kill import saved_step

ROOT = pathlib.Path(__file__).parents[2]
FIELDS = (
    "fake", "--epochs", "4", "--batch-size", "16", "--examples", "128",
    "--method", "asam", "--rho", "0.5", "--checkpoint-steps", "3",
)


def arguments(folder: pathlib.Path) -> list[str]:
  """The command line of the training in this folder."""
  return [
      *FIELDS, "--folder", str(folder / "run"), "--results", str(folder / "results"),
      "--progress", "False",
  ]


def start(folder: pathlib.Path) -> subprocess.Popen:
  """A process that trains, or goes on to train, in this folder."""
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  return subprocess.Popen(
      [sys.executable, "-m", "examples.paper.train", *arguments(folder)],
      cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
  )


def finish(folder: pathlib.Path) -> tuple[str, float]:
  """Trains to the end: the parameters' digest, seconds from the first checkpoint on."""
  process = start(folder)
  wait_for_checkpoint(process, folder)
  begun = time.monotonic()
  if process.wait() != 0:
    raise RuntimeError(f"training in {folder} failed")
  return digest(folder), time.monotonic() - begun


def wait_for_checkpoint(process: subprocess.Popen, folder: pathlib.Path) -> None:
  """Until the process has made a checkpoint, and so a step, or has ended."""
  before = saved_step(folder / "run")
  while process.poll() is None and saved_step(folder / "run") == before:
    time.sleep(0.01)


def digest(folder: pathlib.Path) -> str:
  """The digest of the parameters of the run that ended in this folder."""
  (path,) = (folder / "results").glob("*.jsonl")
  return json.loads(path.read_text(encoding="utf-8"))["digest"]


def kill_one(folder: pathlib.Path, moment: float) -> dict[str, Any]:
  """Kills a process so many seconds after its first checkpoint.

  Returns:
    What happened: whether it was ``killed`` before its end, the steps of the newest
    checkpoints before and after, and whether the run is ``recorded``, so that its
    checkpoints may be gone.
  """
  before = saved_step(folder / "run")
  process = start(folder)
  wait_for_checkpoint(process, folder)
  try:
    code = process.wait(moment)
  except subprocess.TimeoutExpired:
    process.send_signal(signal.SIGKILL)
    code = process.wait()
  if code not in (0, -signal.SIGKILL):
    raise RuntimeError(f"training failed with {code} after a kill")
  return {
      "killed": code != 0,
      "seconds": round(moment, 3),
      "saved_before": before,
      "saved_after": saved_step(folder / "run"),
      "recorded": any((folder / "results").glob("*.jsonl")),
  }


def kill_again_and_again(kills: int, seed: int, log: pathlib.Path) -> int:
  """How many runs came to their end meanwhile; raises if one came to another end."""
  rng = random.Random(seed)
  with tempfile.TemporaryDirectory() as name:
    expected, seconds = finish(pathlib.Path(name) / "alone")
    print(f"undisturbed, {seconds:.1f} s from the first checkpoint on", flush=True)
    ended, lines, here = 0, [], pathlib.Path(name) / "killed"
    while len(lines) < kills:
      line = kill_one(here, rng.uniform(0, seconds))
      if line["killed"]:
        lines.append(line)
        records.write(log, lines)
        print(f"kill {len(lines)}: {line}", flush=True)
      if line["recorded"]:
        _compare(digest(here), expected)
        ended += 1
        shutil.rmtree(here)
    _compare(finish(here)[0], expected)
  return ended + 1


def _compare(found: str, expected: str) -> None:
  if found != expected:
    raise AssertionError("the run that was killed has other parameters")


def main(argv: Sequence[str] | None = None) -> None:
  parser = options.parser(__doc__)
  add = parser.add_argument
  add("--kills", type=options.number(int, 1), default=20, help="how many")
  add("--seed", type=int, default=0, help="draws the moments")
  add("--log", type=pathlib.Path, default=pathlib.Path("runs/kill_test.jsonl"),
      help="file for a line of each kill; an older one is replaced")
  args = parser.parse_args(argv)
  ended = kill_again_and_again(args.kills, args.seed, args.log)
  print(f"{args.kills} kills, {ended} runs to the end: the same parameters,"
        " bit for bit.")


if __name__ == "__main__":
  main()
