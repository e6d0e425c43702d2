"""The training loop: one task, one optimizer, resumed where it was left."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import asam_jax
from examples.paper import checkpoints
from examples.paper import checks
from examples.paper import clock as clocks
from examples.paper import logs
from examples.paper import methods
from examples.paper import optimizers
from examples.paper import programs
from examples.paper import results
from examples.paper import tasks
from examples.paper.config import Config
from examples.paper.config import folder_of
from examples.paper.config import Options


class TrainState(NamedTuple):
  """All that changes in a run, as arrays on the device.

  Attributes:
    step: the number of steps taken, an int32 scalar; all random keys come from the
      seed and from it.
    params: the parameters.
    variables: the network's other variables, such as batch statistics.
    opt_state: the optimizer's state.
    sums: of the epoch so far, in training mode.
  """

  step: jax.Array
  params: Any
  variables: Any
  opt_state: Any
  sums: tasks.Sums


def initial_state(task: tasks.Task, recipe: methods.Recipe, seed: int) -> TrainState:
  """The state before the first step."""
  params, variables = task.init(jax.random.key(seed))
  return TrainState(
      jnp.zeros((), jnp.int32),
      params,
      variables,
      jax.jit(recipe.tx.init)(params),
      tasks.Sums.zero(),
  )


def train_step(
    task: tasks.Task,
    recipe: methods.Recipe,
    ascend: bool | None,
    state: TrainState,
    data: Any,
    batch: Any,
    seed: jax.Array,
) -> TrainState:
  """One step; the same batch, crops and dropout in both passes.

  Batch statistics, loss and accuracy are those of the clean pass (of the only pass,
  for the methods that rest at the perturbed parameters).
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  augment_key, dropout_key = jax.random.split(key)
  inputs = task.prepare(data, batch, augment_key)

  def model(params, inputs):
    logits, variables = task.forward(params, state.variables, inputs, dropout_key)
    return logits, (variables, task.loss(logits, inputs)[1])

  def loss(logits, inputs):
    return task.loss(logits, inputs)[0]

  def value_fn(params):
    return loss(model(params, inputs)[0], inputs)

  value_and_grad = recipe.door(model, loss)
  (value, (variables, sums)), grads = value_and_grad(state.params, inputs)
  extra: dict[str, Any] = {} if ascend is None else {"ascend": ascend}
  if recipe.losses:
    extra |= {"value": value, "value_fn": value_fn}
  else:
    extra["grad_fn"] = jax.grad(value_fn)
  updates, opt_state = recipe.tx.update(grads, state.opt_state, state.params, **extra)
  sums = sums._replace(loss=value * sums.total)  # groups of m-sharpness have means
  return TrainState(
      state.step + 1,
      optax.apply_updates(state.params, updates),
      variables,
      opt_state,
      state.sums.plus(sums),
  )


def clean_params(recipe: methods.Recipe, state: TrainState) -> Any:
  """The parameters to judge."""
  if recipe.carried:
    return asam_jax.eval_params(state.opt_state)
  return state.params


class Outcome(NamedTuple):
  """The end of a run: its last state, and what is said of it."""

  state: TrainState
  record: dict[str, Any]


def run(config: Config, options: Options) -> Outcome:
  """Trains a configuration, or what is left of it in its folder.

  The record is added to its table, see ``Options.results``.

  Raises:
    ConfigError: for anything in the configuration or the data that can't be; before
      the first step.
  """
  checks.check(config, options)
  task = tasks.make(config, options)
  total = task.steps * config.epochs
  recipe = optimizers.make(config, total)
  folder = folder_of(config, options)
  logs.claim(folder, config)
  step = functools.partial(train_step, task, recipe)
  clock = clocks.Clock(options.pause_file)
  program = programs.Program(step, task, recipe.ascend, config, options, clock)
  state = program.place(initial_state(task, recipe, config.seed))
  with checkpoints.Keeper(folder, options) as keeper:
    state, history = keeper.restore(state)
    with logs.Log(folder, config, options, total, int(state.step), history) as log:
      state = _train(task, recipe, program, config, clock, state, keeper, log)
      record = _record(task, program, config, state, recipe, log.history)
    # The record first: a run that is stopped before that still has its checkpoint.
    results.add(results.path_of(options.results, config.table), record)
    keeper.finish()
  return Outcome(state, record)


def _train(task, recipe, program, config, clock, state, keeper, log) -> TrainState:
  """The epochs that are missing."""
  start = int(state.step)
  for epoch in range(start // task.steps, config.epochs):
    if _diverged(log.history):
      break  # what is no longer finite does not come back
    done = int(state.step) - epoch * task.steps
    clock.lap()
    for end, new in program.epoch(state, epoch, done):
      state = new  # the old one's buffers are gone
      log.step(end, state.sums)
      if keeper.is_due(end, task.steps):
        keeper.save(end, state, log.history)
    loss, accuracy = state.sums.means()
    line = {
        "epoch": epoch + 1,
        "step": (epoch + 1) * task.steps,
        "train_loss": loss,
        "train_accuracy": accuracy,
        **clock.lap(),
    }
    last = epoch + 1 == config.epochs or not math.isfinite(loss)
    if last or (epoch + 1) % config.eval_every == 0:
      params = clean_params(recipe, state)
      line |= task.evaluate(params, state.variables, last)
      line["eval_seconds"] = clock.lap()["seconds"]
    log.epoch(line)
    state = state._replace(sums=program.place(tasks.Sums.zero()))
    keeper.save_epoch(epoch + 1, (epoch + 1) * task.steps, state, log.history, last)
  return state


def _diverged(history) -> bool:
  """Whether the training loss of the last epoch is not finite."""
  return bool(history) and not math.isfinite(float(history[-1]["train_loss"]))


def _record(task, program, config, state, recipe, history) -> dict[str, Any]:
  """The line of the results."""
  return {
      **logs.heading(config),
      "history": history,
      "diverged": _diverged(history),
      "steps": history[-1]["step"],
      "examples": task.size,
      "multiply_adds": task.multiply_adds(),
      "gradients_per_step": recipe.gradients,
      "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
      "seconds": sum(line["seconds"] for line in history),
      "cpu_seconds": sum(line["cpu_seconds"] for line in history),
      "digest": checkpoints.digest((clean_params(recipe, state), state.variables)),
      "devices": program.devices,
  }

