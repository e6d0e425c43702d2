"""The methods of the frontier, each as it would be written in a training script."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import asam_jax


class Method(NamedTuple):
  """One row of the table.

  Attributes:
    make: ``(base_tx, rho, total_steps) -> optimizer``.
    label: its name in the table.
    memory: copies of the parameters in its state, over the base optimizer's.
    ascent_share: the part of the batch that the ascent gradient is taken on.
    gradients: at most so many of them in a step.
    has_radius: whether there is one to choose.
    epochs: its number of epochs over the others'.
    stops: whether a fifth of the training examples are held out, and of all epochs the
      one that is best on them (wrong labels included) is judged.
    door: whether the gradient comes from ``functional_value_and_grad``, and ``make``
      gives the optimizer that follows it.
  """

  make: Callable[[optax.GradientTransformation, Any, int], Any]
  label: str
  memory: int = 0
  ascent_share: float = 1.0
  gradients: int = 2
  has_radius: bool = True
  epochs: int = 1
  stops: bool = False
  door: bool = False


def _link(rho: Any, *before: Any, **options: Any) -> Any:
  chain = optax.chain(*before, asam_jax.ascent(rho, **options))
  return asam_jax.perturbed_gradient(chain)


def _sometimes(when: Callable[[int], Any], **options: Any) -> Any:
  return lambda base_tx, rho, total: optax.chain(
      asam_jax.sometimes(_link(rho), when(total), **options), base_tx
  )


def _combined(combine: Any) -> Any:
  return lambda base_tx, rho, total: optax.chain(
      asam_jax.combined(_link(rho), combine), base_tx
  )


def _ascending(*before: Any) -> Any:
  return lambda base_tx, rho, total: optax.chain(_link(rho, *before), base_tx)


def _weighted(clean: Any, perturbed: Any, alpha: float = 0.5) -> Any:
  return jax.tree.map(lambda g, h: g + alpha * (h - g), clean, perturbed)


def _half(step: jax.Array) -> jax.Array:
  return jax.random.bernoulli(jax.random.fold_in(jax.random.key(0), step), 0.5)


def _falling(total: int) -> asam_jax.Gate:
  return asam_jax.above_average(optax.linear_schedule(1.0, -1.0, total))


# SAM and Momentum-SAM have T = 1; all others T_w = |w| + 0.01.
METHODS: dict[str, Method] = {
    "sgd": Method(lambda base_tx, rho, total: base_tx, "SGD", gradients=1,
                  has_radius=False),
    "sgd_double": Method(
        lambda base_tx, rho, total: base_tx, "SGD, twice the epochs", gradients=1,
        has_radius=False, epochs=2,
    ),
    "sgd_best": Method(
        lambda base_tx, rho, total: base_tx, "SGD, best validation epoch", gradients=1,
        has_radius=False, stops=True,
    ),
    "asam": Method(_ascending(), "ASAM"),
    "auto": Method(
        lambda base_tx, rho, total: asam_jax.adaptive_sam(
            base_tx, asam_jax.auto_radius()
        ),
        "ASAM, auto radius",
        has_radius=False,
    ),
    "sam": Method(lambda base_tx, rho, total: asam_jax.sam(base_tx, rho), "SAM"),
    "momentum": Method(
        lambda base_tx, rho, total: asam_jax.momentum_sam(base_tx, rho),
        "adaptive Momentum-SAM",
        memory=1,
        gradients=1,
    ),
    "momentum_plain": Method(
        lambda base_tx, rho, total: asam_jax.momentum_sam(
            base_tx, rho, normalization="none"
        ),
        "Momentum-SAM",
        memory=1,
        gradients=1,
    ),
    "stale": Method(
        lambda base_tx, rho, total: asam_jax.carried(base_tx, asam_jax.ascent(rho)),
        "stale-gradient ASAM",
        memory=1,
        gradients=1,
    ),
    "every_2": Method(
        _sometimes(lambda total: lambda step: step % 2 == 0), "ASAM every 2nd step"
    ),
    "random_half": Method(
        _sometimes(lambda total: _half), "ASAM at a random half of steps"
    ),
    "last_half": Method(
        _sometimes(lambda total: asam_jax.late(total, 0.5)), "ASAM in the last half"
    ),
    "last_fifth": Method(
        _sometimes(lambda total: asam_jax.late(total, 0.2)), "ASAM in the last fifth"
    ),
    "looksam": Method(
        _sometimes(lambda total: lambda step: step % 5 == 0, reuse=0.7),
        "LookSAM (T_w), k = 5",
        memory=1,
    ),
    "ae_sam": Method(_sometimes(_falling), "AE-SAM (T_w)"),
    "part": Method(_ascending(), "ascent on 1/4 of the batch", ascent_share=0.25),
    "vasso": Method(_ascending(optax.ema(0.6)), "VaSSO (T_w)", memory=1),
    "friendly": Method(
        _ascending(asam_jax.subtract_ema(0.9)), "Friendly SAM (T_w)", memory=1
    ),
    "gsam": Method(_combined(asam_jax.surrogate_gap(0.4)), "GSAM (T_w)"),
    "weighted": Method(_combined(_weighted), "weighted mean (T_w), 0.5"),
    "stable": Method(_combined(asam_jax.renormalized), "StableSAM (T_w)"),
    "functional": Method(
        lambda base_tx, rho, total: base_tx, "Functional SAM (T_w)", door=True
    ),
    "iterated": Method(
        lambda base_tx, rho, total: optax.chain(
            asam_jax.perturbed_gradient(
                asam_jax.iterated(asam_jax.ascent(rho), 2)
            ),
            base_tx,
        ),
        "ASAM with 2 ascent steps",
        gradients=3,
    ),
}

ONE_GRADIENT = ("momentum", "momentum_plain", "stale")


def base_optimizer(lr: float, total: int) -> optax.GradientTransformation:
  """SGD with momentum, weight decay and a cosine schedule, as in the paper."""
  return optax.chain(
      optax.add_decayed_weights(5e-4),
      optax.sgd(optax.cosine_decay_schedule(lr, total), momentum=0.9),
  )


def clean_params(name: str, params: Any, opt_state: Any) -> Any:
  """The parameters to evaluate."""
  return asam_jax.eval_params(opt_state) if name in ONE_GRADIENT else params
