"""Bad input to measures and landscapes: each error names the argument.

A table of calls, arguments and kinds of bad values; and what must not be refused.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import matplotlib as mpl
from matplotlib import pyplot
import numpy as np
import pytest

from asam_jax import Geometry
from asam_jax import landscape
from asam_jax import sharpness

mpl.use("agg")

W = {"kernel": jnp.array([[1.0, -2.0], [0.5, 1.5]]), "bias": jnp.array([0.5, 0.0])}
D = {"kernel": jnp.ones((2, 2)), "bias": jnp.array([1.0, 0.0])}
E = {"kernel": jnp.array([[1.0, -1.0], [0.0, 0.0]]), "bias": jnp.zeros(2)}
ROWS = jnp.array([[1.0, 2.0], [3.0, 4.0]])
BATCH = (ROWS, jnp.array([0, 1]))
NAN = {"kernel": jnp.full((2, 2), jnp.nan), "bias": jnp.zeros(2)}


def loss(w):
  return jnp.sum(w["kernel"] ** 2) + jnp.sum(w["bias"])


def batch_loss(w, batch):
  return jnp.mean(batch @ w["kernel"]) ** 2


def predict(w, x):
  return x @ w["kernel"]


def with_entry(entry):
  return {"kernel": entry, "bias": W["bias"]}


NUMBER = (None, "0.5", True, 1j, [0.5], (), jnp.array([0.1, 0.2]), np.array([0.5]),
          jnp.array(1j), jnp.array(True), -1.0, math.nan, math.inf, np.array(-1.0),
          np.float32("nan"), jnp.array(-1.0), jnp.array(jnp.nan), lambda step: 0.5)
COUNT = (None, "3", 2.5, True, math.nan, -1, [3], jnp.ones(2))
NAME = (None, "", "fast", 3, ["pga"])
FLAG = (None, "yes", 1)
FUNCTION = (None, 3, "loss", W)
KEY = (0, "key", 1.5, jnp.ones(2), jax.random.split(jax.random.key(0)))
PARAMS = (None, "w", (), with_entry("w"), with_entry(jnp.ones(2) * 1j),
          with_entry(object()))
GEOMETRY = (None, 0.01, "elementwise", {"eta": 0.01}, Geometry)
TREE = (None, "d", D["kernel"], [D], with_entry("d"), with_entry(jnp.ones(2)),
        with_entry(jnp.ones((2, 2)) * 1j), with_entry(jnp.ones((2, 2), bool)),
        with_entry(NAN["kernel"]), with_entry(jnp.full((2, 2), jnp.inf)))
VECTOR = (None, "ab", 1.0, [1.0], [1.0, "a"], [1j, 2.0], [1.0, math.nan],
          [[1.0, 2.0]], [True, False], {})

GOOD: dict[str, tuple[Any, dict[str, Any]]] = {
    "worst_case": (sharpness.worst_case, {
        "loss": loss, "params": W, "rho": 0.5, "geometry": Geometry(),
        "method": "apgd", "steps": 2, "restarts": 0, "key": None}),
    "average_case": (sharpness.average_case, {
        "loss": loss, "params": W, "rho": 0.5, "geometry": Geometry(),
        "distribution": "normal", "samples": 4, "antithetic": True, "key": None}),
    "hessian_eigenvalues": (sharpness.hessian_eigenvalues, {
        "loss": loss, "params": W, "k": 1, "geometry": Geometry(), "steps": 2,
        "key": None}),
    "hessian_trace": (sharpness.hessian_trace, {
        "loss": loss, "params": W, "geometry": Geometry(), "samples": 2,
        "key": None}),
    "m_sharpness": (
        lambda params, data, key, **options: sharpness.m_sharpness(**options)(
            params, data, key),
        {"loss": batch_loss, "m": 1, "measure": sharpness.worst_case, "mesh": None,
         "progress": False, "rho": 0.5, "geometry": Geometry(), "method": "one_step",
         "params": W, "data": ROWS, "key": None}),
    "classification_loss": (
        lambda params, batch, **options: sharpness.classification_loss(**options)(
            params, batch),
        {"predict": predict, "normalize_logits": False, "params": W, "batch": BATCH}),
    "rank_correlation": (sharpness.rank_correlation, {
        "measure": [1.0, 2.0], "gap": [1.0, 3.0], "settings": {"rate": [1, 2]},
        "along": ["rate"], "level": 0.9, "resamples": 10, "seed": 0}),
    "direction": (landscape.direction, {
        "kind": "adaptive", "params": W, "geometry": Geometry(), "loss": loss,
        "key": None, "index": 0, "steps": 2, "filter_axis": -1}),
    "line": (landscape.line, {
        "loss": loss, "params": W, "direction": D, "rho": 0.5, "extent": 2.0,
        "points": 3}),
    "surface": (landscape.surface, {
        "loss": loss, "params": W, "directions": [D, E], "rho": 0.5,
        "geometry": Geometry(), "extent": 2.0, "points": 2}),
    "plane": (landscape.plane, {
        "loss": loss, "checkpoints": [W, D, E], "margin": 0.25, "points": 2}),
    "plot_line": (landscape.plot_line, {
        "lines": {"w": landscape.Line(*map(jnp.arange, (2.0, 2.0, 2.0)))},
        "ax": None}),
    "plot_surface": (landscape.plot_surface, {
        "surface": landscape.Surface(
            jnp.arange(2.0), jnp.arange(2.0), jnp.eye(2), jnp.eye(2), jnp.array(1.0)),
        "ax": None, "levels": 3}),
    "plot_plane": (landscape.plot_plane, {
        "plane": landscape.Plane(
            jnp.arange(2.0), jnp.arange(2.0), jnp.eye(2), jnp.ones((3, 2))),
        "labels": ("a", "b", "c"), "ax": None, "levels": 3}),
}

# What every argument of this name must refuse, and what only some functions' does.
BAD = {
    "loss": FUNCTION, "predict": FUNCTION, "measure": FUNCTION, "params": PARAMS,
    "rho": NUMBER, "extent": (*NUMBER, 0, jnp.array(0.0)), "margin": NUMBER,
    "geometry": GEOMETRY, "method": NAME, "distribution": NAME, "kind": NAME,
    "steps": (*COUNT, 0), "restarts": COUNT, "samples": (*COUNT, 0, 1),
    "k": (*COUNT, 0, 99), "m": (*COUNT, 0), "index": COUNT, "points": (*COUNT, 0, 1),
    "levels": (*COUNT, 0), "resamples": (*COUNT, 0), "seed": COUNT,
    "antithetic": FLAG, "normalize_logits": FLAG, "progress": FLAG, "key": KEY,
    "mesh": ("d", 3), "direction": TREE,
    "data": (None, "rows", (), 3.0, jnp.ones((0, 2)), (jnp.ones(3), jnp.ones(4))),
    "batch": (None, 3, ROWS, (ROWS,), (ROWS, ROWS, ROWS)),
    "gap": VECTOR, "settings": (3, "rate", ["rate"], {"rate": [1]}, {"rate": 1}),
    "along": ("rate", 3, ["decay"]),
    "level": (None, "a", 0, 0.0, 1, 1.5, math.nan, -0.5, [0.9], 1j, True),
    "filter_axis": (None, "0", 1.0, True, 9, -9),
    "directions": (None, "de", 3, [D], [D, E, D], *([D, d] for d in TREE)),
    "checkpoints": (None, "wde", 3, [W, D], *([W, D, d] for d in TREE),
                    [NAN, D, E], [with_entry("w")] * 3),
    "lines": (None, 3, [], {"w": W}), "surface": (None, W), "plane": (None, W),
    "labels": (None, "abc", ("a",), 3), "ax": ("ax", 3),
}
ONLY = {
    ("classification_loss", "params"): (),  # the network's affair
    ("rank_correlation", "measure"): VECTOR,
    ("line", "params"): (*PARAMS, NAN),
    ("surface", "params"): (*PARAMS, NAN),
}
# The loss is asked for by name where a kind of direction needs it.
CONTEXT = {("direction", "loss"): {"kind": "gradient"},
           ("direction", "steps"): {"kind": "eigenvector"}}


def rows():
  for function, (_, good) in GOOD.items():
    for argument in good:
      bad = ONLY.get((function, argument), BAD[argument])
      yield pytest.param(function, argument, bad, id=f"{function}-{argument}")


@pytest.fixture(autouse=True)
def _checks_of_our_own():
  """Without those of the annotations, which users don't have."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


def refusal(function, **arguments):
  call, good = GOOD[function]
  with pytest.raises((TypeError, ValueError)) as error:
    call(**{**good, **arguments})
  return str(error.value)


def named(argument, message):
  return re.match(rf"{re.escape(argument)}(?![a-z])", message) is not None


@pytest.mark.parametrize(("function", "argument", "values"), [*rows()])
def test_the_error_names_the_argument(function, argument, values):
  context = CONTEXT.get((function, argument), {})
  for value in values:
    message = refusal(function, **context, **{argument: value})
    assert named(argument, message), (value, message)


MEASURES = ("worst_case", "average_case", "hessian_eigenvalues", "hessian_trace")
WITH_GEOMETRY = [name for name, (_, good) in GOOD.items() if "geometry" in good]


@pytest.mark.parametrize("function", WITH_GEOMETRY)
@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        (Geometry(normalization=lambda w, eta: jnp.ones((2, 2, 2))),
         r"normalization=.*shape \(2, 2, 2\).*\['kernel'\]"),
        (Geometry(normalization=lambda w, eta: jnp.ones(3)), "normalization="),
        (Geometry(normalization=lambda w, eta: None), "normalization="),
        (Geometry(normalization=lambda w, eta: 1j * w), "normalization="),
        (Geometry(eta=lambda step: 0.1), "eta=.* is a schedule"),
        (Geometry(normalize={"kernel": True}), "normalize"),
        (Geometry(perturb={"kernel": 1, "bias": 0}), "perturb"),
    ],
)
def test_a_geometry_that_does_not_fit(function, geometry, message):
  assert re.search(message, refusal(function, geometry=geometry))


@pytest.mark.parametrize("function", [*MEASURES, "direction"])
def test_nothing_to_perturb(function):
  geometry = Geometry(perturb=lambda path, leaf: False)
  assert "no parameter to perturb" in refusal(function, geometry=geometry)


@pytest.mark.parametrize("function", [*MEASURES, "direction"])
def test_integer_parameters_are_refused(function):
  message = refusal(function, params=with_entry(jnp.array([[1, 2], [3, 4]])))
  assert re.search(r"params\['kernel'\] has dtype int32.*perturb", message)


@pytest.mark.parametrize("function", [*MEASURES, "line", "surface", "plane"])
@pytest.mark.parametrize(
    "result", [W["bias"], (jnp.array(1.0), None), None, jnp.array(1j), jnp.array(1), 1])
def test_a_loss_that_is_no_real_scalar(function, result):
  message = refusal(function, loss=lambda w: result)
  assert re.match(r"loss\(params\) returned .* one real number", message)


def test_a_loss_that_a_direction_needs():
  for kind in ("gradient", "eigenvector"):
    assert "loss=None" in refusal("direction", kind=kind, loss=None)


@pytest.mark.parametrize("p", [1.5, 3])
def test_balls_without_a_projection(p):
  geometry = Geometry(p=p)
  assert "one_step" in refusal("worst_case", geometry=geometry)
  assert named("p", refusal(
      "average_case", geometry=geometry, distribution="uniform"))


def test_pairs_need_even_samples():
  assert named("samples", refusal("average_case", samples=5))
  assert named("samples", refusal("average_case", samples=2))


def test_a_mesh_of_two_axes():
  devices = np.array(jax.devices()[:2]).reshape(1, 2)
  mesh = jax.sharding.Mesh(devices, ("a", "b"))
  assert "one axis" in refusal("m_sharpness", mesh=mesh)


def test_a_measure_without_a_value():
  message = refusal("m_sharpness", measure=lambda loss, params, **_: 1.0)
  assert named("measure", message)


def test_options_of_the_measure_are_checked():
  for rho in (-1.0, jnp.array([0.1, 0.2]), None):
    assert named("rho", refusal("m_sharpness", rho=rho))


def test_a_filter_axis_that_a_leaf_has_not():
  for axis in (2, -3):
    message = refusal("direction", kind="filter", filter_axis=axis)
    assert re.match(rf"filter_axis={axis} .*\['kernel'\]", message)


LABELS = {
    "shape": (jnp.array([1]), jnp.zeros((2, 1), int), jnp.array(0)),
    "integers": (jnp.array([0.0, 1.0]), [0, 1], None, "01", jnp.array([True, False])),
    r"in \[0, 2\)": (jnp.array([0, 2]), np.array([-1, 0])),
}


@pytest.mark.parametrize("message", LABELS)
def test_labels_that_are_no_classes(message):
  for labels in LABELS[message]:
    error = refusal("classification_loss", batch=(ROWS, labels))
    assert named("labels", error)
    assert re.search(message, error)


def test_logits_without_classes():
  message = refusal("classification_loss", predict=lambda w, x: jnp.array(1.0))
  assert named("predict", message)


def test_traced_labels_that_are_no_classes_give_nan():
  loss_of = jax.jit(sharpness.classification_loss(predict))
  assert np.isfinite(loss_of(W, BATCH))
  for labels in ([0, 2], [-1, 0]):
    assert np.isnan(loss_of(W, (ROWS, jnp.array(labels))))


@pytest.mark.parametrize("rho", [-1.0, np.nan, np.inf])
def test_a_traced_rho_that_is_no_radius_gives_nan(rho):
  for function, options in [
      ("worst_case", {}), ("worst_case", {"method": "one_step"}), ("average_case", {}),
      ("average_case", {"distribution": "uniform"})]:
    call, good = GOOD[function]
    run = jax.jit(lambda rho, call=call, good={**good, **options}: call(
        **{**good, "rho": rho}).value)
    assert np.isfinite(run(0.5))
    assert np.isnan(run(rho))


VALID = {
    "rho": (0, 1, np.array(0.5), np.float32(0.5), jnp.array(0.5), np.int64(1)),
    "extent": (1, np.array(1.0), jnp.array(1.0), np.float64(0.5)),
    "margin": (0, np.array(0.5), jnp.array(0.5)),
    "points": (np.int64(3),), "samples": (np.int32(4),), "steps": (np.int64(2),),
    "key": (jax.random.key(1), jax.random.PRNGKey(1)),
    "antithetic": (np.bool_(False),),
    "params": ({"kernel": np.ones((2, 2)), "bias": jnp.ones(2, jnp.bfloat16)},),
    "directions": ((D, E),), "checkpoints": ((W, D, E),),
    "measure": (np.array([1, 2]), jnp.array([1.0, 2.0], jnp.bfloat16)),
    "level": (np.array(0.9), np.float32(0.5)),
    "settings": (None, {}), "along": (None,), "loss": (None,),
}


@pytest.mark.parametrize("function", GOOD)
def test_valid_input_is_taken(function):
  call, good = GOOD[function]
  if function == "worst_case":
    good = {**good, "method": "one_step"}  # compiled sooner
  call(**good)
  for argument in good.keys() & VALID.keys():
    if argument == "measure" and function != "rank_correlation":
      continue
    if argument == "loss" and function != "direction":
      continue
    for value in VALID[argument]:
      along = {"along": None} if argument == "settings" else {}
      call(**{**good, argument: value, **along})
  pyplot.close("all")
