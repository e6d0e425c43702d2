"""Several processes on this machine train as one does, and survive the loss of one."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint", reason="needs Orbax, for tests alone")
pytest.importorskip("sklearn", reason="the examples need the extra 'examples'")

from examples import multihost
from examples import multihost_kill
from examples import multihost_launch

STEPS, HEARTBEAT = 40, 5
LIMIT = HEARTBEAT + multihost_launch.GRACE_SECONDS
SAVE_EVERY = 1  # also makes the run last, so that it is not done before it is killed
OPTIONS = ["--steps", str(STEPS), "--save-every", str(SAVE_EVERY)]
OPTIONS += ["--heartbeat", str(HEARTBEAT)]


GUIDE = pathlib.Path(__file__).parent.parent / "docs" / "multihost.md"
COMMANDS = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(), re.DOTALL)


def losses(directory, devices):
  run = multihost.train(directory, devices, steps=STEPS, save_every=STEPS)
  return np.asarray(run.losses)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
  """The loss of each step on one device of one process, undisturbed."""
  return losses(tmp_path_factory.mktemp("single"), jax.devices()[:1])


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
  """A run of two processes, one of which was killed at a random moment, once it ran."""
  directory = tmp_path_factory.mktemp("killed")
  processes = multihost_kill.start(directory, OPTIONS, devices=4)
  try:
    deadline = time.monotonic() + 120
    while multihost_kill.saved_step(directory) == 0:
      assert time.monotonic() < deadline, processes.account()
      time.sleep(0.02)
    victim = random.randrange(2)
    moment = random.uniform(0, 0.5)
    yield directory, multihost_kill.kill_one(processes, victim, moment, LIMIT)
  finally:
    processes.kill()


def test_the_loss_of_a_process_ends_the_other_with_an_error_in_time(killed):
  _, record = killed
  victim, statuses = record["victim"], record["statuses"]
  assert statuses[victim] == -signal.SIGKILL
  assert statuses[1 - victim] not in (0, -signal.SIGKILL), record["account"]
  assert record["seconds"] <= LIMIT + 2  # a busy machine is late with everything
  assert f"process {victim} was ended by SIGKILL" in record["account"]
  # JAX's own words: of a silent peer, or of the coordinator that is gone.
  words = ("another task died", "leader task", "heartbeat", "coordination service")
  assert any(each in record["account"] for each in words), record["account"]


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_the_run_goes_on_as_if_nothing_had_been(killed, single, devices, tmp_path):
  directory, _ = killed
  before = multihost_kill.saved_step(directory)
  assert 0 < before < STEPS
  shutil.copytree(directory / "checkpoints", tmp_path / "checkpoints")
  if devices == 8:
    result = multihost_kill.finish(tmp_path, OPTIONS, devices=4)
    assert json.loads((tmp_path / "result.json").read_text())["devices"] == 8
    assert f"steps {before} to {STEPS} on 8" in (tmp_path / "process-0.log").read_text()
  else:
    result = losses(tmp_path / "checkpoints", jax.devices()[:devices])
  np.testing.assert_allclose(result, single, rtol=0, atol=1e-6)
  assert result[-1] < 0.5 * result[0]


def test_a_process_that_never_came_is_named(tmp_path, monkeypatch, capfd):
  # The first one would wait a minute for the second one, which ends at once.
  monkeypatch.setattr(multihost_launch, "GRACE_SECONDS", 0)
  given = ["--launch", "2", "--devices=1", "--directory", str(tmp_path)]
  given += ["--heartbeat", "1", "--batch-size", "no number"]
  assert multihost_launch.launch(given, 2, 1, tmp_path, heartbeat=1) == 1
  printed = capfd.readouterr().err
  assert "failed with exit status 2" in printed
  assert "invalid int value: 'no number'" in printed
  assert "goes on from the last checkpoint" in printed


def test_the_reason_is_the_first_error():
  log = ["[Gloo] Rank 0", "steps 0 to 9", "E1125 12:00 1 is unhealthy", "F1125 ends"]
  log += ["    @  frame"] + ["TimeoutError: of a barrier"] * 20
  assert multihost_launch.reason("\n".join(log))[:2] == log[2:4]
  assert multihost_launch.reason("one\ntwo") == ["one", "two"]


def test_what_must_not_happen_is_told():
  good = {"victim": 1, "statuses": [-6, -9], "seconds": 9.0, "moment": 3.0}
  good |= {"saved_before": 5, "saved_after": 10}
  assert multihost_kill.wrong(good, 20, 15) == []
  assert "process 1 killed after 3.0 s" in multihost_kill.line(good)
  assert "the other was ended by SIGABRT" in multihost_kill.line(good)
  for change in ({"saved_after": 4}, {"seconds": 18.0}, {"statuses": [0, -9]}):
    assert len(multihost_kill.wrong(good | change, 20, 15)) == 1
  done = good | {"statuses": [0, 0], "saved_after": 20}
  assert multihost_kill.wrong(done, 20, 15) == []
  assert "not counted" in multihost_kill.line(done)


def test_batch_must_divide(tmp_path):
  with pytest.raises(ValueError, match="batch_size=6 must be a multiple of the 4 dev"):
    multihost.train(tmp_path, jax.devices()[:4], batch_size=6)


def test_parameters_are_sharded():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), (multihost.AXIS,))
  places = multihost.placement(
      jax.eval_shape(lambda: multihost.initial(0.5, STEPS)), mesh
  )
  for tree in (places.params, jax.tree.leaves(places.opt_state)):
    specs = [place.spec for place in jax.tree.leaves(tree)]
    assert sum(len(spec) > 0 for spec in specs) == 3  # the kernels, and their momenta


@pytest.mark.parametrize("checker", [["bash", "-n"], ["shellcheck", "--shell=bash"]])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_guide_are_well_formed(command, checker, tmp_path):
  beside = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
  program = shutil.which(checker[0], path=beside)
  if program is None:
    pytest.skip(f"{checker[0]} is not installed")
  script = tmp_path / "command.sh"
  script.write_text(command)
  run = subprocess.run([program, *checker[1:], script], capture_output=True, text=True)
  assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_the_guide_are_those_of_the_program(command):
  joined = command.replace("\\\n", " ")
  for kind, rest in re.findall(r"-m examples\.(multihost\w*)([^\n]*)", joined):
    given = [word.strip("\"'") for word in rest.split()]
    module = {"multihost": multihost, "multihost_kill": multihost_kill}[kind]
    module.parser().parse_args(["0" if word == "$process" else word for word in given])


def test_the_guide_has_commands():
  assert len(COMMANDS) == 7
