"""Training over several processes: one program on every host, and one loss.

Each process runs this same program. JAX connects them (``jax.distributed``), and
``jax.devices()`` is then the devices of all. Under ``jit`` with sharded arrays ASAM
needs nothing more: the gradient, the norm of the perturbation and the second gradient
are those of the whole batch, whatever the number of devices. What a process does itself
is to read its own rows of each batch (``jax.make_array_from_process_local_data``) and
to write its own shards of a checkpoint (Orbax, into a directory that all of them see).

On this machine, two processes of four CPU devices each, started and watched by one
command; the same command again goes on from the last checkpoint:

    python -m examples.multihost --launch 2 --devices 4

In one process, on the devices that JAX finds (one machine with several GPUs needs no
more than this), from whatever the other layouts have saved:

    python -m examples.multihost

On a TPU pod or under SLURM each host runs ``python -m examples.multihost
--distributed``; docs/multihost.md has the command lines.

Where a process dies, JAX ends the others with an error that names it, about
``--heartbeat`` seconds later. ``--launch`` gives them five seconds more; who is not
gone by then (because it was not connected yet) is killed. Nothing is lost but the steps
since the last checkpoint, and they are made again just as they were: the order of the
batches depends on the step alone. ``python -m examples.multihost_kill`` tries it.
"""

import argparse
from collections.abc import Sequence
import json
import os
import pathlib
import sys
import traceback
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import orbax.checkpoint as ocp

import asam_jax
from examples import digits
from examples import multihost_launch
from examples import options
from examples import records

AXIS = "data"
MODEL = digits.MLP(256)


class Run(NamedTuple):
  """All that a checkpoint holds.

  Attributes:
    params: the parameters.
    opt_state: the optimizer's state.
    losses: the loss of each step so far, of shape ``[steps]``; zero for the rest.
  """

  params: Any
  opt_state: Any
  losses: jax.Array


def parser() -> argparse.ArgumentParser:
  """The options."""
  parser = options.parser(__doc__)
  add = parser.add_argument
  count = options.number(int, 1)
  add("--steps", type=count, default=60, help="number of steps of the whole run")
  add("--batch-size", type=count, default=64,
      help="number of examples in a step, on all devices together")
  add("--rho", type=options.number(float, 0), default=0.5,
      help="radius of the perturbation, a fraction of each weight")
  add("--save-every", type=count, default=5,
      help="number of steps between two checkpoints")
  add("--directory", type=pathlib.Path, default=pathlib.Path("runs/multihost"),
      help="folder for checkpoints, result and what the processes print")
  add("--launch", type=count, metavar="N", help="start N processes on this machine")
  add("--devices", type=count, default=4,
      help="number of devices of each process under --launch")
  add("--distributed", action="store_true", help="be one of several processes")
  add("--coordinator", metavar="HOST:PORT",
      help="where process 0 is; if not given, what the cluster says")
  add("--processes", type=count, metavar="N",
      help="how many processes there are; likewise")
  add("--process", type=options.number(int, 0), metavar="I",
      help="which of them this one is; likewise")
  add("--heartbeat", type=count, default=10,
      help="seconds of silence after which a process counts as dead")
  return parser


def optimizer(rho: float) -> optax.GradientTransformationExtraArgs:
  """ASAM around SGD with momentum."""
  return asam_jax.adaptive_sam(optax.sgd(0.05, momentum=0.9), rho)


def initial(rho: float, steps: int) -> Run:
  """The first state."""
  params = MODEL.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  return Run(params, optimizer(rho).init(params), jnp.zeros(steps))


def training_step(
    run: Run, step: Any, images: jax.Array, labels: jax.Array, rho: float
) -> Run:
  """One step on one batch: nothing here knows of devices."""

  def loss(params):
    return digits.cross_entropy(MODEL, params, images, labels)

  value, grads = jax.value_and_grad(loss)(run.params)
  updates, opt_state = optimizer(rho).update(
      grads, run.opt_state, run.params, grad_fn=jax.grad(loss)
  )
  params = optax.apply_updates(run.params, updates)
  return Run(params, opt_state, run.losses.at[step].set(value))


def placement(tree: Any, mesh: Mesh) -> Any:
  """Shards each leaf along its first axis if that divides, else copies it (FSDP)."""

  def place(leaf):
    divides = leaf.ndim > 1 and leaf.shape[0] % mesh.size == 0
    return NamedSharding(mesh, PartitionSpec(AXIS) if divides else PartitionSpec())

  return jax.tree.map(place, tree)


def batch_of(step: int, data: digits.Halves, size: int, mesh: Mesh) -> Any:
  """The batch of a step, of which each process puts its own rows on its devices."""
  order = np.random.default_rng([0, step]).permutation(len(data.train_labels))[:size]
  # jax.devices() has the devices of process 0 first, then those of process 1, ...
  own = np.split(order, jax.process_count())[jax.process_index()]
  sharding = NamedSharding(mesh, PartitionSpec(AXIS))
  return tuple(
      jax.make_array_from_process_local_data(
          sharding, rows[own], (size, *rows.shape[1:])
      )
      for rows in (data.train_images, data.train_labels)
  )


def train(
    directory: pathlib.Path,
    devices: Sequence[Any] | None = None,
    *,
    steps: int = 60,
    batch_size: int = 64,
    rho: float = 0.5,
    save_every: int = 5,
) -> Run:
  """Trains from the last checkpoint in the directory, or from the start.

  Args:
    directory: where the checkpoints are; all processes must see it.
    devices: those to train on; by default all of all processes.
    steps: the number of the last step.
    batch_size: examples of all devices together, a multiple of their number.
    rho: ASAM's radius.
    save_every: steps between two checkpoints.

  Returns:
    The last state.
  """
  mesh = Mesh(np.array(jax.devices() if devices is None else devices), (AXIS,))
  if batch_size % mesh.size:
    raise ValueError(
        f"batch_size={batch_size} must be a multiple of the {mesh.size} devices."
    )
  abstract = jax.eval_shape(lambda: initial(rho, steps))
  places = placement(abstract, mesh)
  options = ocp.CheckpointManagerOptions(
      max_to_keep=3, save_interval_steps=save_every, create=True
  )
  with ocp.CheckpointManager(directory.resolve(), options=options) as manager:
    done = manager.latest_step()
    if done is None:
      run, done = jax.jit(lambda: initial(rho, steps), out_shardings=places)(), 0
    else:
      target = jax.tree.map(
          lambda leaf, place: leaf.update(sharding=place), abstract, places
      )
      run = manager.restore(done, args=ocp.args.StandardRestore(target))
    processes = jax.process_count()
    say(f"steps {done} to {steps} on {mesh.size} devices, processes: {processes}")
    jitted = jax.jit(
        lambda run, step, *batch: training_step(run, step, *batch, rho=rho),
        donate_argnums=0,
        out_shardings=places,
    )
    data = digits.load_halves()
    for step in range(done, steps):
      run = jitted(run, step, *batch_of(step, data, batch_size, mesh))
      last = step + 1 == steps
      manager.save(step + 1, args=ocp.args.StandardSave(run), force=last)
    manager.wait_until_finished()
  return run


def say(text: str) -> None:
  """Prints, from the first process alone."""
  if jax.process_index() == 0:
    print(text, flush=True)


def connect(args: argparse.Namespace) -> None:
  """Joins the other processes; before this, JAX must not have been used."""
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(
      args.coordinator,
      args.processes,
      args.process,
      initialization_timeout=60,
      heartbeat_timeout_seconds=args.heartbeat,
      shutdown_timeout_seconds=args.heartbeat,
  )


def work(args: argparse.Namespace) -> None:
  """What each process does."""
  if args.distributed:
    connect(args)
  directory = args.directory / "checkpoints"
  run = train(
      directory,
      steps=args.steps,
      batch_size=args.batch_size,
      rho=args.rho,
      save_every=args.save_every,
  )
  losses = np.asarray(run.losses).tolist()  # a copy is on each device
  say(f"loss of the first step {losses[0]:.4f}, of the last {losses[-1]:.6f}")
  if jax.process_index() == 0:
    result = {"devices": jax.device_count(), "losses": losses}
    records.replace(args.directory / "result.json", json.dumps(result))


def main(arguments: Sequence[str] | None = None) -> int:
  """Starts the processes, or is one of them; returns the exit status."""
  args = parser().parse_args(arguments)
  if args.launch:
    given = list(sys.argv[1:] if arguments is None else arguments)
    return multihost_launch.launch(
        given, args.launch, args.devices, args.directory, args.heartbeat
    )
  try:
    work(args)
  except Exception:
    if not args.distributed:
      raise
    traceback.print_exc()
    sys.stderr.flush()
    # An ordinary exit would first wait for the peers, of which one may be gone.
    os._exit(1)
  return 0


if __name__ == "__main__":
  sys.exit(main())
