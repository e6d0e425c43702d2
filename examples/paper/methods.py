"""What a method makes of a base optimizer, and what its training step must know."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import asam_jax
from examples.paper.config import Config

# ``(params, inputs) -> (logits, aux)`` and ``(logits, inputs) -> loss``; what a door
# makes of the two is ``(params, inputs) -> ((loss, aux), gradient)``.
_Model = Callable[[Any, Any], tuple[Any, Any]]
_Loss = Callable[[Any, Any], Any]


def _whole(model: _Model, loss: _Loss) -> Callable[[Any, Any], tuple[Any, Any]]:
  """The loss of parameters."""

  def whole(params, inputs):
    logits, aux = model(params, inputs)
    return loss(logits, inputs), aux

  return whole


def _at_params(model: _Model, loss: _Loss) -> Callable[[Any, Any], Any]:
  """The gradient where the parameters are; what follows is the optimizer's affair."""
  return jax.value_and_grad(_whole(model, loss), has_aux=True)


class Recipe(NamedTuple):
  """An optimizer and what the training loop must know of it.

  Attributes:
    tx: the optimizer; its update takes ``grad_fn``.
    door: what takes the gradient that goes into the optimizer.
    losses: whether update takes ``value`` and ``value_fn`` in place of ``grad_fn``.
    ascend: which steps take the second gradient, decided by the host from the step
      count and passed to update as ``ascend``; None where the optimizer itself knows.
    carried: whether the parameters rest at w + epsilon, so that
      ``asam_jax.eval_params`` has those to judge.
    gradients: gradients a step, on average.
  """

  tx: optax.GradientTransformationExtraArgs
  door: Callable[[_Model, _Loss], Callable[[Any, Any], Any]] = _at_params
  losses: bool = False
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
  return Recipe(tx, ascend=when, gradients=1 + 1 / config.every)


def _late(base_tx, config, total):
  when = asam_jax.late(total, config.last)
  ascent_tx = asam_jax.ascent(config.rho, **_geometry(config))
  link = asam_jax.sometimes(asam_jax.perturbed_gradient(ascent_tx), when)
  tx = _extra(optax.chain(link, base_tx))
  return Recipe(tx, ascend=when, gradients=1 + config.last)


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


def _rise(base_tx, config, total):
  del total
  rule = asam_jax.rise_radius(config.rise)
  tx = asam_jax.adaptive_sam(base_tx, rule, **_geometry(config))
  return Recipe(tx, losses=True)


def _loss_budget(base_tx, config, total):
  del total
  rule = asam_jax.loss_budget(config.budget, rho_max=config.rho)
  return Recipe(asam_jax.adaptive_sam(base_tx, rule, **_geometry(config)))


def _iterated(base_tx, config, total):
  del total
  ascent_tx = asam_jax.ascent(config.rho, **_geometry(config))
  link = asam_jax.perturbed_gradient(
      asam_jax.iterated(ascent_tx, config.ascent_steps)
  )
  tx = _extra(optax.chain(link, base_tx))
  return Recipe(tx, gradients=1.0 + config.ascent_steps)


def _combined(combine: Callable[[Config], Callable[[Any, Any], Any]]) -> _Method:
  """What is made of the clean and the perturbed gradient."""

  def method(base_tx, config, total):
    del total
    ascent_tx = asam_jax.ascent(config.rho, **_geometry(config))
    link = asam_jax.perturbed_gradient(ascent_tx)
    link = asam_jax.combined(link, combine(config))
    return Recipe(_extra(optax.chain(link, base_tx)))

  return method


def _weighted(config: Config) -> Callable[[Any, Any], Any]:
  weight = config.weight
  return lambda clean, perturbed: jax.tree.map(
      lambda g, h: g + weight * (h - g), clean, perturbed
  )


def _functional(base_tx, config, total):
  del total
  geometry = _geometry(config)

  def door(model, loss):
    return asam_jax.functional_value_and_grad(
        model, loss, has_aux=True, rho=config.rho, **geometry
    )

  return Recipe(_extra(base_tx), door)


def _m_sharpness(base_tx, config, total):
  del total
  geometry = _geometry(config)

  def door(model, loss):
    return asam_jax.value_and_grad(
        _whole(model, loss), has_aux=True, rho=config.rho, m_sharpness=config.m,
        **geometry,
    )

  return Recipe(_extra(base_tx), door)


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
    "stable": _combined(lambda config: asam_jax.renormalized),
    "weighted": _combined(_weighted),
    "iterated": _iterated,
    "functional": _functional,
    "m_sharpness": _m_sharpness,
    "rise": _rise,
    "loss_budget": _loss_budget,
}

# Methods that are given no radius.
WITHOUT_RADIUS = ("plain", "auto", "rise")
