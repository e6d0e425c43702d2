"""A run that was stopped ends as if it had not been, bit for bit."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
import types

import pytest

from examples.paper import checkpoints
from examples.paper import loop
from examples.paper import results
from examples.paper import train
from examples.paper.clock import Clock
from examples.paper.config import ConfigError
from tests.paper import kill_test
from tests.paper.tiny import CONFIG
from tests.paper.tiny import options
from tests.paper.tiny import tiny  # noqa: F401

replace = dataclasses.replace


class StoppedError(Exception):
  """In place of a kill, where no process is at hand."""


def stop_before_step(monkeypatch, step):
  """Training stops when so many steps were taken, counted from now."""
  calls = iter(range(1000))

  def wait(self):
    if next(calls) == step:
      raise StoppedError

  monkeypatch.setattr(Clock, "wait", wait)


def _stopped(*args):
  raise StoppedError


def comparable(record):
  """A record without its times."""
  history = [
      {k: v for k, v in line.items() if "seconds" not in k}
      for line in record["history"]
  ]
  return history, record["digest"], record["steps"]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("method", "rho"), [("asam", 0.5), ("looksam", 0.3)])
def test_stopped_again_and_again(method, rho, tmp_path, monkeypatch):
  config = replace(CONFIG, method=method, rho=rho, every=3)
  alone = loop.run(config, options(tmp_path / "alone")).record
  here = options(tmp_path / "here", checkpoint_steps=3)
  # In the first epoch before and after its checkpoint, then in the third.
  for step in (2, 4, 7):
    with monkeypatch.context() as patch:
      stop_before_step(patch, step)
      with pytest.raises(StoppedError):
        loop.run(config, here)
  record = loop.run(config, here).record
  assert comparable(record) == comparable(alone)


@pytest.mark.usefixtures("tiny")
def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
  here = options(tmp_path, keep_checkpoints=True)
  record = loop.run(CONFIG, here).record
  stop_before_step(monkeypatch, 0)
  assert comparable(loop.run(CONFIG, here).record) == comparable(record)


@pytest.mark.usefixtures("tiny")
def test_what_diverged_is_not_trained_on(tmp_path, monkeypatch):
  config = replace(CONFIG, learning_rate=1e30)
  here = options(tmp_path, keep_checkpoints=True)
  record = loop.run(config, here).record
  assert record["diverged"]
  assert len(record["history"]) < config.epochs
  stop_before_step(monkeypatch, 0)
  assert comparable(loop.run(config, here).record) == comparable(record)


@pytest.mark.usefixtures("tiny")
def test_the_record_is_written_before_the_checkpoints_go(tmp_path, monkeypatch):
  here = options(tmp_path)
  path = results.path_of(here.results, CONFIG.table)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints.Keeper, "finish", _stopped)
    with pytest.raises(StoppedError):
      loop.run(CONFIG, here)
  (record,) = results.read(path)
  stop_before_step(monkeypatch, 0)
  assert comparable(loop.run(CONFIG, here).record) == comparable(record)
  assert len(results.read(path)) == 1


@pytest.mark.usefixtures("tiny")
def test_checkpoints_that_are_half_removed_are_none(tmp_path, monkeypatch):
  def half(folder, **_):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files[::2]:
      path.unlink()
    if files:
      raise StoppedError

  here = options(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints, "shutil", types.SimpleNamespace(rmtree=half))
    with pytest.raises(StoppedError):
      loop.run(CONFIG, here)
  (record,) = results.read(results.path_of(here.results, CONFIG.table))
  assert comparable(loop.run(CONFIG, here).record) == comparable(record)
  assert not list((tmp_path / "run").glob("checkpoints*"))


@pytest.mark.usefixtures("tiny")
def test_a_folder_belongs_to_one_run(tmp_path):
  loop.run(CONFIG, options(tmp_path))
  other = replace(CONFIG, learning_rate=0.2, seed=1)
  with pytest.raises(ConfigError, match="differs in learning_rate, seed"):
    loop.run(other, options(tmp_path))


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
  import jax.numpy as jnp

  tree = {"w": jnp.arange(3.0)}
  with checkpoints.Keeper(tmp_path, options(tmp_path)) as keeper:
    keeper.save(4, tree, [{"epoch": 1}])
  whole = tmp_path / "checkpoints" / "4"
  broken = whole.with_name("8.orbax-checkpoint-tmp")
  broken.mkdir()
  (broken / "state").write_text("half")
  with checkpoints.Keeper(tmp_path, options(tmp_path)) as keeper:
    state, history = keeper.restore({"w": jnp.zeros(3)})
  assert state["w"].tolist() == [0.0, 1.0, 2.0]
  assert history == [{"epoch": 1}]


def test_pause_file_stops_the_clock_and_the_run(tmp_path):
  pause = tmp_path / "pause"
  pause.touch()
  code = (
      "import sys, time; time.sleep(1); import pathlib; pathlib.Path(sys.argv[1])"
      ".unlink()"
  )
  clock = Clock(pause)
  with subprocess.Popen([sys.executable, "-c", code, str(pause)]):
    start = time.monotonic()
    clock.wait()
  assert time.monotonic() - start > 0.9
  assert clock.lap()["seconds"] < 0.5


def test_one_kill(tmp_path):
  # The other twenty are not for every day: python -m tests.paper.kill_test.
  process = kill_test.start(tmp_path)
  log = tmp_path / "run" / "log.jsonl"
  deadline = time.monotonic() + 300
  while not (log.exists() and len(log.read_text("utf-8").splitlines()) > 1):
    assert process.poll() is None, "it ended before it could be killed"
    assert time.monotonic() < deadline
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not list((tmp_path / "results").glob("*.jsonl"))
  # Here, and not in another process, for imports take the most time.
  train.main(kill_test.arguments(tmp_path))
  epochs = [json.loads(line).get("epoch") for line in
            log.read_text("utf-8").splitlines()]
  assert epochs == [None, 1, 2, 3, 4]
  train.main(kill_test.arguments(tmp_path / "alone"))
  assert kill_test.digest(tmp_path) == kill_test.digest(tmp_path / "alone")
