"""Which leaf gets which operator."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import asam_jax
from tests import problems


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4), (3, 3, 2, 4)])
@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("elementwise", asam_jax.elementwise),
        ("filterwise", asam_jax.filterwise),
        ("layerwise", asam_jax.layerwise),
    ],
)
def test_operators_against_the_oracle(name, operator, shape):
  w = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
  t = jnp.broadcast_to(operator(w, 0.1), shape)
  np.testing.assert_allclose(t, problems.oracle_factor(w, 0.1, name), rtol=1e-6)


def test_factors_of_filters_and_layers_stay_small():
  w = jnp.ones((3, 3, 2, 4))
  assert asam_jax.filterwise(w, 0.1).shape == (1, 1, 1, 4)
  assert asam_jax.filterwise(w, 0.1, filter_axis=0).shape == (3, 1, 1, 1)
  assert asam_jax.layerwise(w, 0.1).shape == ()


def test_eta_adds_for_every_operator():
  # A factor of eta instead would pin zero weights for ever.
  for operator in (asam_jax.elementwise, asam_jax.filterwise, asam_jax.layerwise):
    w = jnp.zeros((3, 3, 1, 2))
    np.testing.assert_allclose(operator(w, 0.25), 0.25 * np.ones(operator(w, 0).shape))


def test_filter_axis_must_exist():
  with pytest.raises(ValueError, match="filter_axis=4 is no axis"):
    asam_jax.filterwise(jnp.ones((3, 3, 1, 2)), 0.1, filter_axis=4)


def selected(params):
  """The paths whose leaf is normalized by default."""
  rows = asam_jax.describe(params)
  return {row.path for row in rows if row.operator == "elementwise"}


def test_official_rule_on_plain_trees():
  leaf = jnp.ones(2)
  assert selected({"conv": {"kernel": leaf, "bias": leaf}}) == {"['conv']['kernel']"}
  haiku = {
      "net/~/linear": {"w": leaf, "b": leaf},
      "net/~/batch_norm": {"scale": leaf, "offset": leaf},
  }
  assert selected(haiku) == {
      "['net/~/linear']['w']",
      "['net/~/batch_norm']['scale']",
  }
  assert selected({"gamma": leaf, "beta": leaf, "bias_n": leaf}) == {"['gamma']"}
  # A tree of lists has no names: everything is normalized, and describe shows it.
  assert len(selected([(leaf, leaf), (leaf, leaf)])) == 4
  assert len(selected({"b": [leaf]})) == 1


def test_a_bias_has_its_name_and_its_rank():
  vector, matrix, cube = jnp.ones(4), jnp.ones((4, 3)), jnp.ones((2, 4, 3))
  lora = {"a": matrix, "b": matrix}  # the matrices of a low-rank adapter
  assert selected(lora) == {"['a']", "['b']"}
  assert selected({"biased_proj": vector, "bias": vector}) == {"['biased_proj']"}
  # Haiku's batch norm keeps axes of length 1; Flax's attention splits its biases.
  assert selected({"offset": jnp.ones((1, 1, 1, 4)), "b": vector}) == set()
  assert selected({"bias": matrix, "bias_hh": vector}) == set()
  assert selected({"bias_table": matrix, "bias_n": jnp.ones((1, 4))}) == {
      "['bias_table']"}
  assert selected({"bias": cube}) == {"['bias']"}


def test_official_rule_on_dataclasses():
  # What an Equinox module looks like to JAX.
  import dataclasses

  @functools.partial(
      jax.tree_util.register_dataclass,
      data_fields=["weight", "bias"],
      meta_fields=[],
  )
  @dataclasses.dataclass
  class Linear:
    weight: jax.Array
    bias: jax.Array | None

  assert selected([Linear(jnp.ones(2), jnp.ones(2))]) == {"[0].weight"}
  assert selected([Linear(jnp.ones(2), None)]) == {"[0].weight"}


def test_official_rule_looks_through_wrappers():
  # NNX puts the leaf of a variable one level below its name.
  leaf = {"value": jnp.ones(2)}
  params = {"linear": {"bias": leaf, "kernel": leaf}}
  assert selected(params) == {"['linear']['kernel']['value']"}


def test_describe():
  params = {
      "conv": {"kernel": jnp.ones((3, 3, 1, 2)), "bias": jnp.ones(2)},
      "dense": {"kernel": jax.ShapeDtypeStruct((4, 5), jnp.bfloat16)},
  }
  table = asam_jax.describe(
      params,
      normalization=functools.partial(asam_jax.filterwise, filter_axis=0),
      perturb=lambda path, leaf: "conv" in jax.tree_util.keystr(path),
  )
  assert table == (
      asam_jax.LeafDescription("['conv']['bias']", (2,), "none", True, 2),
      asam_jax.LeafDescription(
          "['conv']['kernel']", (3, 3, 1, 2), "filterwise", True, 18, 0, 3
      ),
      asam_jax.LeafDescription("['dense']['kernel']", (4, 5), "elementwise", False, 20),
  )
  lines = str(table).splitlines()
  assert lines[0].split() == ["path", "shape", "operator", "perturbed", "parameters"]
  assert lines[4].split()[1:] == ["(4,", "5)", "elementwise", "no", "20"]
  assert lines[-1].split() == ["total", "40"]
  assert len({len(line) for line in lines}) == 1
  assert "total" in str(asam_jax.describe({}))


def test_describe_shows_the_filters():
  params = {"kernel": jnp.ones((3, 3, 1, 2))}
  last = asam_jax.describe(params, normalization="filterwise")
  first = asam_jax.describe(
      params, normalization=functools.partial(asam_jax.filterwise, filter_axis=0)
  )
  assert "filterwise, 2 on axis 3" in str(last)
  assert "filterwise, 3 on axis 0" in str(first)


def test_a_geometry_at_a_step():
  scheduled = asam_jax.Geometry(eta=lambda step: 0.25 * step, p=3)
  assert scheduled.at(2) == asam_jax.Geometry(eta=0.5, p=3)
  fixed = asam_jax.Geometry(eta=0.5)
  assert fixed.at(7) is fixed
  with pytest.raises(ValueError, match=r"eta=-1"):
    asam_jax.Geometry(eta=lambda step: -1.0).at(0)


def test_describe_takes_a_geometry():
  params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
  geometry = asam_jax.Geometry(normalization="layerwise")
  expected = asam_jax.describe(params, normalization="layerwise")
  assert asam_jax.describe(params, geometry) == expected
  with pytest.raises(ValueError, match="both geometry and normalization"):
    asam_jax.describe(params, geometry, normalization="layerwise")


def test_a_filter_axis_that_no_kernel_has():
  bad = ((9, ValueError), (-9, ValueError), ("0", TypeError), ([0], TypeError))
  for axis, error in bad:
    operator = functools.partial(asam_jax.filterwise, filter_axis=axis)
    with pytest.raises(error, match="filter_axis="):
      asam_jax.ascent(normalization=operator)


def test_describe_names_own_operators():
  def mine(w, eta):
    return w + eta

  (row,) = asam_jax.describe(jnp.ones(2), normalization=mine)
  assert row.operator == "mine"


def test_describe_says_what_ascent_does():
  params = {"a": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}}
  options = {"perturb": asam_jax.is_not_bias, "normalization": "layerwise"}
  rows = {row.path: row for row in asam_jax.describe(params, **options)}
  tx = asam_jax.ascent(1.0, 0.0, **options)
  epsilon, _ = tx.update(params, tx.init(params), params)
  assert not rows["['a']['bias']"].perturbed
  chex.assert_trees_all_equal(epsilon["a"]["bias"], jnp.zeros(2))
  assert rows["['a']['kernel']"].operator == "layerwise"
  np.testing.assert_allclose(epsilon["a"]["kernel"], np.full((2, 2), 3.0), rtol=1e-6)


@pytest.mark.parametrize("argument", ["normalize", "perturb"])
def test_selections(argument):
  params = {"a": jnp.ones(2), "c": [jnp.ones(3), None]}
  tree = {"a": True, "c": [False, None]}
  arrays = {"a": np.bool_(True), "c": [jnp.array(False), None]}

  def predicate(path, leaf):
    return leaf.shape == (2,)

  expected = asam_jax.describe(params, **{argument: tree})
  assert expected != asam_jax.describe(params)
  assert asam_jax.describe(params, **{argument: arrays}) == expected
  assert asam_jax.describe(params, **{argument: predicate}) == expected


def test_a_selection_that_is_a_callable_module():
  import dataclasses

  @functools.partial(
      jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=[]
  )
  @dataclasses.dataclass
  class Module:
    weight: object

    def __call__(self, x):
      raise AssertionError("a module of bools is no predicate")

  (row,) = asam_jax.describe(Module(jnp.ones(2)), perturb=Module(False))
  assert not row.perturbed


@pytest.mark.parametrize("argument", ["normalize", "perturb"])
def test_bad_selections(argument):
  params = {"a": jnp.ones(2), "b": jnp.ones(3)}
  with pytest.raises(ValueError, match=rf"{argument} has the structure .* one b"):
    asam_jax.describe(params, **{argument: {"a": True}})
  with pytest.raises(TypeError, match=rf"{argument} is 1 f"):
    asam_jax.describe(params, **{argument: {"a": 1, "b": True}})
  with pytest.raises(TypeError, match=rf"{argument} is None for \['a'\]"):
    asam_jax.describe(params, **{argument: lambda path, leaf: None})


@pytest.mark.parametrize("unknown", ["elementwise ", "filter", 3, None])
def test_unknown_operator(unknown):
  error = ValueError if isinstance(unknown, str) else TypeError
  with pytest.raises(error, match=r"normalization=.* is unknown; use one of 'el"):
    asam_jax.describe(jnp.ones(2), normalization=unknown)
