"""A whole training step: the library's, written by hand, and Optax's SAM."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import tree_map_with_path
import optax

import asam_jax
from benchmarks import networks
from benchmarks import timing

RHO, RHO_SAM, ETA = 0.5, 0.05, 0.01


class Step(NamedTuple):
  """A way to train.

  Attributes:
    init: ``params -> state``.
    step: ``(params, state, batch) -> (params, state, loss)``.
    calls: the calls of ``step`` that make one descent.
    by_hand: the name of the hand-written step of the same method.
  """

  init: Callable[[Any], Any]
  step: Callable[[Any, Any, Any], tuple[Any, Any, jax.Array]]
  calls: int = 1
  by_hand: str = "ASAM by hand"


def base_optimizer() -> optax.GradientTransformation:
  """The quickstart's: momentum, weight decay, a cosine schedule."""
  return optax.chain(
      optax.add_decayed_weights(5e-4),
      optax.sgd(optax.cosine_decay_schedule(0.05, 1000), momentum=0.9),
  )


def two_gradients_by_hand(loss: Any, perturb: Any) -> Step:
  """The plain JAX code that a user would write for SAM or ASAM."""
  tx = base_optimizer()

  def step(params, state, batch):
    value, grads = jax.value_and_grad(loss)(params, batch)
    grads = jax.grad(loss)(perturb(params, grads), batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  return Step(tx.init, step)


def asam_point(params: Any, grads: Any) -> Any:
  """The point w + rho T^2 g / ||T g||, where biases have T = 1."""

  def factor(path, w):
    return 1.0 if path[-1].key == "bias" else jnp.abs(w) + ETA

  factors = tree_map_with_path(factor, params)
  scaled = jax.tree.map(jnp.multiply, factors, grads)
  ratio = RHO / jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(scaled)))
  return jax.tree.map(lambda w, t, x: w + ratio * t * x, params, factors, scaled)


def sam_point(params: Any, grads: Any) -> Any:
  """The point w + rho g / ||g||."""
  ratio = RHO_SAM / jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
  return jax.tree.map(lambda w, g: w + ratio * g, params, grads)


def one_call(tx: Any, value_and_grad: Any, extra: Any = None) -> Step:
  """A step whose optimizer is called once with the arguments ``extra(batch, loss)``."""

  def step(params, state, batch):
    value, grads = value_and_grad(params, batch)
    extra_args = extra(batch, value) if extra else {}
    updates, state = tx.update(grads, state, params, **extra_args)
    return optax.apply_updates(params, updates), state, value

  return Step(tx.init, step)


def steps(loss: Any) -> dict[str, Step]:
  """Every way to train that is compared, on the same loss and base optimizer."""
  plain = jax.value_and_grad(loss)
  adversary = optax.chain(optax.contrib.normalize(), optax.sgd(RHO_SAM))
  opaque = optax.contrib.sam(base_optimizer(), adversary, opaque_mode=True)
  transparent = one_call(optax.contrib.sam(base_optimizer(), adversary), plain)

  def ours(batch, _):
    return {"grad_fn": lambda params: jax.grad(loss)(params, batch)}

  def with_losses(batch, value):
    return {"value": value, "value_fn": lambda params: loss(params, batch)}

  def theirs(batch, _):
    return {"grad_fn": lambda params, _: jax.grad(loss)(params, batch)}

  methods = {
      "plain SGD": one_call(base_optimizer(), plain),
      "ASAM by hand": two_gradients_by_hand(loss, asam_point),
      "adaptive_sam": one_call(
          asam_jax.adaptive_sam(base_optimizer(), RHO, ETA), plain, ours
      ),
      "adaptive_sam, with_info": one_call(
          asam_jax.adaptive_sam(base_optimizer(), RHO, ETA, with_info=True),
          plain, with_losses,
      ),
      "value_and_grad": one_call(
          base_optimizer(), asam_jax.value_and_grad(loss, rho=RHO, eta=ETA)
      ),
  }
  methods_of_sam = {
      "SAM by hand": two_gradients_by_hand(loss, sam_point),
      "sam": one_call(asam_jax.sam(base_optimizer(), RHO_SAM), plain, ours),
      "optax.contrib.sam, opaque": one_call(opaque, plain, theirs),
      # The first call ascends, the second descends.
      "optax.contrib.sam, transparent": transparent._replace(calls=2),
  }
  for name, step in methods_of_sam.items():
    methods[name] = step._replace(by_hand="SAM by hand")
  return methods


def compile_step(step: Step, params: Any, batch: Any) -> Any:
  """The step compiled for these (abstract) arrays, parameters and state donated."""
  state = jax.eval_shape(step.init, params)
  return jax.jit(step.step, donate_argnums=(0, 1)).lower(params, state, batch).compile()


def chosen_steps(
    every: dict[str, Step], names: Sequence[str], against: str | None
) -> dict[str, Step]:
  """The named steps with those that they are compared with, by default all."""
  if not names:
    return every
  named = [*names, *filter(None, [against])]
  needed = {"plain SGD", *named, *(every[name].by_hand for name in named)}
  return {name: step for name, step in every.items() if name in needed}


def measure(
    network: str,
    batch_size: int,
    repeats: int,
    sample_seconds: float,
    names: Sequence[str] = (),
    against: str | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
  """Times every step on one network, in one run.

  Args:
    network: a name in :data:`benchmarks.networks.NETWORKS`.
    batch_size: the number of examples in a batch.
    repeats: the number of rounds.
    sample_seconds: about how long one sample runs: it is as many steps as fit.
    names: the steps to time beside those that they are compared with; by default
      all. With fewer, more rounds fit into the same time.
    against: a step with which all the others are compared as well.
    **options: of the network.

  Returns:
    A row for each step: quartiles of the time over the plain step's and over the
    hand-written one's (the hand-written SAM's for SAM), and in seconds; compiled
    FLOPs over the plain step's; temporary bytes; with ``against`` quartiles of the
    time over that step's, and the standard error of their median.
  """
  problem = networks.problem(network, batch_size, **options)
  start = jax.jit(problem.init)()
  methods = chosen_steps(steps(problem.loss), names, against)
  executables = {
      name: compile_step(step, start, problem.batch)
      for name, step in methods.items()
  }

  def case(name):
    step, executable = methods[name], executables[name]
    # Copies, for the step donates them, and some states hold the parameters.
    params = jax.tree.map(jnp.copy, start)
    state = jax.tree.map(jnp.copy, step.init(params))

    def once():
      nonlocal params, state
      for _ in range(step.calls):
        params, state, value = executable(params, state, problem.batch)
      return value  # pyright: ignore[reportPossiblyUnboundVariable]

    return once

  runs = {name: case(name) for name in methods}
  pilot = {name: (run(), timing.seconds(run))[1] for name, run in runs.items()}
  calls = max(1, round(sample_seconds / max(pilot.values())))

  def sample(run):
    # The first step finds the caches full of another method's arrays, which no step
    # in a training loop does. It is not counted.
    timing.seconds(run)
    return timing.seconds(run, calls) / calls

  samples = {name: functools.partial(sample, run) for name, run in runs.items()}
  times = timing.interleaved(samples, repeats)
  costs = {
      name: timing.compiled_cost(executables[name], methods[name].calls)
      for name in methods
  }
  rows = []
  for name in methods:
    by_hand = methods[name].by_hand
    rows.append({
        "part": network,
        "parameters": sum(w.size for w in jax.tree.leaves(start)),
        "batch_size": batch_size,
        "dtype": str(jax.tree.leaves(start)[0].dtype),
        "method": name,
        "ratio": timing.quartiles(times[name] / times["plain SGD"]),
        "by_hand": by_hand,
        "ratio_to_by_hand": timing.quartiles(times[name] / times[by_hand]),
        "seconds": timing.quartiles(times[name]),
        "flops_ratio": costs[name]["flops"] / costs["plain SGD"]["flops"],
        "temporary_bytes": costs[name]["temporary_bytes"],
    })
    if against is not None:
      ratio = times[name] / times[against]
      rows[-1] |= {
          "against": against,
          "ratio_against": timing.quartiles(ratio),
          "error_against": timing.median_error(ratio),
      }
  return rows
