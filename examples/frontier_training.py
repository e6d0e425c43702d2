"""Training for the frontier: many runs of one method, each a scan over its steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import asam_jax
from examples import digits
from examples import frontier_methods as methods

HELD_OUT = 0.2  # the fraction of the training half that the radii are judged on


class Sizes(NamedTuple):
  """Examples to train on: while the radii are tuned, and then."""

  tuning: int
  final: int


def sizes() -> Sizes:
  final = len(digits.load_halves().train_labels)
  return Sizes(final - round(HELD_OUT * final), final)


class Config(NamedTuple):
  """What all methods share."""

  epochs: int = 50
  batch_size: int = 64
  lr: float = 0.1


class Outcome(NamedTuple):
  """Of R runs: accuracy in [0, 1], and the share of steps with an ascent."""

  accuracy: np.ndarray
  ascents: np.ndarray


def gradients(
    model: Any, method: methods.Method, rho: Any, params: Any, images, labels
):
  """(the gradient that the optimizer is given, grad_fn) on one batch."""
  if method.door:
    fun = asam_jax.functional_value_and_grad(
        lambda params, labels: model.apply(params, images), digits.loss, rho=rho)
    return fun(params, labels)[1], None

  def grad_fn(params):
    return jax.grad(lambda w: digits.cross_entropy(model, w, images, labels))(params)

  if method.ascent_share == 1:
    return grad_fn(params), grad_fn
  part = int(method.ascent_share * len(images))
  ascent_loss = lambda w: digits.cross_entropy(  # noqa: E731
      model, w, images[:part], labels[:part]
  )
  return jax.grad(ascent_loss)(params), grad_fn


def train(
    name: str, network: str, runs: digits.Runs, seeds: Any, rhos: Any, config: Config
) -> Outcome:
  """Trains R runs of one method, one after another, so that lax.cond saves."""
  method, model = methods.METHODS[name], digits.NETWORKS[network]()
  size = runs.train_images.shape[1]
  kept = size - round(HELD_OUT * size) if method.stops else size
  per_epoch, epochs = kept // config.batch_size, config.epochs * method.epochs
  total = per_epoch * epochs
  orders = np.stack([
      np.concatenate([
          rng.permutation(kept)[: per_epoch * config.batch_size]
          for _ in range(epochs)
      ]).reshape(epochs, per_epoch, config.batch_size)
      for rng in (np.random.default_rng([seed, 2]) for seed in seeds)
  ])

  def one(args):
    run, seed, rho, order = args
    tx = optax.with_extra_args_support(
        method.make(methods.base_optimizer(config.lr, total), rho, total)
    )

    def step(carry, batch):
      params, state = carry
      images, labels = run.train_images[batch], run.train_labels[batch]
      grads, grad_fn = gradients(model, method, rho, params, images, labels)
      updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
      return (optax.apply_updates(params, updates), state), None

    def epoch(carry, batches):
      carry, _ = jax.lax.scan(step, carry, batches)
      return carry, None

    def watched_epoch(carry, batches):
      carry, best, score = carry
      carry, _ = epoch(carry, batches)
      here = digits.accuracy(
          model, carry[0], run.train_images[kept:], run.train_labels[kept:]
      )
      best = jax.tree.map(lambda a, b: jnp.where(here > score, a, b), carry[0], best)
      return (carry, best, jnp.maximum(here, score)), None

    params = model.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)))
    start = params, tx.init(params)
    if method.stops:
      ((_, state), params, _), _ = jax.lax.scan(
          watched_epoch, (start, params, -1.0), order
      )
    else:
      (params, state), _ = jax.lax.scan(epoch, start, order)
      params = methods.clean_params(name, params, state)
    correct = digits.accuracy(model, params, run.eval_images, run.eval_labels)
    return correct, _ascents(state) / total

  accuracy, ascents = jax.jit(lambda args: jax.lax.map(one, args))(
      (runs, jnp.asarray(seeds), jnp.asarray(rhos, jnp.float32), orders)
  )
  return Outcome(np.asarray(accuracy), np.asarray(ascents))


def _ascents(state: Any) -> jax.Array:
  """How many ascents the optimizer took; 0 without one."""
  is_ascent = lambda node: isinstance(node, asam_jax.AscentState)  # noqa: E731
  nodes = jax.tree.leaves(state, is_leaf=is_ascent)
  counts = [node.count for node in nodes if is_ascent(node)]
  return counts[0] if counts else jnp.zeros((), jnp.int32)
