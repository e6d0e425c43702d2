"""Radius rules: against NumPy, in every door, and where they can't be had."""

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
import asam_jax.nnx
from benchmarks import timing

START = {"kernel": jnp.array([[1.0, -2.0], [0.5, 1.5]]), "bias": jnp.array([0.5, -1.0])}
LR = 0.01


def loss(w, scale=1.0):
  z = w["kernel"] @ jnp.array([1.0, 2.0]) + w["bias"]
  return scale * jnp.sum(z**4) / 10 + 0.1 * jnp.sum(w["kernel"] ** 2)


def numpy_loss_and_grad(kernel, bias):
  x = np.array([1.0, 2.0])
  z = kernel @ x + bias
  slope = 0.4 * z**3
  return (z**4).sum() / 10 + 0.1 * (kernel**2).sum(), (
      np.outer(slope, x) + 0.2 * kernel, slope)


def numpy_run(steps, next_rho):
  """Radii and weights of the equations in float64, with SGD."""
  kernel, bias = (np.asarray(START[name], np.float64) for name in ("kernel", "bias"))
  rho, radii = 0.0, []
  for _ in range(steps):
    value, (gk, gb) = numpy_loss_and_grad(kernel, bias)
    tk = np.abs(kernel) + 0.01
    norm = np.sqrt(((tk * gk) ** 2).sum() + (gb**2).sum())
    after, (hk, hb) = numpy_loss_and_grad(
        kernel + rho * tk**2 * gk / norm, bias + rho * gb / norm)
    g, h = np.append(gk, gb), np.append(hk, hb)
    cosine = g @ h / np.linalg.norm(g) / np.linalg.norm(h)
    kernel, bias = kernel - LR * hk, bias - LR * hb
    rho = 0.05 / norm if rho == 0 else rho * next_rho(cosine, value, after)
    radii.append(rho)
  return radii, kernel, bias


def by_cosine(cosine, value, after):
  return np.exp(0.05 * np.clip((cosine - 0.9) / 0.1, -1, 1))


def by_rise(cosine, value, after):
  rise = np.sqrt(after) - np.sqrt(value)
  return np.exp(0.05 * np.clip((0.3 - rise) / 0.3, -1, 1))


def step_function(tx, loss=loss):
  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params, value=value, value_fn=loss)
    return optax.apply_updates(params, updates), state

  return step


RULES = {
    "auto_radius": (asam_jax.auto_radius(0.9), by_cosine),
    "rise_radius": (asam_jax.rise_radius(0.3), by_rise),
}
EACH = pytest.mark.parametrize("name", RULES)


def radius_of(state):
  return optax.tree_utils.tree_get(state, "rho")


@EACH
def test_a_run_is_that_of_the_equations(name):
  rule, next_rho = RULES[name]
  tx = asam_jax.adaptive_sam(optax.sgd(LR), rule)
  params, state, step, radii = START, tx.init(START), None, []
  step = step_function(tx)
  for _ in range(40):
    params, state = step(params, state)
    radii.append(float(radius_of(state)))
  expected, kernel, bias = numpy_run(40, next_rho)
  np.testing.assert_allclose(radii, expected, rtol=1e-4)
  np.testing.assert_allclose(params["kernel"], kernel, rtol=1e-4)
  np.testing.assert_allclose(params["bias"], bias, rtol=1e-4)
  assert step._cache_size() == 1
  assert max(radii) / min(radii) > 3  # it has moved


@EACH
def test_function_doors_go_the_same_way(name):
  rule, _ = RULES[name]
  tx = asam_jax.adaptive_sam(optax.sgd(LR), rule)
  params, state = START, tx.init(START)
  others, radius = START, rule.init()
  grad = jax.jit(asam_jax.grad(loss, rho=rule))
  step = step_function(tx)
  for _ in range(20):
    params, state = step(params, state)
    grads, radius = grad(others, radius=radius)
    others = jax.tree.map(lambda w, g: w - LR * g, others, grads)
  chex.assert_trees_all_close(params, others, rtol=1e-5)
  np.testing.assert_allclose(radius.rho, radius_of(state), rtol=1e-5)


def test_the_target_is_reached_where_nothing_else_moves():
  tx = asam_jax.adaptive_sam(optax.sgd(0.0), asam_jax.auto_radius(0.9), with_info=True)
  step, state = step_function(tx), tx.init(START)
  for _ in range(600):
    _, state = step(START, state)
  info = optax.tree_utils.tree_get(state, "info")
  np.testing.assert_allclose(info.cosine, 0.9, atol=1e-3)
  tx = asam_jax.adaptive_sam(optax.sgd(0.0), asam_jax.rise_radius(0.3), with_info=True)
  step, state = step_function(tx), tx.init(START)
  for _ in range(600):
    _, state = step(START, state)
  info = optax.tree_utils.tree_get(state, "info")
  rise = jnp.sqrt(info.perturbed_value) - jnp.sqrt(info.value)
  np.testing.assert_allclose(rise, 0.3, atol=1e-3)


def test_the_radius_follows_the_scale_of_the_weights():
  """With T = 1 and weights ten times as large, the radius is ten times as large."""
  rule = asam_jax.auto_radius(0.9)
  radii = []
  for scale in (1.0, 10.0):
    tx = asam_jax.sam(optax.sgd(LR * scale**2), rule)
    params = jax.tree.map(lambda w, scale=scale: scale * w, START)
    step = step_function(tx, lambda w, scale=scale: loss(
        jax.tree.map(lambda x: x / scale, w)))
    state = tx.init(params)
    for _ in range(30):
      params, state = step(params, state)
    radii.append(radius_of(state))
  np.testing.assert_allclose(radii[1], 10 * radii[0], rtol=1e-4)


def test_the_defaults_are_those_that_were_chosen():
  rule, w = asam_jax.auto_radius(), jnp.array([1.0, 0.0])
  for cosine, factor in ((0.8, 1.0), (1.0, np.exp(0.05)), (0.6, np.exp(-0.05))):
    there = jnp.array([cosine, np.sqrt(1 - cosine**2)])
    observed = asam_jax.Observed(w, w, there, None, None, jnp.float32(1))
    state = rule.update(asam_jax.AutoRadiusState(jnp.float32(2)), observed)
    np.testing.assert_allclose(state.rho, 2 * factor, rtol=1e-5)


def test_the_budget_is_the_sharpness_to_first_order():
  tx = asam_jax.sam(optax.sgd(0.1), asam_jax.loss_budget(0.25, rho_max=0.5))
  grads = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.zeros(2)}  # of norm 4
  same = {"grad_fn": lambda w: grads}
  _, state = tx.update(grads, tx.init(START), START, **same)
  assert optax.tree_utils.tree_get(state, "sharpness") == 0.25
  small = jax.tree.map(lambda g: g / 100, grads)  # the radius would be 6.25
  _, state = tx.update(small, tx.init(START), START, grad_fn=lambda w: small)
  np.testing.assert_allclose(
      optax.tree_utils.tree_get(state, "sharpness"), 0.5 * 0.04, rtol=1e-6)
  zero = jax.tree.map(jnp.zeros_like, grads)
  updates, _ = tx.update(zero, tx.init(START), START, grad_fn=lambda w: zero)
  chex.assert_trees_all_equal(updates, zero)


def test_the_budget_may_be_a_schedule():
  rule = asam_jax.loss_budget(lambda step: 0.5 - 0.1 * step)
  tx = asam_jax.adaptive_sam(optax.sgd(LR), rule)
  step, params, state, seen = step_function(tx), START, tx.init(START), []
  for _ in range(3):
    params, state = step(params, state)
    seen.append(float(optax.tree_utils.tree_get(state, "sharpness")))
  np.testing.assert_allclose(seen, [0.5, 0.4, 0.3], rtol=1e-6)
  with pytest.raises(TypeError, match="no step count"):
    asam_jax.value_and_grad(loss, rho=rule)(START, radius=rule.init())


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 0.0])
def test_a_step_that_says_nothing_leaves_the_radius(bad):
  tx = asam_jax.adaptive_sam(optax.sgd(LR), asam_jax.auto_radius(0.9))
  params, state = START, tx.init(START)
  for _ in range(3):
    params, state = step_function(tx)(params, state)
  before = radius_of(state)
  grads = jax.tree.map(lambda w: jnp.full_like(w, bad), START)
  _, state = tx.update(grads, state, START, grad_fn=jax.grad(loss))
  assert radius_of(state) == before > 0


def test_a_linear_loss_stops_at_the_largest_radius():
  tx = asam_jax.sam(optax.sgd(LR), asam_jax.auto_radius(rho_max=2.0))
  grads = jax.tree.map(jnp.ones_like, START)
  state = tx.init(START)
  for _ in range(120):
    _, state = tx.update(grads, state, START, grad_fn=lambda w: grads)
  assert radius_of(state) == 2


@EACH
def test_a_first_batch_without_a_gradient_does_no_harm(name):
  rule, _ = RULES[name]
  tx = asam_jax.adaptive_sam(optax.sgd(LR / 100), rule)

  @jax.jit
  def step(params, state, scale):
    scaled = lambda w: loss(w, scale)  # noqa: E731
    value, grads = jax.value_and_grad(scaled)(params)
    updates, state = tx.update(grads, state, params, value=value, value_fn=scaled)
    return optax.apply_updates(params, updates), state

  ends = []
  for first in (0.0, 1.0):
    faded = {"kernel": first * START["kernel"] + 1e-5, "bias": first * START["bias"]}
    state = step(faded, tx.init(faded), 1.0)[1]
    if not first:
      assert radius_of(state) > 1e3
    params = START
    for _ in range(300):
      params, state = step(params, state, 1.0)
    ends.append((loss(params), radius_of(state)))
  np.testing.assert_allclose(*ends, rtol=0.5)


@EACH
def test_derivatives_where_gradient_or_loss_is_zero(name):
  rule, _ = RULES[name]
  door = asam_jax.value_and_grad(lambda w, x: jnp.sum((w * x) ** 2), rho=rule)

  def two_steps(w, x):
    radius = rule.init()
    for _ in range(2):
      _, grads, radius = door(w, x, radius=radius)
      w = w - 0.1 * grads
    return jnp.sum(w)

  np.testing.assert_array_equal(jax.grad(two_steps)(jnp.ones(2), jnp.zeros(2)), 1)


def test_the_target_may_be_injected():
  def make(base_tx, cosine):
    return asam_jax.adaptive_sam(base_tx, asam_jax.auto_radius(cosine))

  injected = optax.inject_hyperparams(make)(base_tx=optax.sgd(LR), cosine=0.9)
  plain = make(optax.sgd(LR), 0.9)
  ends = []
  for tx in (injected, plain):
    step, params, state = step_function(tx), START, tx.init(START)
    for _ in range(5):
      params, state = step(params, state)
    ends.append((params, radius_of(state)))
  chex.assert_trees_all_close(*ends, rtol=1e-6)


def test_microbatches_of_a_door_share_its_radius():
  xs = jax.random.normal(jax.random.key(0), (8, 2))
  of_batch = lambda w, xs: jnp.mean((xs @ w["kernel"] + w["bias"]) ** 4)  # noqa: E731
  rule = asam_jax.auto_radius(0.9)
  door = asam_jax.value_and_grad(of_batch, rho=rule)
  radius = asam_jax.AutoRadiusState(jnp.float32(0.01), jnp.float32(100))
  _, _, got = asam_jax.microbatched(door, 4)(START, xs, radius=radius)
  each = [door(START, xs[i::2], radius=radius)[2].rho for i in range(2)]
  np.testing.assert_allclose(got.rho, sum(each) / 2, rtol=1e-5)


def test_a_budget_beside_a_rule_is_refused():
  chain = optax.chain(
      asam_jax.ascent(asam_jax.auto_radius()),
      asam_jax.ascent(asam_jax.loss_budget(0.1)))
  tx = asam_jax.perturbed_gradient(chain)
  with pytest.raises(ValueError, match="several radius rules"):
    tx.update(START, tx.init(START), START, grad_fn=jax.grad(loss))


@pytest.mark.parametrize("maker", [
    asam_jax.auto_radius, asam_jax.rise_radius, asam_jax.loss_budget])
def test_what_makes_a_rule_is_no_rule(maker):
  for build in (
      lambda: asam_jax.adaptive_sam(optax.sgd(0.1), maker),
      lambda: asam_jax.value_and_grad(loss, rho=maker),
  ):
    with pytest.raises(TypeError, match=rf"call it: rho={maker.__name__}\("):
      build()


def test_the_state_of_a_door():
  rule = asam_jax.auto_radius()
  door = asam_jax.value_and_grad(loss, rho=rule)
  _, _, numbers = door(START, radius=asam_jax.AutoRadiusState(0.1, 100.0))
  _, _, arrays = door(START, radius=rule.init()._replace(rho=jnp.array(0.1)))
  chex.assert_trees_all_close(numbers, arrays)
  for bad in (0.5, None, (), {"rho": 0.5}):
    with pytest.raises(TypeError, match=r"give rule.init\(\) at the first step"):
      door(START, radius=bad)


def test_a_cosine_over_nothing():
  rule = asam_jax.auto_radius(over=lambda path, leaf: False)
  with pytest.raises(ValueError, match=r"over=.* chooses no leaf"):
    asam_jax.value_and_grad(loss, rho=rule)(START, radius=rule.init())


def test_a_negative_loss_has_a_root():
  shifted = lambda w: loss(w) - 100  # noqa: E731
  rule = asam_jax.rise_radius(0.3)
  door = jax.jit(asam_jax.value_and_grad(shifted, rho=rule, with_info=True))
  radius = rule.init()
  for _ in range(3):
    _, _, new, info = door(START, radius=radius)
    assert new.rho != radius.rho
    radius = new
  assert info.rise > 0


def test_the_cosine_over_a_part():
  """Of the chosen leaves alone; the others may do what they like."""
  rule = asam_jax.auto_radius(0.9, over={"kernel": True, "bias": False})
  tx = asam_jax.adaptive_sam(optax.sgd(LR), rule)
  grads = jax.grad(loss)(START)
  states = []
  for other in (1.0, -3.0):
    state = tx.init(START)
    for _ in range(4):
      there = {"kernel": grads["kernel"] * 2, "bias": grads["bias"] * other}
      _, state = tx.update(grads, state, START, grad_fn=lambda w, there=there: there)
    states.append(radius_of(state))
  assert states[0] == states[1]
  norm = optax.tree_utils.tree_get(state, "dual_norm")
  np.testing.assert_allclose(states[0], 0.05 / norm * np.exp(0.05 * 3), rtol=1e-5)
  whole = asam_jax.adaptive_sam(optax.sgd(LR), asam_jax.auto_radius(0.9))
  state = whole.init(START)
  for _ in range(4):
    _, state = whole.update(grads, state, START, grad_fn=lambda w: there)
  assert radius_of(state) < 0.9 * states[0]


def test_steps_without_an_ascent_leave_the_radius():
  tx = asam_jax.looksam(optax.sgd(LR), asam_jax.auto_radius(0.9), k=3)
  step, params, state, radii = step_function(tx), START, tx.init(START), []
  for _ in range(9):
    params, state = step(params, state)
    radii.append(float(radius_of(state)))
  assert radii[0] == radii[1] == radii[2] != radii[3] == radii[4] == radii[5]
  assert radii[5] != radii[6]


@pytest.mark.parametrize("make", [
    asam_jax.gsam, asam_jax.friendly_sam, asam_jax.vasso, asam_jax.ae_sam,
    lambda base, rho: optax.chain(asam_jax.perturbed_gradient(
        asam_jax.iterated(asam_jax.ascent(rho), 3)), base),
    lambda base, rho: asam_jax.skip_nonfinite(
        base, asam_jax.perturbed_gradient(asam_jax.ascent(rho))),
])
def test_the_family_takes_rules(make):
  tx = make(optax.sgd(LR), asam_jax.auto_radius(0.95))
  step, params, state, radii = step_function(tx), START, tx.init(START), []
  for _ in range(20):
    params, state = step(params, state)
    radii.append(float(radius_of(state)))
  assert np.isfinite(radii).all()
  assert len(set(radii)) > 2
  assert step._cache_size() == 1


def test_each_run_of_a_vmap_has_its_own_radius():
  tx = asam_jax.adaptive_sam(optax.sgd(LR), asam_jax.auto_radius(0.9))
  starts = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), START)
  states = jax.vmap(tx.init)(starts)
  step = step_function(tx)
  together = jax.vmap(step)
  params = starts
  for _ in range(5):
    params, states = together(params, states)
  for i in range(2):
    own = jax.tree.map(lambda w, i=i: w[i], starts)
    state = tx.init(own)
    for _ in range(5):
      own, state = step(own, state)
    np.testing.assert_allclose(radius_of(states)[i], radius_of(state), rtol=1e-5)


def test_skipped_steps_leave_the_radius():
  tx = asam_jax.skip_nonfinite(
      optax.sgd(LR), asam_jax.perturbed_gradient(
          asam_jax.ascent(asam_jax.auto_radius(0.9))))
  step, params, state = step_function(tx), START, tx.init(START)
  for _ in range(3):
    params, state = step(params, state)
  nan = lambda w: jax.tree.map(lambda x: x * jnp.nan, w)  # noqa: E731
  _, after = tx.update(jax.grad(loss)(params), state, params, grad_fn=nan)
  assert radius_of(after) == radius_of(state)


def test_accumulation_takes_the_angle_of_the_whole_batch():
  xs = jax.random.normal(jax.random.key(0), (8, 2))
  of_batch = lambda w, xs: jnp.mean((xs @ w["kernel"] + w["bias"]) ** 4)  # noqa: E731
  rule, radii = asam_jax.auto_radius(0.9), []
  for accumulate in (None, 2):
    grad = jax.jit(asam_jax.grad(of_batch, rho=rule, accumulate=accumulate))
    params, radius = START, rule.init()
    for _ in range(5):
      grads, radius = grad(params, xs, radius=radius)
      params = jax.tree.map(lambda w, g: w - LR * g, params, grads)
    radii.append(radius.rho)
  np.testing.assert_allclose(*radii, rtol=1e-4)


def test_groups_share_one_radius():
  xs = jax.random.normal(jax.random.key(0), (8, 2))
  of_batch = lambda w, xs: jnp.mean((xs @ w["kernel"] + w["bias"]) ** 4)  # noqa: E731
  rule = asam_jax.auto_radius(0.9)
  grad = asam_jax.value_and_grad(of_batch, rho=rule, m_sharpness=4, with_info=True)
  radius = rule.init()
  _, _, radius, info = grad(START, xs, radius=radius)
  _, _, radius, info = grad(START, xs, radius=radius)
  assert radius.rho.shape == ()
  parts = [asam_jax.value_and_grad(of_batch, rho=rule)(
      START, xs[i:i + 4], radius=rule.init())[2].rho for i in (0, 4)]
  parts = [asam_jax.value_and_grad(of_batch, rho=rule)(
      START, xs[i:i + 4], radius=asam_jax.AutoRadiusState(sum(parts) / 2))[2].rho
           for i in (0, 4)]
  np.testing.assert_allclose(radius.rho, sum(parts) / 2, rtol=1e-5)
  assert info.cosine.shape == ()


def test_modules():
  model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (8, 2))
  of_module = lambda model, x: jnp.mean((model(x) - 1) ** 2)  # noqa: E731
  rule = asam_jax.auto_radius()
  step = nnx.jit(asam_jax.nnx.value_and_grad(of_module, rho=rule))
  plain = asam_jax.value_and_grad(
      lambda w, x: jnp.mean((x @ w["kernel"] + w["bias"] - 1) ** 2), rho=rule)
  params = {"kernel": model.kernel[...], "bias": model.bias[...]}
  radius = other = rule.init()
  for _ in range(3):
    _, _, radius = step(model, x, radius=radius)
    _, _, other = plain(params, x, radius=other)
  assert radius.rho > 0
  np.testing.assert_allclose(radius.rho, other.rho, rtol=1e-5)


def test_memory_is_the_gradient_at_w():
  """One copy of the parameters, or of the part of them that is looked at."""
  size = 300_000
  params = {str(i): jax.ShapeDtypeStruct((size,), jnp.float32) for i in range(4)}

  def held(rho):
    tx = asam_jax.adaptive_sam(optax.sgd(0.1), rho)

    # As much as needed for two gradients that stay in memory, and no more.
    def of_leaves(w):
      return sum(jnp.sum(jnp.sin(jnp.roll(x, 1)) * jnp.cos(x)) for x in w.values())

    def step(w, state):
      grads = jax.grad(of_leaves)(w)
      updates, state = tx.update(grads, state, w, grad_fn=jax.grad(of_leaves))
      return optax.apply_updates(w, updates), state

    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()
    return timing.compiled_cost(compiled)["temporary_bytes"] / (4 * 4 * size)

  number, all_leaves = held(0.5), held(asam_jax.auto_radius())
  one = held(asam_jax.auto_radius(over=lambda path, leaf: path[0].key == "0"))
  assert all_leaves <= number + 1.05
  assert one <= number + 0.3


REFUSED = {
    "carried": lambda rule: asam_jax.carried(
        optax.sgd(0.1), asam_jax.ascent(rule)).init(START),
    "momentum_sam": lambda rule: asam_jax.momentum_sam(
        optax.sgd(0.1), rule).init(START),
    "ascent alone": lambda rule: asam_jax.ascent(rule).update(
        START, asam_jax.ascent(rule).init(START), START),
}


@pytest.mark.parametrize("name", REFUSED)
def test_methods_with_one_gradient_refuse_rules(name):
  with pytest.raises(ValueError, match="Methods with one gradient"):
    REFUSED[name](asam_jax.auto_radius())


def test_the_budget_of_a_carried_perturbation_is_refused():
  with pytest.raises(ValueError, match="Methods with one gradient"):
    REFUSED["carried"](asam_jax.loss_budget(0.1))


def test_functional_sam_refuses_rules():
  with pytest.raises(ValueError, match=r"rho=.* is a radius rule.*Give rho a number"):
    asam_jax.functional_value_and_grad(
        lambda w: w["kernel"], jnp.sum, rho=asam_jax.auto_radius())


def test_two_rules_in_a_chain_are_refused():
  chain = optax.chain(asam_jax.ascent(asam_jax.auto_radius()),
                      asam_jax.ascent(asam_jax.auto_radius()))
  tx = asam_jax.perturbed_gradient(chain)
  with pytest.raises(ValueError, match="several radius rules"):
    tx.update(START, tx.init(START), START, grad_fn=lambda w: w)


def test_a_door_without_the_state_says_what_to_pass():
  rule = asam_jax.auto_radius()
  with pytest.raises(TypeError, match=r"radius=radius\), at the first step"):
    asam_jax.value_and_grad(loss, rho=rule)(START)
  with pytest.raises(TypeError, match="is no state of the rule"):
    asam_jax.value_and_grad(loss, rho=rule)(START, radius=0.5)
  with pytest.raises(ValueError, match="keeps a state between steps"):
    asam_jax.value_and_grad(loss, ascent=asam_jax.ascent(rule))(START)
  with pytest.raises(TypeError, match="radius"):  # no rule: an argument of the loss
    asam_jax.value_and_grad(loss, rho=0.5)(START, radius=rule.init())


def test_losses_that_are_missing():
  tx = asam_jax.adaptive_sam(optax.sgd(0.1), asam_jax.rise_radius())
  with pytest.raises(ValueError, match="value_fn=value_fn"):
    tx.update(START, tx.init(START), START, grad_fn=jax.grad(loss))
