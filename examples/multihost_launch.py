"""Starts the processes of one program on this machine, and ends them together."""

from collections.abc import Sequence
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

# What the others have, beyond the heartbeat's time, to say their error themselves.
GRACE_SECONDS = 5
POLL_SECONDS = 0.1
LINES = 8
# JAX's own log has E or F and the date; Python's errors say so.
_ERROR = re.compile(r"^[EF]\d{4} |Error\b|\berror:")


class Processes:
  """The processes of ``examples.multihost``, with a log for each.

  Attributes:
    directory: where the logs are, ``process-0.log`` and so on.
    running: the processes.
    overdue: those that were killed because they did not end when another failed.
  """

  def __init__(
      self, arguments: Sequence[str], count: int, devices: int, directory: pathlib.Path
  ):
    """Starts them.

    Args:
      arguments: the options of each.
      count: the number of processes.
      devices: the CPU devices of each.
      directory: for the logs.
    """
    self.directory = directory
    directory.mkdir(parents=True, exist_ok=True)
    # The last one of several settings of a flag counts.
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "TF_CPP_MIN_LOG_LEVEL": "1",
    }
    common = [sys.executable, "-m", "examples.multihost", *arguments, "--distributed"]
    common += ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(count)]
    self.running: list[subprocess.Popen[bytes]] = []
    self.overdue: set[int] = set()
    for index in range(count):
      with self.log(index).open("w") as log:
        self.running.append(
            subprocess.Popen(
                [*common, "--process", str(index)],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        )

  def log(self, index: int) -> pathlib.Path:
    """The file with all that a process has printed."""
    return self.directory / f"process-{index}.log"

  def wait(self, deadline: float) -> list[int]:
    """Waits until all have ended, and returns their exit statuses.

    After the first that fails, the others have ``deadline`` seconds to end by
    themselves; then they are killed.
    """
    failed_at = None
    while any(process.poll() is None for process in self.running):
      if failed_at is None and any(process.poll() for process in self.running):
        failed_at = time.monotonic()
      if failed_at is not None and time.monotonic() - failed_at > deadline:
        self.overdue = {
            index
            for index, process in enumerate(self.running)
            if process.poll() is None
        }
        self.kill()
      time.sleep(POLL_SECONDS)
    return [process.wait() for process in self.running]

  def account(self) -> str:
    """What became of each process, and what it said of a failure."""
    lines = []
    for index, process in enumerate(self.running):
      outcome = describe(process.wait())
      if index in self.overdue:
        outcome = "did not end by itself, and was killed"
      lines.append(f"process {index} {outcome}")
      if process.wait():
        lines += [f"  {line}" for line in reason(self.log(index).read_text())]
    return "\n".join(lines)

  def kill(self) -> None:
    """Ends all that still run."""
    for process in self.running:
      if process.poll() is None:
        process.kill()
    for process in self.running:
      process.wait()


def free_port() -> int:
  """A port that nobody listens on now."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def describe(status: int) -> str:
  """What an exit status says."""
  if status < 0:
    return f"was ended by {signal.Signals(-status).name}"
  return "ended well" if status == 0 else f"failed with exit status {status}"


def launch(
    arguments: Sequence[str],
    count: int,
    devices: int,
    directory: pathlib.Path,
    heartbeat: int,
) -> int:
  """Runs the processes to their end, and says what became of each.

  Args:
    arguments: the options as they were given; those of the launch are taken out.
    count: the number of processes.
    devices: the CPU devices of each.
    directory: for the logs.
    heartbeat: the seconds after which JAX ends a process whose peer is silent.

  Returns:
    0 if all ended well, otherwise 1.
  """
  processes = Processes(_without_launch(arguments), count, devices, directory)
  for index, process in enumerate(processes.running):
    print(f"process {index}: pid {process.pid}, {processes.log(index)}", flush=True)
  try:
    statuses = processes.wait(heartbeat + GRACE_SECONDS)
  finally:
    processes.kill()
  if not any(statuses):
    print("\n".join(said(processes.log(0).read_text())))
    return 0
  print(processes.account(), file=sys.stderr)
  print("The same command goes on from the last checkpoint.", file=sys.stderr)
  return 1


def said(log: str) -> list[str]:
  """The lines of a log without those on connections and without stack frames."""
  noise = ("[Gloo]", "    @", "*** Check failure", "  warnings.warn")
  return [line for line in log.splitlines() if line and not line.startswith(noise)]


def reason(log: str) -> list[str]:
  """The lines of a log that say why the process failed: of several errors, the first.

  Those after it are of its consequences, such as a save that waits for a dead peer.
  """
  lines = said(log)
  errors = [i for i, line in enumerate(lines) if _ERROR.search(line)]
  start = errors[0] if errors else max(0, len(lines) - LINES)
  return lines[start : start + LINES]


def _without_launch(arguments: Sequence[str]) -> list[str]:
  kept, skip = [], False
  for argument in arguments:
    if skip:
      skip = False
    elif argument in ("--launch", "--devices"):
      skip = True
    elif not argument.startswith(("--launch=", "--devices=")):
      kept.append(argument)
  return kept
