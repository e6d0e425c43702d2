"""Momentum-SAM goes downhill, whatever the base optimizer keeps and in which order."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax

START = {"bias": jnp.array([0.3, -0.2]), "kernel": jnp.array([[1.0, -2], [0.5, 1.5]])}
CURVATURE = {"bias": jnp.array([1.0, 4]), "kernel": jnp.array([[1.0, 2], [3, 1]])}


def loss(w):
  terms = jax.tree.map(lambda c, x: 0.5 * jnp.sum(c * x**2), CURVATURE, w)
  return sum(jax.tree.leaves(terms))


def aliases():
  """Every optimizer alias of this Optax, with a learning rate where it takes one."""
  needs_more = {  # what it takes beside a gradient, or why it is none
      "lbfgs": "a line search over value_fn",
      "polyak_sgd": "the loss value",
      "noisy_sgd": "noise that may point uphill",
      "optimistic_adam": "deprecated, and its successor is tried",
  }
  found = {}
  for name, make in sorted(vars(optax).items()):
    if not callable(make) or name.startswith("_") or inspect.isclass(make):
      continue
    if getattr(make, "__module__", "") != "optax._src.alias":
      continue
    if needs_more.get(name):
      continue
    found[name] = make
  return found


ALIASES = aliases()
EXTRA = {
    "sgd": {"momentum": 0.9},
    "rmsprop": {"momentum": 0.9},
    "lars": {"momentum": 0.9},
}
CHAINS = {
    "learning rate, then trace": lambda: optax.chain(
        optax.scale_by_learning_rate(0.05), optax.trace(0.9)
    ),
    "trace, then learning rate": lambda: optax.chain(
        optax.trace(0.9), optax.scale_by_learning_rate(0.05)
    ),
    "decay before momentum": lambda: optax.chain(
        optax.add_decayed_weights(1e-3), optax.sgd(0.05, momentum=0.9)
    ),
    "clip before adam": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(0.05)
    ),
    "two momenta": lambda: optax.chain(optax.trace(0.5), optax.adam(0.05)),
    "nesterov": lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
    "a part has momentum": lambda: optax.chain(
        optax.masked(optax.trace(0.9), {"kernel": True, "bias": False}),
        optax.scale_by_learning_rate(0.05),
    ),
    "no momentum": lambda: optax.sgd(0.05),
    "injected": lambda: optax.inject_hyperparams(optax.sgd)(0.05, momentum=0.9),
}


def make(name):
  if name in CHAINS:
    return CHAINS[name]()
  factory = ALIASES[name]
  options = dict(EXTRA.get(name, {}))
  if "learning_rate" in inspect.signature(factory).parameters:
    options["learning_rate"] = 0.01
  return factory(**options)


@pytest.mark.parametrize("name", [*CHAINS, *ALIASES])
def test_the_perturbation_points_downhill(name):
  tx = asam_jax.momentum_sam(make(name), rho=0.01)

  @jax.jit
  def run(w):
    state = tx.init(w)
    for _ in range(3):  # all steps from one side of the valley: momentum is downhill
      updates, state = tx.update(jax.grad(loss)(w), state, w)
      w = optax.apply_updates(w, updates)
    clean = asam_jax.eval_params(state)
    return loss(w), loss(clean), jax.tree.map(lambda a, b: a - b, w, clean)

  at_perturbed, at_clean, epsilon = run(START)
  assert at_perturbed < at_clean
  length = asam_jax.Geometry().norm(epsilon, jax.tree.map(lambda x: x, START))
  assert 0 < length < 0.1


def test_at_least_the_usual_aliases_are_tried():
  assert {"sgd", "adam", "adamw", "lion", "lars", "rmsprop", "lamb"} <= set(ALIASES)


@pytest.mark.parametrize("name", [
    "trace, then learning rate", "learning rate, then trace", "decay before momentum"
])
def test_perturbation_of_sgd_with_momentum_against_numpy(name):
  decay = 1e-3 if name == "decay before momentum" else 0.0
  tx = asam_jax.momentum_sam(make(name), rho=0.3, eta=0.01, p=2)
  w = START
  state = tx.init(w)
  clean = {k: np.asarray(x, np.float64) for k, x in w.items()}
  velocity = {k: np.zeros_like(x) for k, x in clean.items()}
  for _ in range(3):
    grads = jax.grad(loss)(w)
    updates, state = tx.update(grads, state, w)
    w = optax.apply_updates(w, updates)
    velocity = {
        k: 0.9 * velocity[k] + np.asarray(grads[k], np.float64) + decay * clean[k]
        for k in clean
    }
    clean = {k: clean[k] - 0.05 * velocity[k] for k in clean}
    t = {"kernel": np.abs(clean["kernel"]) + 0.01, "bias": np.ones(2)}
    norm = np.sqrt(sum(((t[k] * velocity[k]) ** 2).sum() for k in clean))
    expected = {k: clean[k] - 0.3 * t[k] ** 2 * velocity[k] / norm for k in clean}
    chex.assert_trees_all_close(w, expected, rtol=1e-5, atol=1e-6)


def test_a_momentum_of_base_is_not_kept_twice():
  has, has_not = optax.sgd(0.1, momentum=0.9), optax.sgd(0.1)
  assert asam_jax.momentum_sam(has).init(START).ascent.trace == ()
  own = asam_jax.momentum_sam(has_not).init(START).ascent.trace
  chex.assert_trees_all_equal_shapes(own, START)


def test_default_decay_of_the_own_trace():
  grads = jax.tree.map(jnp.ones_like, START)
  tx = asam_jax.momentum_sam(optax.sgd(0.1))
  state = tx.init(START)
  for _ in range(2):
    _, state = tx.update(grads, state, START)
  chex.assert_trees_all_close(
      state.ascent.trace, jax.tree.map(lambda g: 1.9 * g, grads), rtol=1e-6
  )


@pytest.mark.parametrize("options", [
    {"normalize": lambda path, leaf: True}, {"normalization": "none"},
    {"normalization": "layerwise"}, {"perturb": asam_jax.is_not_bias}, {"p": 1},
    {"p": float("inf")}, {"eta": 1.0}, {"rho": 0.1},
], ids=lambda options: "-".join(options))
def test_options_are_those_of_the_ascent(options):
  tx = asam_jax.momentum_sam(optax.sgd(0.1, momentum=0.9), **options)
  grads = jax.grad(loss)(START)
  updates, state = tx.update(grads, tx.init(START), START)
  clean = asam_jax.eval_params(state)
  ascent_tx = asam_jax.ascent(**options)
  epsilon, _ = ascent_tx.update(grads, ascent_tx.init(clean), clean)
  expected = jax.tree.map(lambda w, e: w - e, clean, epsilon)
  chex.assert_trees_all_close(optax.apply_updates(START, updates), expected, atol=1e-6)


def test_a_decay_may_be_injected_and_is_checked():
  injected = optax.inject_hyperparams(asam_jax.momentum_sam, static_args=("p",))(
      base_tx=optax.sgd(0.1), decay=0.5
  )
  injected.update(START, injected.init(START), START)
  for decay in (-0.1, 1.0, jnp.array(1.5)):
    with pytest.raises(ValueError, match="decay="):
      asam_jax.momentum_sam(optax.sgd(0.1), decay=decay)


def test_integer_gradients_raise():
  tx = asam_jax.momentum_sam(optax.sgd(0.1))
  grads = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.int32), START)
  with pytest.raises(TypeError, match="int32"):
    tx.update(grads, tx.init(START), START)
