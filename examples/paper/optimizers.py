"""A configuration's optimizer: a base, and a method."""

import jax.numpy as jnp
import optax

from examples.paper import methods
from examples.paper.config import Config
from examples.paper.config import ConfigError


def check(config: Config) -> None:
  """Raises ConfigError for an unknown method or a radius that does not go with it.

  Likewise for a cosine that no radius can hold.
  """
  if config.method not in methods.METHODS:
    names = ", ".join(methods.METHODS)
    raise ConfigError(f"method={config.method!r}: unknown; take one of {names}.")
  if config.method in methods.WITHOUT_RADIUS and config.rho:
    raise ConfigError(
        f"rho={config.rho}: method={config.method!r} takes no radius; leave it 0, or"
        " choose another method."
    )
  if config.method not in methods.WITHOUT_RADIUS and not config.rho:
    raise ConfigError(
        f"rho=0: method={config.method!r} needs a radius above 0, or it is the plain"
        " optimizer at a higher price."
    )
  if not 0 < config.cosine < 1:
    raise ConfigError(f"cosine={config.cosine}: must be above 0 and below 1.")
  for field in ("rise", "budget"):
    if getattr(config, field) == 0:
      raise ConfigError(f"{field}=0: must be above 0.")
  if config.method == "m_sharpness":
    _check_m(config)


def _check_m(config: Config) -> None:
  if config.dataset == "parallel":
    raise ConfigError(
        "method='m_sharpness' needs batches of equal size, which text has not; take"
        " another method."
    )
  if config.batch_size % config.m:
    raise ConfigError(
        f"m={config.m}: does not divide batch_size={config.batch_size}; take a divisor."
    )


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


def make(config: Config, total: int) -> methods.Recipe:
  """The optimizer of a configuration for a run of so many steps."""
  check(config)
  method = methods.METHODS[config.method]
  return method(base_optimizer(config, total), config, total)
