"""Kills training at random moments: the end is that of a run left alone, bit for bit.

  python -m tests.paper.kill_test --kills 20

Not a part of the suite, which has one kill; see test_resume.py.
"""

import argparse
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


def finish(folder: pathlib.Path) -> str:
  """Trains to the end; the digest of the parameters."""
  process = start(folder)
  if process.wait() != 0:
    raise RuntimeError(f"training in {folder} failed")
  return digest(folder)


def digest(folder: pathlib.Path) -> str:
  """The digest of the parameters of the run that ended in this folder."""
  (path,) = (folder / "results").glob("*.jsonl")
  return json.loads(path.read_text(encoding="utf-8"))["digest"]


def kill_again_and_again(kills: int, seed: int) -> int:
  """How many runs came to their end meanwhile; raises if one came to another end."""
  rng = random.Random(seed)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    begun = time.monotonic()
    expected = finish(folder / "alone")
    whole = time.monotonic() - begun
    ended, killed, here = 0, 0, folder / "killed"
    while killed < kills:
      process = start(here)
      try:
        process.wait(rng.uniform(0.3, 1.1) * whole)
      except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
        print(f"kill {killed}", flush=True)
        continue
      _compare(process.returncode, here, expected)
      ended += 1
      shutil.rmtree(here)
    if finish(here) != expected:
      raise AssertionError("the run that was killed has other parameters")
  return ended + 1


def _compare(code: int, folder: pathlib.Path, expected: str) -> None:
  if code != 0:
    raise RuntimeError(f"training failed with {code} after a kill")
  if digest(folder) != expected:
    raise AssertionError("the run that was killed has other parameters")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--kills", type=int, default=20, help="how many")
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  args = parser.parse_args()
  ended = kill_again_and_again(args.kills, args.seed)
  print(f"{args.kills} kills, {ended} runs to the end: the same parameters,"
        " bit for bit.")


if __name__ == "__main__":
  main()
