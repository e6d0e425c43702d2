"""A configuration's optimizer: a base, and what a method makes of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import asam_jax
from examples.paper.config import Config
from examples.paper.config import ConfigError


class Recipe(NamedTuple):
  """An optimizer and what the training loop must know of it.

  Attributes:
    tx: the optimizer; its update takes ``grad_fn``.
    ascend: which steps take the second gradient, decided by the host from the step
      count and passed to update as ``ascend``; None where the optimizer itself knows.
    carried: whether the parameters rest at w + epsilon, so that
      ``asam_jax.eval_params`` has those to judge.
    gradients: gradients a step, on average.
  """

  tx: optax.GradientTransformationExtraArgs
  ascend: Callable[[int], bool] | None = None
  carried: bool = False
  gradients: float = 2.0


_Method = Callable[[optax.GradientTransformation, Config, int], Recipe]


def _geometry(config: Config, normalization: str | None = None) -> dict[str, Any]:
  """The keywords of the library's doors."""
  everything = lambda path, leaf: True  # noqa: E731
  return {
      "eta": config.eta,
      "p": config.p,
      "normalization": normalization or config.normalization,
      "normalize": everything if config.normalize_bias else None,
  }


def _as_object(config: Config) -> asam_jax.Geometry:
  """The same, as the aliases take it."""
  return asam_jax.Geometry(**_geometry(config))


def _extra(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  return optax.with_extra_args_support(tx)


def _plain(base_tx, config, total):
  del config, total
  return Recipe(_extra(base_tx), gradients=1.0)


def _sam(base_tx, config, total):
  del total
  return Recipe(asam_jax.sam(base_tx, config.rho, config.p))


def _asam(base_tx, config, total):
  del total
  return Recipe(asam_jax.adaptive_sam(base_tx, config.rho, **_geometry(config)))


def _auto(base_tx, config, total):
  del total
  rule = asam_jax.auto_radius(config.cosine)
  return Recipe(asam_jax.adaptive_sam(base_tx, rule, **_geometry(config)))


def _momentum(normalization: str | None) -> _Method:
  def method(base_tx, config, total):
    del total
    geometry = _geometry(config, normalization)
    tx = asam_jax.momentum_sam(base_tx, config.rho, **geometry)
    return Recipe(tx, carried=True, gradients=1.0)

  return method


def _stale(base_tx, config, total):
  del total
  ascent_tx = asam_jax.ascent(config.rho, **_geometry(config))
  return Recipe(asam_jax.carried(base_tx, ascent_tx), carried=True, gradients=1.0)


def _looksam(base_tx, config, total):
  del total
  tx = asam_jax.looksam(
      base_tx, config.rho, config.every, config.reuse, geometry=_as_object(config)
  )
  # The same rule, for the host: XLA's CPU code is slow inside a condition.
  when = lambda step: step % config.every == 0  # noqa: E731
  return Recipe(tx, when, gradients=1 + 1 / config.every)


def _late(base_tx, config, total):
  when = asam_jax.late(total, config.last)
  ascent_tx = asam_jax.ascent(config.rho, **_geometry(config))
  link = asam_jax.sometimes(asam_jax.perturbed_gradient(ascent_tx), when)
  return Recipe(_extra(optax.chain(link, base_tx)), when, gradients=1 + config.last)


def _ae_sam(base_tx, config, total):
  threshold = optax.linear_schedule(1.0, -1.0, total)
  tx = asam_jax.ae_sam(base_tx, config.rho, threshold, geometry=_as_object(config))
  # The gate looks at the gradient, so it decides on the device; half, by its design.
  return Recipe(tx, gradients=1.5)


def _alias(make: Callable[..., Any]) -> _Method:
  """A method of two gradients a step, with the library's own defaults."""

  def method(base_tx, config, total):
    del total
    return Recipe(make(base_tx, config.rho, geometry=_as_object(config)))

  return method


METHODS: dict[str, _Method] = {
    "plain": _plain,
    "sam": _sam,
    "asam": _asam,
    "auto": _auto,
    "momentum_sam": _momentum("none"),
    "adaptive_momentum_sam": _momentum(None),
    "stale": _stale,
    "looksam": _looksam,
    "late": _late,
    "ae_sam": _ae_sam,
    "gsam": _alias(asam_jax.gsam),
    "vasso": _alias(asam_jax.vasso),
    "friendly_sam": _alias(asam_jax.friendly_sam),
}

# Methods that are given no radius.
WITHOUT_RADIUS = ("plain", "auto")


def check(config: Config) -> None:
  """Raises ConfigError for an unknown method or a radius that does not go with it.

  Likewise for a cosine that no radius can hold.
  """
  if config.method not in METHODS:
    names = ", ".join(METHODS)
    raise ConfigError(f"method={config.method!r}: unknown; take one of {names}.")
  if config.method in WITHOUT_RADIUS and config.rho:
    raise ConfigError(
        f"rho={config.rho}: method={config.method!r} takes no radius; leave it 0, or"
        " choose another method."
    )
  if config.method not in WITHOUT_RADIUS and not config.rho:
    raise ConfigError(
        f"rho=0: method={config.method!r} needs a radius above 0, or it is the plain"
        " optimizer at a higher price."
    )
  if not 0 < config.cosine < 1:
    raise ConfigError(f"cosine={config.cosine}: must be above 0 and below 1.")


def _inverse_sqrt(rate: float, first: int) -> optax.Schedule:
  # join_schedules asks for steps below 0 too, and has no use for the answer.
  return lambda step: rate * (first / (first + jnp.maximum(step, 0))) ** 0.5


def learning_rate(config: Config, total: int) -> optax.Schedule:
  """The learning rate at each of the total steps."""
  rate, warmup = config.learning_rate, config.warmup
  if warmup >= total:
    raise ConfigError(f"warmup={warmup}: the whole run has {total} steps.")
  if config.schedule == "cosine":
    after = optax.cosine_decay_schedule(rate, total - warmup)
  elif config.schedule == "inverse_sqrt":
    after = _inverse_sqrt(rate, max(warmup, 1))
  else:
    after = optax.constant_schedule(rate)
  if not warmup:
    return after
  rise = optax.linear_schedule(0.0, rate, warmup)
  return optax.join_schedules([rise, after], [warmup])


def base_optimizer(config: Config, total: int) -> optax.GradientTransformation:
  """The base optimizer, with clipping and weight decay inside."""
  rate, decay = learning_rate(config, total), config.weight_decay
  links = [optax.clip_by_global_norm(config.clip)] if config.clip else []
  if config.base != "adamw" and decay:
    links.append(optax.add_decayed_weights(decay))
  if config.base == "sgd":
    links.append(optax.sgd(rate, momentum=config.momentum or None))
  elif config.base == "adam":
    links.append(optax.adam(rate, config.momentum, config.beta2))
  else:
    links.append(
        optax.adamw(rate, config.momentum, config.beta2, weight_decay=decay)
    )
  return optax.chain(*links)


def make(config: Config, total: int) -> Recipe:
  """The optimizer of a configuration for a run of so many steps."""
  check(config)
  return METHODS[config.method](base_optimizer(config, total), config, total)
