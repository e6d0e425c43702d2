"""Compositions that compute something else than their reader thinks: all raise."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import asam_jax

W = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}


def loss(w):
  return jnp.sum((w["kernel"] + w["bias"]) ** 2)


def link(**options):
  return asam_jax.perturbed_gradient(asam_jax.ascent(0.1), **options)


BUILDERS = {
    "adaptive_sam": asam_jax.adaptive_sam,
    "sam": asam_jax.sam,
    "looksam": asam_jax.looksam,
    "ae_sam": asam_jax.ae_sam,
    "gsam": asam_jax.gsam,
    "friendly_sam": asam_jax.friendly_sam,
    "vasso": asam_jax.vasso,
    "momentum_sam": asam_jax.momentum_sam,
    "carried": lambda base: asam_jax.carried(base, asam_jax.ascent()),
    "skip_nonfinite": lambda base: asam_jax.skip_nonfinite(base, link()),
}
WHOLE = {
    name: lambda build=build: build(optax.sgd(0.1)) for name, build in BUILDERS.items()
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_optimizer_is_no_link_no_ascent_and_no_base(name):
  whole = WHOLE[name]()
  for build in (
      lambda: asam_jax.sometimes(whole, lambda step: True),
      lambda: asam_jax.combined(whole, asam_jax.surrogate_gap(0.1)),
      lambda: asam_jax.skip_nonfinite(optax.sgd(0.1), whole),
  ):
    with pytest.raises(TypeError, match="link is a whole optimizer"):
      build()
  for build in (
      lambda: asam_jax.perturbed_gradient(whole),
      lambda: asam_jax.carried(optax.sgd(0.1), whole),
      lambda: asam_jax.iterated(whole, 2),
  ):
    with pytest.raises(TypeError, match="ascent_tx is a transformation that takes the"):
      build()
  for build in (
      lambda: asam_jax.adaptive_sam(whole),
      lambda: asam_jax.momentum_sam(whole),
      lambda: asam_jax.looksam(whole),
      lambda: asam_jax.carried(whole, asam_jax.ascent()),
      lambda: asam_jax.skip_nonfinite(whole, link()),
  ):
    with pytest.raises(TypeError, match="base_tx perturbs by itself"):
      build()


def test_whole_optimizers_that_a_wrapper_hides():
  hidden = optax.chain(asam_jax.adaptive_sam(optax.sgd(0.1)), optax.identity())
  with pytest.raises(TypeError, match="link is GradientTransformationExtraArgs"):
    asam_jax.sometimes(hidden, lambda step: True)
  for tx in (
      asam_jax.perturbed_gradient(hidden),
      asam_jax.adaptive_sam(hidden),
      asam_jax.carried(hidden, asam_jax.ascent()),
  ):
    with pytest.raises(TypeError, match="ASAM twice"):
      tx.init(W)
  # Written by hand it has no mark, but is no link either.
  by_hand = optax.chain(link(), optax.sgd(0.1))
  with pytest.raises(TypeError, match="link is GradientTransformationExtraArgs"):
    asam_jax.combined(by_hand, asam_jax.surrogate_gap(0.1))


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize(
    "ascent", [asam_jax.ascent(), optax.chain(optax.clip(1.0), asam_jax.ascent())],
    ids=["alone", "chained"])
def test_an_ascent_is_no_base(build, ascent):
  with pytest.raises(TypeError, match="base_tx contains an ascent"):
    build(ascent).init(W)


def test_swapped_arguments():
  with pytest.raises(TypeError, match="base_tx perturbs by itself"):
    asam_jax.skip_nonfinite(link(), optax.sgd(0.1))
  with pytest.raises(TypeError, match="base_tx contains an ascent"):
    asam_jax.carried(asam_jax.ascent(), optax.sgd(0.1)).init(W)
  with pytest.raises(TypeError, match=r"rho=.* must be one real number"):
    asam_jax.adaptive_sam(0.5, optax.sgd(0.1))  # pyright: ignore


def test_asam_twice_where_the_gradient_comes_from_our_door():
  tx = asam_jax.adaptive_sam(optax.sgd(0.1))

  def step(w, state):
    _, grads = asam_jax.value_and_grad(loss)(w)
    return tx.update(grads, state, w, grad_fn=jax.grad(loss))

  for run in (step, jax.jit(step)):
    with pytest.raises(ValueError, match="this would be ASAM twice"):
      run(W, tx.init(W))
  grads = jax.grad(loss)(W)
  with pytest.raises(ValueError, match="this would be ASAM twice"):
    tx.update(grads, tx.init(W), W, grad_fn=asam_jax.grad(loss))


def test_the_gradient_of_our_door_is_right_for_a_base_optimizer():
  tx = optax.sgd(0.1)

  @jax.jit
  def step(w, state):
    _, grads = asam_jax.value_and_grad(loss)(w)
    return tx.update(grads, state, w)

  step(W, tx.init(W))
  carried = asam_jax.carried(tx, asam_jax.ascent())  # its ascent is another
  carried.update(asam_jax.grad(loss)(W), carried.init(W), W)


@pytest.mark.parametrize(
    "combine",
    [lambda g, h: None, lambda g, h: jnp.zeros(()), lambda g, h: (g, h),
     lambda g, h: jax.tree.map(lambda x: x[:1], h)],
)
def test_a_combination_that_is_no_gradient(combine):
  tx = asam_jax.combined(link(), combine)
  with pytest.raises(TypeError, match="the result of combine="):
    tx.update(W, tx.init(W), W, grad_fn=jax.grad(loss))


# What inject_hyperparams does to arguments that are functions.


@pytest.mark.parametrize("make", [asam_jax.adaptive_sam, asam_jax.momentum_sam])
def test_functions_as_arguments_under_inject_hyperparams(make):
  options = {
      "normalize": lambda path, leaf: True,
      "perturb": asam_jax.is_not_bias,
      "normalization": functools.partial(asam_jax.filterwise, filter_axis=0),
  }
  injected = optax.inject_hyperparams(make, static_args=("p",))(
      base_tx=optax.sgd(0.1, momentum=0.9), rho=optax.constant_schedule(0.3), **options
  )
  plain = make(optax.sgd(0.1, momentum=0.9), 0.3, **options)
  extra = {"grad_fn": jax.grad(loss)}
  got, state = injected.update(W, injected.init(W), W, **extra)
  expected, _ = plain.update(W, plain.init(W), W, **extra)
  chex.assert_trees_all_close(got, expected, rtol=1e-6)
  assert state.hyperparams["rho"] == jnp.float32(0.3)


def test_sam_keeps_a_predicate_under_inject_hyperparams():
  injected = optax.inject_hyperparams(asam_jax.sam, static_args="p")(
      base_tx=optax.sgd(0.1), rho=0.1, perturb=asam_jax.is_not_bias
  )
  injected.update(W, injected.init(W), W, grad_fn=jax.grad(loss))


def test_an_ascent_keeps_its_functions_under_inject_hyperparams():
  options = {"normalize": lambda path, leaf: True, "perturb": asam_jax.is_not_bias}
  injected = optax.inject_hyperparams(asam_jax.ascent, static_args="p")(
      rho=optax.constant_schedule(0.3), **options)
  got, _ = injected.update(W, injected.init(W), W)
  plain = asam_jax.ascent(0.3, **options)
  chex.assert_trees_all_close(got, plain.update(W, plain.init(W), W)[0], rtol=1e-6)


def test_a_number_that_decides_what_is_compiled_says_so():
  injected = optax.inject_hyperparams(asam_jax.looksam)(
      base_tx=optax.sgd(0.1), k=5)
  with pytest.raises(TypeError, match=r'k=.* no array; .* static_args=\("k",\)'):
    injected.init(W)


def test_a_predicate_that_is_called_as_a_schedule_says_so():
  with pytest.raises(TypeError, match=r"static_args=\(\"normalize\""):
    asam_jax.is_not_bias(jnp.zeros((), jnp.int32), None)
