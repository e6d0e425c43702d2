"""Parameters that are sharded by hand in shard_map: the numbers of one device."""

import functools
import math
from typing import Any, NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from tests import devices
from tests.devices import NO_CHECK
from tests.devices import shard_map
from tests.devices import Spec

# Newer JAX checks what varies over the mesh; what came before knows no while loops.
CHECKS = "check_vma" in NO_CHECK
in_both = pytest.mark.parametrize("checked", [
    pytest.param(True, marks=pytest.mark.skipif(
        not CHECKS, reason="this JAX checks no while loops")),
    False,
])
needs_check = pytest.mark.skipif(not CHECKS, reason="this JAX checks no while loops")

STEPS, ROWS = 10, 32
RNG = np.random.default_rng(0)
START: dict[str, Any] = {  # no two shapes are the same
    "conv": np.float32(RNG.normal(size=(3, 8, 8)) / 5),
    "bias": np.float32(RNG.normal(size=8) / 5),
    "out": np.float32(RNG.normal(size=(8, 4)) / 3),
    "shift": np.float32(RNG.normal(size=4) / 5),
}
X: Any = np.float32(RNG.normal(size=(ROWS, 3, 8)))
BATCH = X, np.sin(2 * X[:, 0, :4])


def psum_by_hand(axis):
  """A sum over devices that all go on alike, where nothing is checked."""
  summed: Any = jax.custom_vjp(lambda x: lax.psum(x, axis))
  summed.defvjp(lambda x: (lax.psum(x, axis), None), lambda _, cotangent: (cotangent,))
  return summed


class Layout(NamedTuple):
  """A mesh, the places of the parameters, and the gradient a user would write.

  ``loss`` is a device's; ``axis_name`` the axis over which devices have copies.
  """

  shape: dict[str, int]
  specs: dict[str, Any]
  axis_name: Any
  loss: Any
  finish: Any = lambda grads, checked: grads


def outputs(w, x, sum_up=lambda y: y):
  hidden = jnp.tanh(jnp.einsum("rij,ijk->rk", x, w["conv"]) + w["bias"])
  return sum_up(hidden @ w["out"]) + w["shift"]


def loss(w, batch, checked=True):
  del checked
  return jnp.mean((outputs(w, batch[0]) - batch[1]) ** 2)


def tensor_parallel_loss(w, batch, checked):
  sum_up = functools.partial(lax.psum, axis_name="model")
  y = outputs(w, batch[0], sum_up if checked else psum_by_hand("model"))
  return jnp.mean((y - batch[1]) ** 2)


def fsdp_loss(w, batch, checked):
  del checked
  gather = functools.partial(lax.all_gather, axis_name="data", tiled=True)
  whole = {**w, "conv": gather(w["conv"], axis=1), "out": gather(w["out"])}
  return loss(whole, batch) / 8  # the shares of the devices add up


def sum_of_copies(grads, checked):
  """Where it is checked, JAX sums the gradient of what is replicated."""
  if checked:
    return grads
  return {**grads, **lax.psum({k: grads[k] for k in ("bias", "shift")}, "data")}


LAYOUTS = {
    "tensor": Layout(
        {"data": 4, "model": 2},
        {"conv": Spec(None, None, "model"), "bias": Spec("model"),
         "out": Spec("model"), "shift": Spec()},
        "data", tensor_parallel_loss),
    "FSDP": Layout(
        {"data": 8},
        {"conv": Spec(None, "data"), "bias": Spec(), "out": Spec("data"),
         "shift": Spec()},
        None, fsdp_loss, sum_of_copies),
}


def own(params, axis_name, checked) -> Any:
  """Parameters that each device of the axis has for itself."""
  if axis_name is None or not checked:
    return params
  if hasattr(lax, "pcast"):
    return lax.pcast(params, axis_name, to="varying")
  return lax.pvary(params, axis_name)  # pyright: ignore


# Makers of (step, init) from options that tell of shards; step is of one device.


def base() -> Any:
  return optax.sgd(0.1, momentum=0.9)


def optimizer(make, rho=0.3, **geometry):
  def build(layout: Any, checked: bool):
    options: dict[str, Any] = {} if layout is None else {"param_specs": layout.specs}
    carried = make is asam_jax.momentum_sam
    if layout is not None and layout.axis_name and not carried:
      options |= {"axis_name": layout.axis_name, "average_ascent": True}
    tx = make(base(), rho, **geometry, **options)

    def step(params, state, batch):
      grad_fn = lambda w: gradient(layout, checked)(w, batch)  # noqa: E731
      grads = grad_fn(own(params, layout and layout.axis_name, checked))
      if carried and layout and layout.axis_name:
        grads = lax.pmean(grads, layout.axis_name)
      extra = {} if carried else {"grad_fn": grad_fn}
      updates, state = tx.update(grads, state, params, **extra)
      return optax.apply_updates(params, updates), state

    return step, tx.init

  return build


def gradient(layout, checked):
  if layout is None:
    return jax.grad(loss)
  plain = jax.grad(functools.partial(layout.loss, checked=checked))
  return lambda w, batch: layout.finish(plain(w, batch), checked)


def function_door(**geometry):
  def build(layout: Any, checked: bool):
    options: dict[str, Any] = {}
    fun: Any = loss
    if layout is not None:
      fun = functools.partial(layout.loss, checked=checked)
      finish = lambda result: (result[0], layout.finish(result[1], checked))  # noqa: E731
      options = {"param_specs": layout.specs,
                 "accumulate": lambda f: lambda *args: finish(f(*args))}
      if layout.axis_name:
        options |= {"axis_name": layout.axis_name, "average_ascent": True}
    door = asam_jax.value_and_grad(fun, rho=0.3, with_info=True, **options, **geometry)

    def step(params, state, batch):
      _, grads, info = door(params, batch)
      updates, (momentum, _) = base().update(grads, (state[0], ()))
      # The losses are a device's share of the loss.
      of_losses = ["value", "perturbed_value", "gap", "linearity", "rise"]
      info = info._replace(**dict.fromkeys(of_losses, 0.0))
      return optax.apply_updates(params, updates), (momentum, info)

    def init(params):
      zeros = asam_jax.AscentInfo(*[jnp.zeros(())] * len(asam_jax.AscentInfo._fields))
      zeros = zeros._replace(nonfinite_steps=jnp.zeros((), jnp.int32))
      return base().init(params)[0], zeros

    return step, init

  return build


METHODS = {
    "elementwise": optimizer(asam_jax.adaptive_sam),
    "layerwise": optimizer(asam_jax.adaptive_sam, normalization="layerwise"),
    "filterwise": optimizer(asam_jax.adaptive_sam, normalization="filterwise"),
    "filters first, p=3": optimizer(
        asam_jax.adaptive_sam, p=3, normalization=functools.partial(
            asam_jax.filterwise, filter_axis=1)),
    "p=inf": optimizer(asam_jax.adaptive_sam, 0.05, p=math.inf),
    "p=1": optimizer(asam_jax.adaptive_sam, p=1, perturb=asam_jax.is_not_bias),
    "sam": optimizer(asam_jax.sam, 0.05),
    "momentum_sam": optimizer(asam_jax.momentum_sam),
    "value_and_grad": function_door(),
    "value_and_grad, p=1.5": function_door(p=1.5, normalize=lambda path, w: w.ndim > 1),
}


def specs_of(tree, layout):
  by_shape: dict[Any, Any] = {START[k].shape: spec for k, spec in layout.specs.items()}
  return jax.tree.map(lambda x: by_shape.get(jnp.shape(x), Spec()), tree)


def mapped(fun, layout, in_specs, out_specs, checked):
  mesh = devices.make_mesh(tuple(layout.shape.values()), tuple(layout.shape), "Auto")
  options: Any = {} if checked else NO_CHECK
  return jax.jit(shard_map(
      fun, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options))


@functools.cache
def on_one_device(name):
  step, init = METHODS[name](None, True)
  params = jax.tree.map(jnp.array, START)
  state, step = init(params), jax.jit(step)
  for _ in range(STEPS):
    params, state = step(params, state, BATCH)
  return jax.device_get((params, state))


@in_both
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_numbers_are_those_of_one_device(layout, name, checked):
  layout = LAYOUTS[layout]
  step, init = METHODS[name](layout, checked)
  params = jax.tree.map(jnp.array, START)
  state = init(params)
  specs = layout.specs, specs_of(state, layout)
  run = mapped(step, layout, (*specs, Spec("data")), specs, checked)
  for _ in range(STEPS):
    params, state = run(params, state, BATCH)
  expected = on_one_device(name)
  assert loss(expected[0], BATCH) < 0.9 * loss(START, BATCH)  # they are no small steps
  chex.assert_trees_all_close(
      jax.device_get(params), expected[0], rtol=0, atol=3e-6)
  chex.assert_trees_all_close(
      jax.device_get(state), expected[1], rtol=1e-4, atol=3e-6)
  # What is replicated is the same on every device.
  for leaf in jax.tree.leaves((params, state)):
    if leaf.sharding.is_fully_replicated:
      shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
      assert all((shard == shards[0]).all() for shard in shards)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_number_is_exchanged_for_the_norm(layout):
  layout = LAYOUTS[layout]
  params = jax.tree.map(jnp.array, START)
  found = []
  for normalization in ("elementwise", "none"):
    step, init = optimizer(
        asam_jax.adaptive_sam, normalization=normalization)(layout, False)
    state = init(params)
    specs = layout.specs, specs_of(state, layout)
    run = mapped(step, layout, (*specs, Spec("data")), specs, False)
    found.append(devices.exchanges(run.lower(params, state, BATCH).compile()))
  plain = mapped(
      lambda w, batch: jax.tree.map(
          lambda g: lax.pmean(g, layout.axis_name) if layout.axis_name else g,
          gradient(layout, False)(w, batch)),
      layout, (layout.specs, Spec("data")), layout.specs, False)
  of_sgd = devices.exchanges(plain.lower(params, BATCH).compile())
  for each in found:
    assert sum(each.arrays.values()) <= 2 * sum(of_sgd.arrays.values())
    # The state's two scalars, and the bias of four.
    assert each.scalars <= 2 * of_sgd.scalars + 1 + (2 if layout.axis_name else 0)


# The closed form alone.

GRADS = jax.tree.map(lambda w: np.float32(RNG.normal(size=w.shape)), START)
OVER_BOTH = Layout(
    {"data": 4, "model": 2},
    {"conv": Spec(None, ("data", "model")), "bias": Spec(),
     "out": Spec("data", "model"), "shift": Spec("model")},
    None, None)


def of_geometry(geometry, g, w):
  tx: Any = asam_jax.ascent(0.5, geometry.eta, geometry.p,
                       normalization=geometry.normalization,
                       param_specs=geometry.param_specs)
  epsilon, state = tx.update(g, tx.init(w), w)
  return epsilon, (state.dual_norm, geometry.norm(epsilon, w), geometry.dual_norm(g, w))


def over_both(geometry, g, w, checked, fun=of_geometry):
  specs = OVER_BOTH.specs
  geometry = asam_jax.Geometry(
      geometry.eta, geometry.p, geometry.normalization, param_specs=specs)
  run = mapped(functools.partial(fun, geometry), OVER_BOTH, (specs, specs),
               (specs, Spec()), checked)
  return jax.device_get(run(g, w))


@in_both
@pytest.mark.parametrize(("p", "normalization"), [
    (2, "filterwise"), (3, "layerwise"), (math.inf, "filterwise"), (1, "elementwise"),
    (1, "layerwise"),
])
def test_closed_form_and_norms_over_two_axes(p, normalization, checked):
  geometry = asam_jax.Geometry(0.01, p, normalization)
  got = over_both(geometry, GRADS, START, checked)
  expected = jax.device_get(of_geometry(geometry, GRADS, START))
  chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=1e-6)


@in_both
def test_the_first_of_equal_entries_is_that_of_the_whole_array(checked):
  """Of entries in several shards and leaves, of which some have copies."""
  ones = jax.tree.map(np.ones_like, START)
  geometry = asam_jax.Geometry(0.0, 1, "none")
  for leaf, index in [
      ("bias", (3,)), ("conv", (1, 5, 2)), ("out", (5, 1)), ("shift", (2,))]:
    g = {k: v.copy() for k, v in ones.items()}
    for other in sorted(START):  # and the last one of all leaves behind
      if other >= leaf:
        g[other].flat[-1] = 7
    g[leaf][index] = -7
    (epsilon, _) = over_both(geometry, g, START, checked)
    hits = {k: np.argwhere(v).tolist() for k, v in epsilon.items() if v.any()}
    assert hits == {leaf: [list(index)]}
    assert epsilon[leaf][index] == -0.5


@pytest.mark.parametrize("p", [2, 3, 1])
@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_range(scale, p):
  """All shards take the scale that the whole needs."""
  g = {**jax.tree.map(np.zeros_like, GRADS), "out": scale * GRADS["out"]}
  geometry = asam_jax.Geometry(0.0, p, "none")
  got = over_both(geometry, g, START, CHECKS)
  expected = jax.device_get(of_geometry(geometry, g, START))
  chex.assert_trees_all_close(got[0], expected[0], rtol=2e-5)
  np.testing.assert_allclose(got[1], expected[1], rtol=2e-5)
  np.testing.assert_allclose(got[1][1], 0.5, rtol=2e-5)


@pytest.mark.parametrize("p", [2, 3, math.inf, 1])
def test_a_nan_in_one_shard_is_seen_by_all(p):
  g = jax.tree.map(np.copy, GRADS)
  g["out"][7, 3] = np.nan
  epsilon, norms = over_both(asam_jax.Geometry(0.01, p), g, START, CHECKS)
  assert np.isnan(norms[0])
  if p != math.inf:  # whose entries depend on their own gradient alone
    assert all(np.isnan(leaf).all() for leaf in epsilon.values())


@pytest.mark.parametrize("p", [2, 3, 1])
def test_derivatives(p):
  def slopes(geometry, g, w):
    tangents = jax.tree.map(jnp.cos, g), jax.tree.map(jnp.sin, w)
    return jax.jvp(functools.partial(of_geometry, geometry), (g, w), tangents)[1]

  geometry = asam_jax.Geometry(0.01, p, "layerwise")
  got = over_both(geometry, GRADS, START, False, slopes)
  expected = jax.device_get(jax.jit(functools.partial(slopes, geometry))(GRADS, START))
  chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


# One perturbation per device, or per m rows.

TENSOR = LAYOUTS["tensor"]


def share(i, m):
  return jax.tree.map(lambda x: x[i * m : (i + 1) * m], BATCH)


@in_both
@pytest.mark.parametrize("m", [None, 4])
def test_per_device_and_per_m_rows(m, checked):
  fun = functools.partial(tensor_parallel_loss, checked=checked)
  door = asam_jax.grad(fun, rho=0.3, axis_name="data", m_sharpness=m,
                       param_specs=TENSOR.specs)
  run = mapped(door, TENSOR, (TENSOR.specs, Spec("data")), TENSOR.specs, checked)
  size = m or ROWS // 4
  one = jax.jit(asam_jax.grad(loss, rho=0.3))
  grads = [one(START, share(i, size)) for i in range(ROWS // size)]
  expected = jax.tree.map(lambda *xs: np.mean(xs, 0), *grads)
  chex.assert_trees_all_close(
      jax.device_get(run(START, BATCH)), jax.device_get(expected), rtol=1e-4, atol=1e-6)


@in_both
def test_nnx_modules(checked):
  nnx = pytest.importorskip("flax.nnx")
  asam_nnx = pytest.importorskip("asam_jax.nnx")

  class Model(nnx.Module):

    def __init__(self, params):
      for name, value in params.items():
        setattr(self, name, nnx.Param(value))

  def module_loss(model, batch):
    w = {name: getattr(model, name)[...] for name in START}
    return tensor_parallel_loss(w, batch, checked)

  def step(params, batch):
    # Of the structure that the module's parameters have.
    state = nnx.state(Model(TENSOR.specs), nnx.Param)
    specs = (getattr(nnx, "as_pure", None) or getattr(nnx, "pure"))(state)  # noqa: B009
    fun = asam_nnx.grad(module_loss, rho=0.3, axis_name="data", average_ascent=True,
                        param_specs=specs)
    grads = fun(Model(params), batch)
    return {name: grads[name][...] for name in params}

  run = mapped(step, TENSOR, (TENSOR.specs, Spec("data")), TENSOR.specs, checked)
  expected = asam_jax.grad(loss, rho=0.3)(START, BATCH)
  chex.assert_trees_all_close(
      jax.device_get(run(START, BATCH)), jax.device_get(expected), rtol=1e-4, atol=1e-6)


def test_a_chain_with_an_average():
  """Links that go entry by entry need to know of nothing."""
  geometry = asam_jax.Geometry(param_specs=TENSOR.specs)
  tx: Any = asam_jax.vasso(base(), 0.3, geometry=geometry, axis_name="data")
  update = lambda g, state, w: tx.update(  # noqa: E731
      g, state, w, grad_fn=lambda w: jax.tree.map(jnp.sin, w))
  specs = specs_of(tx.init(START), TENSOR)
  run = mapped(update, TENSOR, (TENSOR.specs, specs, TENSOR.specs),
               (TENSOR.specs, specs), False)
  plain = asam_jax.vasso(base(), 0.3)
  expected = plain.update(GRADS, plain.init(START), START,
                          grad_fn=lambda w: jax.tree.map(jnp.sin, w))
  chex.assert_trees_all_close(
      jax.device_get(run(GRADS, tx.init(START), START)), jax.device_get(expected),
      rtol=2e-5, atol=1e-6)


def test_all_shards_skip_a_step():
  ascent = asam_jax.ascent(0.3, param_specs=TENSOR.specs)
  link: Any = asam_jax.perturbed_gradient(ascent)
  tx: Any = asam_jax.skip_nonfinite(base(), link)
  # The second gradient is infinite in one shard.
  spoil = lambda w: {**w, "bias": jnp.where(  # noqa: E731
      lax.axis_index("model") == 1, jnp.inf, w["bias"])}
  specs = specs_of(tx.init(START), TENSOR)
  run = mapped(lambda g, s, w: tx.update(g, s, w, grad_fn=spoil), TENSOR,
               (TENSOR.specs, specs, TENSOR.specs), (TENSOR.specs, specs), False)
  updates, state = jax.device_get(run(GRADS, tx.init(START), START))
  assert state.skipped == 1
  assert not any(leaf.any() for leaf in jax.tree.leaves(updates))


# What is refused.


def ascend(specs, in_specs=None, checked=CHECKS, w=START, g=GRADS, axis_name=None):
  def run(g, w):
    tx: Any = asam_jax.ascent(0.3, param_specs=specs)
    return tx.update(g, tx.init(w), w, axis_name=axis_name)[1].dual_norm

  in_specs = TENSOR.specs if in_specs is None else in_specs
  return mapped(run, TENSOR, (in_specs, in_specs), Spec(), checked)(g, w)


def test_specs_that_do_not_fit():
  with pytest.raises(TypeError, match=r"param_specs has 'model' .*PartitionSpec"):
    asam_jax.ascent(param_specs={"conv": "model"})
  for specs in ({"conv": Spec("model")}, {**TENSOR.specs, "more": Spec()}, [Spec()]):
    with pytest.raises(ValueError, match=r"param_specs=.* does not fit the parameters"):
      asam_jax.ascent(param_specs=specs).init(START)
  with pytest.raises(ValueError, match=r"params\['bias'\] .*fewer dimensions"):
    asam_jax.ascent(param_specs=Spec(None, "model")).init(START)


def test_one_spec_for_all_leaves():
  specs = Spec("model")
  w = {k: START[k] for k in ("bias", "out")}
  g = {k: GRADS[k] for k in w}
  geometry = asam_jax.Geometry()
  np.testing.assert_allclose(
      ascend(specs, specs, w=w, g=g), geometry.dual_norm(g, w), rtol=1e-6)


def test_no_axis_is_bound_under_jit():
  tx: Any = asam_jax.ascent(param_specs=TENSOR.specs)
  with pytest.raises(ValueError, match=r"'model', which is not bound here.*Under jit"):
    jax.jit(tx.update)(GRADS, tx.init(START), START)
  geometry = asam_jax.Geometry(param_specs=TENSOR.specs)
  for norm in (geometry.norm, geometry.dual_norm):
    with pytest.raises(ValueError, match="'model', which is not bound here"):
      norm(GRADS, START)


def test_an_axis_can_t_have_copies_and_shards():
  with pytest.raises(ValueError, match=r"axis_name='model' and param_specs both name"):
    ascend(TENSOR.specs, axis_name="model")


@needs_check
def test_types_that_tell_otherwise():
  forgotten = {**TENSOR.specs, "out": Spec()}
  with pytest.raises(
      ValueError, match=r"params\['out'\] differs over \['model'\], which its Part"):
    ascend(forgotten)
  with pytest.raises(ValueError, match=r"'out'\] is the same on all devices along"):
    ascend(TENSOR.specs, forgotten)
  with pytest.raises(ValueError, match=r"axis_name='data' does not name.*param_specs"):
    ascend(None, axis_name="data")

  def own_gradient(g, w):
    tx: Any = asam_jax.ascent(param_specs=TENSOR.specs)
    g = {**g, "shift": g["shift"] + lax.axis_index("model")}
    return tx.update(g, tx.init(w), w)[1].dual_norm

  with pytest.raises(ValueError, match=r"gradient\['shift'\] differs over \['model'\]"):
    mapped(own_gradient, TENSOR, (TENSOR.specs,) * 2, Spec(), True)(GRADS, START)


GEOMETRY = asam_jax.Geometry(param_specs=TENSOR.specs)


def measures():
  pytest.importorskip("jaxtyping", reason="the measures need the extra 'sharpness'")
  return pytest.importorskip("asam_jax.sharpness")


@pytest.mark.parametrize("make", [
    lambda: asam_jax.looksam(base(), geometry=GEOMETRY),
    lambda: asam_jax.ae_sam(base(), geometry=GEOMETRY),
    lambda: asam_jax.gsam(base(), geometry=GEOMETRY),
    lambda: asam_jax.combined(
        asam_jax.perturbed_gradient(asam_jax.ascent(param_specs=TENSOR.specs)),
        asam_jax.renormalized),
    lambda: asam_jax.ascent(asam_jax.auto_radius(), param_specs=TENSOR.specs),
    lambda: measures().worst_case(
        lambda w: loss(w, BATCH), START, rho=0.1, geometry=GEOMETRY),
    lambda: measures().hessian_trace(
        lambda w: loss(w, BATCH), START, geometry=GEOMETRY),
], ids=["looksam", "ae_sam", "gsam", "stable_sam", "auto_radius", "worst_case",
        "hessian_trace"])
def test_what_has_norms_of_its_own_is_refused(make):
  with pytest.raises(ValueError, match="of each device's shard alone"):
    make()


def test_methods_without_such_norms_are_not():
  link: Any = asam_jax.perturbed_gradient(asam_jax.ascent(param_specs=TENSOR.specs))
  asam_jax.sometimes(link, lambda step: step % 2 == 0)
  asam_jax.combined(link, lambda g, h: h)
  asam_jax.ascent(asam_jax.loss_budget(0.1), param_specs=TENSOR.specs)


def test_what_no_type_tells_is_a_norm_of_the_shard():
  """Unchecked, and without param_specs, a shard can't be told from a copy."""
  specs = {k: Spec("model") for k in ("bias", "out")}
  w, g = {k: START[k] for k in specs}, {k: GRADS[k] for k in specs}

  def norm(g, w):
    tx: Any = asam_jax.ascent(0.3)
    return tx.update(g, tx.init(w), w)[1].dual_norm[None]

  got = mapped(norm, TENSOR, (specs, specs), Spec("model"), False)(g, w)
  halves = [jax.tree.map(lambda x, i=i: np.split(x, 2)[i], (g, w)) for i in range(2)]
  expected = [asam_jax.Geometry().dual_norm(*half) for half in halves]
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  assert asam_jax.Geometry().dual_norm(g, w) > 1.1 * max(expected)
