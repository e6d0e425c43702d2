"""Orbax: every state saved in the midst of a run, resumed bit for bit."""

import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from tests import problems

ocp = pytest.importorskip("orbax.checkpoint", reason="needs Orbax, for tests alone")

ROOT = Path(__file__).parent.parent


def base_optimizer():
  """Counts, momenta, a schedule."""
  return optax.adam(optax.linear_schedule(0.1, 0.01, 10))


def typed_key(base_tx, rho):
  """A base optimizer whose state has a typed key that moves on."""
  noise = optax.add_noise(0.1, 0.5, key=jax.random.key(3))
  return asam_jax.adaptive_sam(optax.chain(noise, base_tx), rho)


def with_info(base_tx, rho):
  return asam_jax.adaptive_sam(base_tx, rho, with_info=True)


def skipping(base_tx, rho):
  link = asam_jax.perturbed_gradient(asam_jax.ascent(rho))
  return asam_jax.skip_nonfinite(base_tx, link)


def accumulating(base_tx, rho):
  inside = optax.MultiSteps(base_tx, 2).gradient_transformation()
  return asam_jax.adaptive_sam(inside, rho)


def rounding(base_tx, rho):
  rounded = asam_jax.stochastic_rounding(jax.random.key(5))
  ascent_tx = optax.chain(asam_jax.ascent(rho), rounded)
  return optax.chain(asam_jax.perturbed_gradient(ascent_tx), base_tx)


ROWS = {
    **problems.OPTIMIZERS,
    "typed_key": problems.Row(typed_key, 0.01),
    "with_info": problems.Row(with_info, 0.01, with_info=True),
    "skip_nonfinite": problems.Row(skipping, 0.01),
    "multi_steps_inside": problems.Row(accumulating, 0.01),
    "stochastic_rounding": problems.Row(rounding, 0.01),
}


def plain(tree):
  """Typed keys as their data, which can be compared."""
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
  return jax.tree.map(
      lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree
  )


def assert_same(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
  chex.assert_trees_all_equal(plain(got), plain(expected))


def advance(step, carry, steps):
  for _ in range(steps):
    carry = step(*carry)
  return carry


def committed(tree):
  """On the device, as what is restored: both then run the same program."""
  return jax.device_put(tree, jax.devices()[0])


class Run:
  """One row's run: its step, its start, and where it is after three steps."""

  def __init__(self, row):
    problem = problems.quadratic()
    tx = row.make(base_optimizer(), row.rho)
    self.step = jax.jit(problems.step_function(tx, problem.loss, row))
    self.start = committed((problem.start, tx.init(problem.start)))
    self.middle = advance(self.step, self.start, 3)


@pytest.fixture(scope="module")
def runs():
  return {name: Run(row) for name, row in ROWS.items()}


@pytest.fixture(scope="module")
def restored(runs, tmp_path_factory):
  """The middles of all runs, in one checkpoint, from what a new process knows."""
  path = tmp_path_factory.mktemp("checkpoint") / "runs"
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, {name: run.middle for name, run in runs.items()})
    checkpointer.wait_until_finished()
    starts = {name: run.start for name, run in runs.items()}
    return checkpointer.restore(path, jax.eval_shape(lambda: starts))


@pytest.mark.parametrize("name", ROWS)
def test_resumed_bit_for_bit(name, runs, restored):
  run = runs[name]
  assert_same(restored[name], run.middle)
  end = advance(run.step, run.middle, 3)
  assert_same(advance(run.step, restored[name], 3), end)
  assert (np.asarray(end[0]["w"]) != np.asarray(run.middle[0]["w"])).any()


def test_nnx_module_and_optimizer(tmp_path):
  nnx = pytest.importorskip("flax.nnx", reason="needs Flax, an extra")
  import asam_jax.nnx

  class Model(nnx.Module):
    def __init__(self, rngs):
      self.norm = nnx.BatchNorm(5, rngs=rngs)
      self.dropout = nnx.Dropout(0.5, rngs=rngs)
      self.head = nnx.Linear(5, 1, rngs=rngs)

    def __call__(self, x):
      return self.head(self.dropout(self.norm(x)))

  x = jax.random.normal(jax.random.key(0), (16, 5))

  def loss_fn(model):
    return jnp.mean((model(x) - x[:, :1]) ** 2)

  @nnx.jit
  def step(model, optimizer):
    grad_fn = asam_jax.nnx.grad_fn(loss_fn, model)
    grads = nnx.grad(loss_fn)(model)
    optimizer.update(model, grads, grad_fn=grad_fn)

  tx = typed_key(base_optimizer(), rho=0.1)

  def created():
    model = Model(nnx.Rngs(0))
    both = model, nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx.update(both, committed(nnx.state(both)))
    return both

  def state(both):
    return nnx.to_pure_dict(nnx.state(both))

  run = created()
  for _ in range(2):
    step(*run)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "run", state(run))
    checkpointer.wait_until_finished()
    resumed = created()
    restored = checkpointer.restore(tmp_path / "run", state(resumed))
  nnx.update(resumed, restored)
  assert_same(state(resumed), state(run))
  for both in (run, resumed):
    step(*both)
  assert_same(state(resumed), state(run))


def killable_run():
  """(one step, its start) of the run that is killed; in both processes."""
  row, problem = ROWS["carried"], problems.regression()
  tx = row.make(base_optimizer(), row.rho)
  step = jax.jit(problems.step_function(tx, problem.loss, row))
  return step, committed((problem.start, tx.init(problem.start)))


def save_until_killed(directory):
  """Saves after every step, and tells of each save before and after it."""
  step, carry = killable_run()
  ballast = np.random.default_rng(0).normal(size=2_000_000)  # makes a save last
  options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
  with ocp.CheckpointManager(directory, options=options) as manager:
    for number in range(1, 1000):
      carry = step(*carry)
      print("saving", number, flush=True)
      items = {"run": carry, "ballast": ballast}
      manager.save(number, args=ocp.args.StandardSave(items))
      print("saved", number, flush=True)


def killed_run(directory, delay):
  """The lines that a run printed before SIGKILL, ``delay`` after its third save."""
  code = f"from tests.test_checkpoints import *; save_until_killed({str(directory)!r})"
  with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ,
                        stdout=subprocess.PIPE, text=True) as process:
    lines = []
    for line in process.stdout:
      lines.append(line.split())
      if lines[-1] == ["saving", "4"]:
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        break
    lines += [line.split() for line in process.stdout]
  assert process.returncode == -signal.SIGKILL
  return lines


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on Windows")
def test_killed_while_saving(tmp_path):
  for attempt in range(5):  # until the signal falls into a save
    directory = tmp_path / str(attempt)
    lines = killed_run(directory, delay=0.01)
    if lines[-1][0] == "saving":
      break
  interrupted = int(lines[-1][1])
  assert lines[-1] == ["saving", str(interrupted)]
  found = {entry.name for entry in directory.iterdir()}
  assert found > {str(number) for number in range(1, interrupted)}, found

  step, start = killable_run()
  with ocp.CheckpointManager(directory) as manager:
    latest = manager.latest_step()
    # The last step of a save, a rename, may have happened or not.
    assert latest in (interrupted - 1, interrupted)
    shapes = jax.eval_shape(lambda: start)
    ballast = jax.ShapeDtypeStruct((2_000_000,), np.float64)
    items = {"run": shapes, "ballast": ballast}
    restored = manager.restore(latest, args=ocp.args.StandardRestore(items))["run"]
  expected = advance(step, start, latest)
  assert_same(restored, expected)
  assert_same(advance(step, restored, 3), advance(step, expected, 3))
