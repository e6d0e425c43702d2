"""The steps that are compiled: under ``jit`` over all devices, and per device."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec
import optax

import asam_jax
from benchmarks.pod import compiler

RHO, RHO_SAM, ETA, DECAY = 0.5, 0.05, 0.01, 0.9
EVERY, REUSE = 5, 0.7  # LookSAM's k and alpha


class Method(NamedTuple):
  """A step that is compiled.

  Attributes:
    init: ``params -> state``.
    step: ``(params, state, batch) -> (params, state, loss)``.
    by_hand: the name of the hand-written step of the same method, if there is one.
    whole: whether it needs the whole parameters on each device.
  """

  init: Callable[[Any], Any]
  step: Callable[[Any, Any, Any], tuple[Any, Any, jax.Array]]
  by_hand: str | None = None
  whole: bool = False


def base_optimizer() -> optax.GradientTransformation:
  """SGD with momentum, the same for all."""
  return optax.sgd(0.1, momentum=DECAY)


def methods(loss: Any, mesh: Mesh) -> dict[str, Method]:
  """Every step, by name."""
  asam = asam_jax.adaptive_sam(base_optimizer(), RHO, ETA)
  looksam = asam_jax.looksam(
      base_optimizer(), RHO, EVERY, REUSE, geometry=asam_jax.Geometry(ETA)
  )
  adversary = optax.chain(optax.contrib.normalize(), optax.sgd(RHO_SAM))
  theirs = optax.contrib.sam(base_optimizer(), adversary, opaque_mode=True)

  def with_gradient(params: Any, batch: Any) -> dict[str, Any]:
    return {"grad_fn": lambda point: jax.grad(loss)(point, batch)}

  def with_their_gradient(params: Any, batch: Any) -> dict[str, Any]:
    return {"grad_fn": lambda point, _: jax.grad(loss)(point, batch)}

  def chosen(ascend: bool) -> Method:
    def extra(params: Any, batch: Any) -> dict[str, Any]:
      return with_gradient(params, batch) | {"ascend": ascend}

    return _one_update(looksam, loss, extra)

  def ours(tx: Any, by_hand: str) -> Method:
    return _one_update(tx, loss, with_gradient)._replace(by_hand=by_hand)

  sam = asam_jax.sam(base_optimizer(), RHO_SAM)
  return {
      "SGD": _one_update(base_optimizer(), loss),
      "ASAM by hand": _by_hand(loss, asam_point),
      "adaptive_sam": ours(asam, "ASAM by hand"),
      "SAM by hand": _by_hand(loss, sam_point),
      "sam": ours(sam, "SAM by hand"),
      "ASAM by hand, per device": _per_device(_by_hand(loss, asam_point, True), mesh),
      "adaptive_sam, per device": _per_device(
          ours(
              asam_jax.adaptive_sam(
                  base_optimizer(), RHO, ETA, axis_name=compiler.AXIS
              ),
              "ASAM by hand, per device",
          ),
          mesh,
      ),
      "momentum_sam": _one_update(
          asam_jax.momentum_sam(base_optimizer(), RHO, ETA), loss
      ),
      "LookSAM, each fifth step": chosen(ascend=True),
      "LookSAM, other steps": chosen(ascend=False),
      "optax.contrib.sam": _one_update(theirs, loss, with_their_gradient)._replace(
          by_hand="SAM by hand"
      ),
  }


def asam_point(params: Any, grads: Any) -> Any:
  """The point w + rho T^2 g / ||T g||, as a user would write it: biases have T = 1."""

  def factor(path: Any, w: jax.Array) -> jax.Array | float:
    return 1.0 if path[-1].key == "bias" else jnp.abs(w) + ETA

  factors = jax.tree_util.tree_map_with_path(factor, params)
  scaled = jax.tree.map(jnp.multiply, factors, grads)
  ratio = RHO / _norm(scaled)
  return jax.tree.map(
      lambda w, t, x: w + (ratio * t * x).astype(w.dtype), params, factors, scaled
  )


def sam_point(params: Any, grads: Any) -> Any:
  """The point w + rho g / ||g||, as a user would write it."""
  ratio = RHO_SAM / _norm(grads)
  return jax.tree.map(lambda w, g: w + (ratio * g).astype(w.dtype), params, grads)


def _norm(tree: Any) -> jax.Array:
  squares = [jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(tree)]
  return jnp.sqrt(jnp.asarray(sum(squares)))


def _by_hand(loss: Any, point: Any, per_device: bool = False) -> Method:
  tx = base_optimizer()

  def step(params: Any, state: Any, batch: Any) -> Any:
    value, grads = jax.value_and_grad(loss)(params, batch)
    grads = jax.grad(loss)(point(params, grads), batch)
    if per_device:
      grads = lax.pmean(grads, compiler.AXIS)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  return Method(tx.init, step)


def _one_update(tx: Any, loss: Any, extra: Any = None) -> Method:
  """A step of one update; ``extra(params, batch)`` are its extra arguments."""

  def step(params: Any, state: Any, batch: Any) -> Any:
    value, grads = jax.value_and_grad(loss)(params, batch)
    extra_args = extra(params, batch) if extra else {}
    updates, state = tx.update(grads, state, params, **extra_args)
    return optax.apply_updates(params, updates), state, value

  return Method(tx.init, step)


def _per_device(method: Method, mesh: Mesh) -> Method:
  """The step in ``shard_map``: each device ascends on its own share of the batch."""
  same, shared = PartitionSpec(), PartitionSpec(compiler.AXIS)

  def step(params: Any, state: Any, batch: Any) -> Any:
    params, state, value = method.step(params, state, batch)
    return params, state, lax.pmean(value, compiler.AXIS)

  # No check of what is the same on each device: it would make JAX sum the gradients
  # of parameters that are.
  mapped = functools.partial(
      jax.shard_map, mesh=mesh, out_specs=(same, same, same), check_vma=False
  )
  sharded = mapped(step, in_specs=(same, same, shared))
  return method._replace(step=sharded, whole=True)
