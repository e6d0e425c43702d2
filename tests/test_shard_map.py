"""One program per device: what is averaged, what is a device's own, what is refused."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import asam_jax
from tests.devices import NO_CHECK
from tests.devices import shard_map

# Newer JAX checks what varies over the mesh; what came before knows no while loops.
CHECKS = "check_vma" in NO_CHECK
needs_check = pytest.mark.skipif(not CHECKS, reason="this JAX checks no while loops")
in_layouts = pytest.mark.parametrize(
    "layout",
    [pytest.param("checked", marks=needs_check), "unchecked", "pmap"],
)
no_pmap_warning = pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")

PARAMS = {"kernel": jnp.array([0.5, -1.0, 0.3]), "bias": jnp.array([0.2])}
SIZE, SHARE = 4, 6
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(SIZE, SHARE, 3)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=(SIZE, SHARE)), jnp.float32)


def loss(params, batch):
  x, y = batch
  return jnp.mean((jnp.tanh(x @ params["kernel"]) + params["bias"] - y) ** 2)


def own(params, layout):
  """Parameters that each device has for itself."""
  if layout != "checked":
    return params
  if hasattr(jax.lax, "pcast"):
    return jax.lax.pcast(params, "data", to="varying")
  return jax.lax.pvary(params, "data")  # pyright: ignore


def mesh():
  return jax.sharding.Mesh(np.array(jax.devices()[:SIZE]), ("data",))


def each_device(tree):
  """What every device holds of results that should be the same on all."""
  return [
      jax.tree.map(lambda x, i=i: np.asarray(x.addressable_shards[i].data), tree)
      for i in range(SIZE)
  ]


def run(step, layout, *trees):
  """``step(*trees, (x, y))`` on every device; all results must be the same there."""
  if layout == "pmap":
    axes = (None,) * len(trees) + (0,)
    results = jax.pmap(
        step, axis_name="data", in_axes=axes, devices=jax.devices()[:SIZE]
    )(*trees, (X, Y))
    results = [jax.tree.map(lambda a, i=i: np.asarray(a)[i], results)
               for i in range(SIZE)]
  else:
    options: Any = {} if layout == "checked" else NO_CHECK
    mapped = shard_map(
        lambda *args: step(*args[:-1], jax.tree.map(lambda a: a[0], args[-1])),
        mesh=mesh(),
        in_specs=(P(),) * len(trees) + (P("data"),),
        out_specs=P(),
        **options,
    )
    results = each_device(jax.jit(mapped)(*trees, (X, Y)))
  for other in results[1:]:
    chex.assert_trees_all_equal(results[0], other)
  return results[0]


# References on one device.


def mean(trees):
  return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def shares():
  return [(X[i], Y[i]) for i in range(SIZE)]


WHOLE = X.reshape(-1, 3), Y.reshape(-1)


def epsilon(params, batch, rho=0.3):
  tx = asam_jax.ascent(rho)
  return tx.update(jax.grad(loss)(params, batch), tx.init(params), params)[0]


@jax.jit
def perturbed(params, batch):
  return jax.grad(loss)(optax.apply_updates(params, epsilon(params, batch)), batch)


def descent(common):
  """The gradient that a step must descend along."""
  if common:
    return perturbed(PARAMS, WHOLE)
  return mean([perturbed(PARAMS, batch) for batch in shares()])


# The function door.


@in_layouts
@pytest.mark.parametrize("common", [False, True])
@no_pmap_warning
def test_value_and_grad_takes_replicated_parameters(layout, common):
  fun = asam_jax.value_and_grad(
      loss, rho=0.3, axis_name="data", average_ascent=common, with_info=True
  )

  def step(params, batch):
    value, grads, info = fun(params, batch)
    return jax.lax.pmean(value, "data"), grads, info

  value, grads, info = run(step, layout, PARAMS)
  chex.assert_trees_all_close(grads, descent(common), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(value, loss(PARAMS, WHOLE), rtol=1e-6)
  np.testing.assert_allclose(info.value, value, rtol=1e-6)
  assert info.nonfinite_steps == 0


@in_layouts
@pytest.mark.parametrize("common", [False, True])
@no_pmap_warning
def test_a_rule_has_one_radius_on_all_devices(layout, common):
  rule = asam_jax.auto_radius(0.9)
  start = asam_jax.AutoRadiusState(jnp.float32(0.01), jnp.float32(100))
  fun = asam_jax.value_and_grad(
      loss, rho=rule, axis_name="data", average_ascent=common)
  got = run(
      lambda params, batch: fun(params, batch, radius=start)[2], layout, PARAMS
  )  # compares the devices
  assert got.rho != start.rho
  if not common:
    alone = asam_jax.value_and_grad(loss, rho=rule)
    each = [alone(PARAMS, batch, radius=start)[2].rho for batch in shares()]
    np.testing.assert_allclose(got.rho, np.mean(each), rtol=1e-5)


@in_layouts
@no_pmap_warning
def test_grad_over_several_arguments(layout):
  def split_loss(kernel, batch, bias):
    return loss({"kernel": kernel, "bias": bias}, batch)

  fun = asam_jax.grad(split_loss, argnums=(0, 2), rho=0.3, axis_name="data",
                      normalize=(True, False))
  got = run(
      lambda kernel, bias, batch: fun(kernel, batch, bias),
      layout, PARAMS["kernel"], PARAMS["bias"],
  )
  want = descent(common=False)
  chex.assert_trees_all_close(got, (want["kernel"], want["bias"]), rtol=1e-5)


@needs_check
def test_a_leaf_may_vary_already():
  fun = asam_jax.grad(loss, rho=0.3, axis_name="data")

  def step(params, batch):
    return fun({**params, "bias": own(params["bias"], "checked")}, batch)

  chex.assert_trees_all_close(
      run(step, "checked", PARAMS), descent(common=False), rtol=1e-5
  )


@needs_check
def test_both_passes_share_a_trace():
  traces = []

  def counted(params, batch):
    traces.append(1)
    return loss(params, batch)

  fun = asam_jax.grad(counted, axis_name="data")
  run(fun, "checked", PARAMS)
  assert len(traces) == 1


# The Optax door.


def optimizer_step(tx, layout):
  def step(params, state, batch):
    value, grads = jax.value_and_grad(loss)(own(params, layout), batch)
    updates, state = tx.update(
        grads, state, params, value=value,
        value_fn=functools.partial(loss, batch=batch),
    )
    return optax.apply_updates(params, updates), state

  return step


@in_layouts
@pytest.mark.parametrize("common", [False, True])
@no_pmap_warning
def test_state_is_the_mean_and_the_same_everywhere(layout, common):
  tx = asam_jax.adaptive_sam(
      optax.sgd(1.0), 0.3, axis_name="data", average_ascent=common, with_info=True
  )
  params, state = run(optimizer_step(tx, layout), layout, PARAMS, tx.init(PARAMS))
  moved = jax.tree.map(jnp.subtract, PARAMS, params)
  chex.assert_trees_all_close(moved, descent(common), rtol=1e-5, atol=1e-6)

  batches = [WHOLE] if common else shares()
  geometry = asam_jax.Geometry()
  g = [jax.grad(loss)(PARAMS, batch) for batch in batches]
  h = [perturbed(PARAMS, batch) for batch in batches]
  flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
  cosine = [
      a @ b / np.linalg.norm(a) / np.linalg.norm(b)
      for a, b in zip(map(flat, g), map(flat, h), strict=True)
  ]
  length = np.mean([np.linalg.norm(flat(one)) for one in g])
  dual_norm = np.mean([geometry.dual_norm(one, PARAMS) for one in g])
  info = optax.tree_utils.tree_get(state, "info")
  link = state[0]
  for got, want in [
      (link.ascent.sharpness, 0.3 * dual_norm),
      (link.ascent.dual_norm, dual_norm),
      (info.predicted_gap, 0.3 * dual_norm),
      (info.normalized_gradient_norm, dual_norm),
      (info.gradient_norm, length),
      (info.cosine, np.mean(cosine)),
      (info.value, loss(PARAMS, WHOLE)),
      (info.radius, 0.3),
      (info.kept_share, 1),
      (info.nonfinite_steps, 0),
  ]:
    np.testing.assert_allclose(got, want, rtol=2e-5)
  assert info.nonfinite_steps.dtype == np.int32


def test_cosine_of_an_averaged_gradient_where_nothing_is_checked():
  tx = asam_jax.adaptive_sam(optax.sgd(1.0), 0.3, axis_name="data", with_info=True)

  def step(params, state, batch):
    value, grads = jax.value_and_grad(loss)(params, batch)
    grads = jax.lax.pmean(grads, "data")
    return tx.update(grads, state, params, value=value,
                     value_fn=functools.partial(loss, batch=batch))

  _, state = run(step, "unchecked", PARAMS, tx.init(PARAMS))
  g, h = jax.grad(loss)(PARAMS, WHOLE), perturbed(PARAMS, WHOLE)
  flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
  g, h = flat(g), flat(h)
  np.testing.assert_allclose(
      optax.tree_utils.tree_get(state, "info").cosine,
      g @ h / np.linalg.norm(g) / np.linalg.norm(h), rtol=1e-5,
  )


@needs_check
@pytest.mark.parametrize("averaged", [False, True])
def test_a_gradient_that_does_not_vary_is_refused(averaged):
  tx = asam_jax.adaptive_sam(optax.sgd(1.0), 0.3, axis_name="data")

  def step(params, state, batch):
    grads = jax.grad(loss)(params, batch)
    if averaged:
      grads = jax.lax.pmean(grads, "data")
    return tx.update(grads, state, params,
                     grad_fn=functools.partial(jax.grad(loss), batch=batch))

  message = r"gradient\['bias'\] is the same .* axis_name='data'.*(?:pcast|pvary)\(.*" \
      "value_and_grad.*average_ascent=True"
  with pytest.raises(ValueError, match=message):
    run(step, "checked", PARAMS, tx.init(PARAMS))


@needs_check
@pytest.mark.parametrize("door", ["function", "optimizer"])
def test_parameters_sharded_by_hand_are_refused(door):
  """A device's norm would be that of its shard."""
  devices = np.array(jax.devices()[:SIZE]).reshape(2, 2)
  tx = asam_jax.adaptive_sam(optax.sgd(1.0), 0.3, axis_name="data")

  def sharded_loss(w, x):
    return jax.lax.psum(jnp.sum((x @ w) ** 2), "model")

  def step(w, x):
    if door == "function":
      return asam_jax.grad(sharded_loss, axis_name="data")(w, x)
    grads = jax.grad(sharded_loss)(own(w, "checked"), x)
    return tx.update(grads, tx.init(w), w,
                     grad_fn=lambda w: jax.grad(sharded_loss)(w, x))[0]

  run = shard_map(
      step, mesh=jax.sharding.Mesh(devices, ("data", "model")),
      in_specs=(P("model"), P("data", "model")), out_specs=P("model"),
  )
  with pytest.raises(ValueError, match=r"differs over \['model'\].*sharded by hand"):
    jax.jit(run)(jnp.ones(4), jnp.ones((6, 4)))


def test_average_ascent_without_an_axis():
  for make in (asam_jax.adaptive_sam, asam_jax.sam):
    with pytest.raises(ValueError, match="average_ascent=True with axis_name=None"):
      make(optax.sgd(0.1), average_ascent=True)
  with pytest.raises(ValueError, match="average_ascent=True with axis_name=None"):
    asam_jax.value_and_grad(loss, average_ascent=True)


# Methods that use the clean gradient, or remember it: all devices stay alike.


def linked(make):
  return lambda **options: optax.chain(
      make(asam_jax.perturbed_gradient(
          options.pop("ascent", asam_jax.ascent(0.3)), **options)),
      optax.sgd(0.1),
  )


METHODS = {
    "sam": lambda **options: asam_jax.sam(optax.sgd(0.1), **options),
    "gsam": lambda **options: asam_jax.gsam(optax.sgd(0.1), 0.3, **options),
    "looksam": lambda **options: asam_jax.looksam(
        optax.sgd(0.1), 0.3, k=2, **options),
    "ae_sam": lambda **options: asam_jax.ae_sam(optax.sgd(0.1), 0.3, **options),
    "friendly_sam": lambda **options: asam_jax.friendly_sam(
        optax.sgd(0.1), 0.3, **options),
    "vasso": lambda **options: asam_jax.vasso(optax.sgd(0.1), 0.3, **options),
    "auto_radius": lambda **options: asam_jax.adaptive_sam(
        optax.sgd(0.1), asam_jax.auto_radius(), **options),
    "rise_radius": lambda **options: asam_jax.adaptive_sam(
        optax.sgd(0.1), asam_jax.rise_radius(), **options),
    "loss_budget": lambda **options: asam_jax.adaptive_sam(
        optax.sgd(0.1), asam_jax.loss_budget(0.1), **options),
    "looksam with a rule": lambda **options: asam_jax.looksam(
        optax.sgd(0.1), asam_jax.auto_radius(), k=2, **options),
    "skip with a rule": lambda **options: asam_jax.skip_nonfinite(
        optax.sgd(0.1),
        asam_jax.perturbed_gradient(
            asam_jax.ascent(asam_jax.auto_radius()), **options)),
    "every_second": linked(
        lambda link: asam_jax.sometimes(link, lambda step: step % 2 == 1)),
    "iterated": lambda **options: optax.chain(
        asam_jax.perturbed_gradient(
            asam_jax.iterated(asam_jax.ascent(0.3), 3), **options),
        optax.sgd(0.1)),
    "skip": lambda **options: asam_jax.skip_nonfinite(
        optax.sgd(0.1),
        asam_jax.perturbed_gradient(asam_jax.ascent(0.3), **options)),
}


@in_layouts
@pytest.mark.parametrize("method", METHODS)
@no_pmap_warning
def test_devices_stay_alike(method, layout):
  tx = METHODS[method](axis_name="data")
  step = optimizer_step(tx, layout)

  def steps(params, state, batch):
    for _ in range(3):
      params, state = step(params, state, batch)
    return params, state

  params, state = run(steps, layout, PARAMS, tx.init(PARAMS))  # compares the devices
  chex.assert_tree_all_finite((params, state))


@pytest.mark.parametrize(
    "method",
    ["gsam", "looksam", "vasso", "friendly_sam", "auto_radius", "loss_budget"],
)
def test_the_whole_batch_on_every_device_is_one_device(method):
  """Where all devices see the same examples, there is nothing but one device."""
  one, many = METHODS[method](), METHODS[method](axis_name="data")

  def steps(tx, params, state, batch):
    for _ in range(3):
      params, state = optimizer_step(tx, "unchecked")(params, state, batch)
    return params, state

  want = jax.jit(functools.partial(steps, one))(PARAMS, one.init(PARAMS), WHOLE)
  got = run(
      lambda params, state, batch: steps(many, params, state, WHOLE),
      "unchecked", PARAMS, many.init(PARAMS),
  )
  chex.assert_trees_all_close(got, want, rtol=2e-5, atol=1e-6)


def test_a_budget_has_one_radius_on_all_devices():
  """That of the mean of their norms."""
  tx = asam_jax.adaptive_sam(
      optax.sgd(1.0), asam_jax.loss_budget(0.1), axis_name="data")
  params, state = run(
      optimizer_step(tx, "unchecked"), "unchecked", PARAMS, tx.init(PARAMS))
  norms = [asam_jax.Geometry().dual_norm(jax.grad(loss)(PARAMS, batch), PARAMS)
           for batch in shares()]
  rho = 0.1 / np.mean(norms)
  np.testing.assert_allclose(
      optax.tree_utils.tree_get(state, "sharpness"), 0.1, rtol=1e-5)
  want = mean([
      jax.grad(loss)(optax.apply_updates(PARAMS, epsilon(PARAMS, batch, rho)), batch)
      for batch in shares()
  ])
  moved = jax.tree.map(jnp.subtract, PARAMS, params)
  chex.assert_trees_all_close(moved, want, rtol=1e-5, atol=1e-6)


def test_gsam_combines_averaged_gradients():
  tx = asam_jax.gsam(optax.sgd(1.0), 0.3, 0.4, axis_name="data")
  params, _ = run(
      optimizer_step(tx, "unchecked"), "unchecked", PARAMS, tx.init(PARAMS)
  )
  want = asam_jax.surrogate_gap(0.4)(
      jax.grad(loss)(PARAMS, WHOLE), descent(common=False)
  )
  moved = jax.tree.map(jnp.subtract, PARAMS, params)
  chex.assert_trees_all_close(moved, want, rtol=1e-5, atol=1e-6)


def test_looksam_follows_averaged_gradients_between():
  tx = asam_jax.looksam(optax.sgd(1.0), 0.3, k=2, alpha=0.5, axis_name="data")

  def step(params, state, batch, ascend):
    grads = jax.grad(loss)(params, batch)
    updates, state = tx.update(
        grads, state, params, ascend=ascend,
        grad_fn=functools.partial(jax.grad(loss), batch=batch),
    )
    return jax.tree.map(jnp.negative, updates), state

  first = functools.partial(step, ascend=True)
  h, state = run(first, "unchecked", PARAMS, tx.init(PARAMS))
  chex.assert_trees_all_close(h, descent(common=False), rtol=1e-5)
  between, _ = run(
      functools.partial(step, ascend=False), "unchecked", PARAMS, state
  )
  g = jax.grad(loss)(PARAMS, WHOLE)
  flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
  g, h = flat(g), flat(h)
  part = h - (h @ g) / (g @ g) * g
  want = g + 0.5 * np.linalg.norm(g) / np.linalg.norm(part) * part
  np.testing.assert_allclose(flat(between), want, rtol=1e-4)


@in_layouts
@no_pmap_warning
def test_several_ascent_steps_of_all_devices(layout):
  """One perturbation for all devices needs averaged gradients on the way as well."""
  chain = asam_jax.iterated(asam_jax.ascent(0.3), 3)
  fun = asam_jax.grad(loss, ascent=chain, axis_name="data", average_ascent=True)
  want = asam_jax.grad(loss, ascent=chain)(PARAMS, WHOLE)
  chex.assert_trees_all_close(run(fun, layout, PARAMS), want, rtol=1e-5, atol=1e-6)


def test_a_step_is_skipped_by_all_devices():
  link = asam_jax.perturbed_gradient(asam_jax.ascent(0.3), axis_name="data")
  tx = asam_jax.skip_nonfinite(optax.sgd(0.1), link)

  def step(params, state, batch):
    bad = jnp.where(jax.lax.axis_index("data") == 1, jnp.nan, 1.0)
    grads = jax.tree.map(lambda g: g * bad, jax.grad(loss)(params, batch))
    return tx.update(grads, state, params,
                     grad_fn=functools.partial(jax.grad(loss), batch=batch))

  updates, state = run(step, "unchecked", PARAMS, tx.init(PARAMS))
  assert state.skipped == 1
  chex.assert_trees_all_equal(updates, jax.tree.map(np.zeros_like, updates))
  chex.assert_trees_all_equal(state.link, jax.device_get(link.init(PARAMS)))


# Under jit with sharded arrays nothing of this is needed.


def test_a_state_placed_like_the_parameters_compiles_once():
  """Scalars that start on one device would come back on all of them."""
  replicated = jax.sharding.NamedSharding(mesh(), P())
  rows = jax.sharding.NamedSharding(mesh(), P("data"))
  params, batch = jax.device_put(PARAMS, replicated), jax.device_put(WHOLE, rows)
  tx = asam_jax.adaptive_sam(optax.sgd(0.1))
  misses = []
  for place in (lambda state: state, lambda s: jax.device_put(s, replicated)):
    step: Any = jax.jit(optimizer_step(tx, "jit"))
    w, state = params, place(tx.init(params))
    for _ in range(3):
      w, state = step(w, state, batch)
    misses.append(step._cache_size())
  assert misses == [2, 1]


def test_a_state_made_under_jit_compiles_once():
  replicated = jax.sharding.NamedSharding(mesh(), P())
  rows = jax.sharding.NamedSharding(mesh(), P("data"))
  params, batch = jax.device_put(PARAMS, replicated), jax.device_put(WHOLE, rows)
  tx = asam_jax.adaptive_sam(optax.sgd(0.1))
  step: Any = jax.jit(optimizer_step(tx, "jit"))
  w, state = params, jax.jit(tx.init, out_shardings=replicated)(params)
  for _ in range(3):
    w, state = step(w, state, batch)
  assert step._cache_size() == 1


# Flax NNX.


@in_layouts
@no_pmap_warning
def test_nnx_takes_replicated_modules(layout):
  nnx = pytest.importorskip("flax.nnx")
  asam_nnx = pytest.importorskip("asam_jax.nnx")

  class Model(nnx.Module):

    def __init__(self, params):
      self.kernel = nnx.Param(params["kernel"])
      self.bias = nnx.Param(params["bias"])

  def module_loss(model, batch):
    return loss({"kernel": model.kernel[...], "bias": model.bias[...]}, batch)

  fun = asam_nnx.grad(module_loss, rho=0.3, axis_name="data")

  def step(params, batch):
    model = Model(params)
    grads = fun(model, batch)
    pure = lambda state: {name: state[name][...] for name in params}  # noqa: E731
    return pure(grads), pure(nnx.state(model))  # the module is as it was

  grads, params = run(step, layout, PARAMS)
  chex.assert_trees_all_close(grads, descent(common=False), rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_equal(params, jax.device_get(PARAMS))
