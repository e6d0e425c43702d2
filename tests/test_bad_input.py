
"""Bad input to the public surface: the error names the argument, and none is silent.

A table of calls, arguments and kinds of bad values, that of the measures and
landscapes left to tests/sharpness; and valid input that must not be refused.
"""

import collections
import functools
import inspect
import math
from pathlib import Path
import re
import traceback
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import asam_jax
from asam_jax import Geometry
import asam_jax.nnx

ROOT = Path(asam_jax.__file__).parent
W = {"kernel": jnp.array([[1.0, -2.0], [0.5, 1.5]]), "bias": jnp.array([0.5, 0.0])}
ROWS = jnp.array([[1.0, 2.0], [3.0, 4.0]])
SGD = optax.sgd(0.1)
KEYS = tuple(jax.tree_util.tree_leaves_with_path(W)[1][0])
MODEL = nnx.Linear(2, 1, rngs=nnx.Rngs(0))


def with_entry(entry):
  return {"kernel": entry, "bias": W["bias"]}


def loss(w, batch=ROWS):
  return jnp.mean((batch @ w["kernel"] + w["bias"]) ** 2)


def module_loss(model, batch=ROWS):
  return jnp.mean(model(batch) ** 2)


def model(w, batch=ROWS):
  return batch @ w["kernel"] + w["bias"]


def loss_of(outputs, batch=ROWS):
  return jnp.mean(outputs**2)


def link():
  return asam_jax.perturbed_gradient(asam_jax.ascent(0.1))


GRADS = jax.grad(loss)(W)

# Kinds of bad values.
NUMBER_LIKE = (None, "0.5", True, 1j, [0.5], (), {}, object(), jnp.array([0.1, 0.2]),
               np.array([0.5]), jnp.array(1j), jnp.array(True), np.array("a"),
               math.nan, math.inf, -math.inf, np.float32("nan"), jnp.array(jnp.nan),
               jnp.array(jnp.inf), np.array(np.nan), np.float64(np.inf))
BELOW_0 = (-1.0, -1, np.array(-1.0), np.float32(-1), jnp.array(-1.0), jnp.array(-1))
RESULTS = tuple(
    (lambda step, value=value: value)
    for value in (*NUMBER_LIKE, *BELOW_0)
)
RADIUS = (*NUMBER_LIKE, *BELOW_0)
SCHEDULE = (*RADIUS, *RESULTS)
DECAY = (*RADIUS, 1.0, 1, 1.5, jnp.array(1.0), lambda step: 0.9)
EXPONENT = (None, "2", "inf", True, 1j, 0.5, 0, -1, -math.inf, math.nan, [2], (2,), {},
            jnp.array(2.0), jnp.array([2.0]), lambda step: 2, np.float32("nan"))
COUNT = (None, "3", 2.5, True, math.nan, math.inf, -1, 0, [3], (3,), jnp.ones(2), 1j,
         lambda step: 3)
FLAG = (None, "yes", 1, 0, [True], jnp.ones(2), object())
OPTIONAL_FLAG = tuple(value for value in FLAG if value is not None)
FUNCTION = (None, 3, "loss", W, [loss], jnp.ones(2))
TRANSFORMATION = (None, 3, "sgd", W, object(), optax.sgd, lambda g: g, (SGD,), SGD.init,
                  optax.GradientTransformation)
WHOLE = asam_jax.adaptive_sam(SGD)
BASE = (*TRANSFORMATION, WHOLE, link(), asam_jax.ascent, asam_jax.ascent())
ASCENT = (*TRANSFORMATION, WHOLE, link(), asam_jax.ascent)
LINK = (*TRANSFORMATION, WHOLE, SGD, asam_jax.ascent(), asam_jax.ascent)
GEOMETRY = (None, 0.01, "elementwise", {"eta": 0.01}, Geometry, W, True)
ENTRIES = ("w", object(), 1j, jnp.ones((2, 2)) * 1j, ["a"], optax.MaskedNode())
PARAMS = ("w", object(), *map(with_entry, ENTRIES),
          with_entry(jnp.ones((2, 2), int)), with_entry(jnp.ones((2, 2), bool)))
OTHER_TREES = ("w", object(), (), {}, W["kernel"], [W], (1.0, W), (W, 1.0),
               {"kernel": W["kernel"]}, W | {"more": jnp.ones(2)},
               with_entry("w"), with_entry(None), with_entry(jnp.ones(2)),
               with_entry(jnp.ones((2, 2, 1))), with_entry(1.0),
               with_entry(jnp.ones((2, 2)) * 1j), with_entry(jnp.ones((2, 2), int)),
               with_entry(jnp.ones((2, 2), bool)), with_entry(optax.MaskedNode()),
               with_entry(object()))
TREE = (None, *OTHER_TREES)
GRADIENT_FUNCTIONS = (
    3, "f", W, *((lambda w, value=value: value) for value in TREE),
    lambda w: with_entry(w["kernel"].astype(jnp.bfloat16)),
)
LOSSES = (3, "f", W, *(
    (lambda w, value=value: value)
    for value in (None, "a", jnp.ones(2), jnp.array(1j), 1j, jnp.array(1), 1, True, W,
                  (), (jnp.array(1.0), None), object())
))
OPERATORS = (None, "", "batchwise", 3, True, ["elementwise"], {}, W, *(
    (lambda w, eta, value=value: value)
    for value in (None, "a", 1j, jnp.ones(3), jnp.ones((2, 2, 2)), (), W, object())
))
SELECTION = ("kernel", 3, True, [True], (), {}, {"kernel": True}, [True, False], *(
    {"kernel": value, "bias": True}
    for value in (1, "yes", 1.0, jnp.ones((2, 2), bool), np.ones(1, bool), jnp.array(1))
), *(
    (lambda path, leaf, value=value: value)
    for value in (None, 1, "yes", 0.0, jnp.array([True, False]), (), object())
))
TYPE = ("float99", 3, jnp.int32, "int8", jnp.complex64, bool, object(), [jnp.float32],
        loss, np.dtype("U3"))
ARGNUMS = (0.5, "0", None, True, [0.5], (), [], [None], 7, -7, jnp.ones(2), loss)
KEY = (None, 1.5, "key", True, (), [0], jnp.ones(2), jnp.ones((), int), object(), loss,
       jax.random.split(jax.random.key(0)), jnp.ones((2, 2), jnp.uint32))
AXIS = (3, True, 1.5, 1j, [], (), {}, {"rows"}, [None], jnp.ones(2), loss, object(),
        "rows", ("rows", "columns"))
SPECS = ("rows", 3, True, {}, (), [], ("rows",), W, object(), loss, {"kernel": P()},
         P("rows"), {"kernel": P(None, None, None), "bias": P()})
WHEN = (None, 3, "every", [True], W, True, asam_jax.Gate(None, None), *(
    (lambda step, value=value: value)
    for value in (None, 1, "yes", 1.0, jnp.array(1), jnp.array([True]), (), object())
))
GRAD_FN = {"grad_fn": jax.grad(loss)}


def one_update(tx, grads=GRADS, params=W, state=None, **extra):
  return tx.update(grads, tx.init(W) if state is None else state, params, **extra)


def optimizer(make, **good):
  """A row for the making of an optimizer and its first step."""
  def call(init_params, **arguments):
    tx = make(**arguments)
    tx.init(init_params)
    return one_update(tx, **GRAD_FN)

  return call, {**good, "init_params": W}


def door(make, function, *args):
  """A row for the making of a function and its first call."""
  def call(**arguments):
    return make(**{"fun": function, **arguments})(*args)

  return call


ASCENT_GOOD = {"rho": 0.1, "eta": 0.01, "p": 2, "normalization": "elementwise",
               "normalize": None, "perturb": None, "param_specs": None}
DOOR_GOOD = ASCENT_GOOD | {
    "fun": loss, "argnums": 0, "has_aux": False, "ascent": None, "accumulate": None,
    "axis_name": None, "average_ascent": False, "with_info": False}
ALIAS_GOOD = {"base_tx": SGD, "rho": 0.1, "geometry": Geometry(), "axis_name": None}


def without_ascent(call):
  """With another chain, the door takes neither rho nor geometry."""
  def wrapped(ascent=None, **arguments):
    if ascent is not None:
      kept = {"fun", "model", "loss"} & set(arguments)
      arguments = {"ascent": ascent} | {name: arguments[name] for name in kept}
    return call(**arguments)

  return wrapped


def functional(**arguments):
  arguments = {"model": model, "loss": loss_of, **arguments}
  return asam_jax.functional_value_and_grad(**arguments)(W, ROWS)


INFO = asam_jax.AscentInfo(*[jnp.ones(())] * len(asam_jax.AscentInfo._fields))


def update_of(make):
  return lambda **arguments: one_update(make(), **arguments)


def with_info(**arguments):
  tx = asam_jax.adaptive_sam(SGD, 0.1, with_info=True)
  return one_update(tx, **arguments)


def ruled(make):
  """A row for a radius rule, in an optimizer's second step."""
  def call(**arguments):
    tx = asam_jax.adaptive_sam(SGD, make(**arguments))
    losses = {"value": jnp.array(1.0), "value_fn": loss}
    _, state = one_update(tx, **losses)
    return one_update(tx, state=state, **losses)

  return call


GOOD: dict[str, tuple[Any, dict[str, Any]]] = {
    "ascent": optimizer(asam_jax.ascent, **ASCENT_GOOD),
    "adaptive_sam": optimizer(
        asam_jax.adaptive_sam, base_tx=SGD, axis_name=None, **ASCENT_GOOD),
    "adaptive_sam(flags)": (
        functools.partial(asam_jax.adaptive_sam, SGD, axis_name="batch"),
        {"with_info": False, "average_ascent": False}),
    "sam(flags)": (
        functools.partial(asam_jax.sam, SGD, axis_name="batch"),
        {"with_info": False, "average_ascent": False}),
    "sam": optimizer(
        asam_jax.sam, base_tx=SGD, rho=0.1, p=2, perturb=None, param_specs=None,
        axis_name=None),
    "momentum_sam": optimizer(
        asam_jax.momentum_sam, base_tx=SGD, decay=0.9, dtype=None, **ASCENT_GOOD),
    "carried": optimizer(
        asam_jax.carried, base_tx=SGD, ascent_tx=asam_jax.ascent(0.1), dtype=None),
    "looksam": optimizer(asam_jax.looksam, **ALIAS_GOOD, k=2, alpha=0.7),
    "ae_sam": optimizer(asam_jax.ae_sam, **ALIAS_GOOD, threshold=0.0, decay=0.9),
    "gsam": optimizer(asam_jax.gsam, **ALIAS_GOOD, alpha=0.4),
    "friendly_sam": optimizer(
        asam_jax.friendly_sam, **ALIAS_GOOD, sigma=1.0, decay=0.9),
    "vasso": optimizer(asam_jax.vasso, **ALIAS_GOOD, decay=0.6),
    "perturbed_gradient": optimizer(
        asam_jax.perturbed_gradient, ascent_tx=asam_jax.ascent(0.1), axis_name=None),
    "perturbed_gradient(info)": (
        functools.partial(
            asam_jax.perturbed_gradient, asam_jax.ascent(0.1), axis_name="batch"),
        {"info": Geometry(), "average_ascent": False}),
    "combined": optimizer(asam_jax.combined, link=link(), combine=lambda g, h: h),
    "surrogate_gap": (
        lambda alpha, clean, perturbed: asam_jax.surrogate_gap(alpha)(clean, perturbed),
        {"alpha": 0.4, "clean": GRADS, "perturbed": GRADS}),
    "renormalized": (
        asam_jax.renormalized, {"clean": GRADS, "perturbed": GRADS}),
    "radius_verdict": (asam_jax.radius_verdict, {"infos": [INFO] * 8, "chance": 1.0}),
    "subtract_ema": optimizer(
        lambda **options: optax.with_extra_args_support(
            asam_jax.subtract_ema(**options)), decay=0.9, sigma=1.0),
    "iterated": optimizer(
        asam_jax.iterated, ascent_tx=asam_jax.ascent(0.1), steps=2),
    "sometimes": optimizer(
        asam_jax.sometimes, link=link(), when=lambda step: True, reuse=0.0),
    "late": (asam_jax.late, {"total_steps": 10, "share": 0.2}),
    "above_average": (
        lambda threshold, decay, init_params, grads: (
            lambda gate: gate.update(grads, gate.init(init_params))
        )(asam_jax.above_average(threshold, decay)),
        {"threshold": 0.0, "decay": 0.9, "init_params": W, "grads": GRADS}),
    "skip_nonfinite": optimizer(
        asam_jax.skip_nonfinite, base_tx=SGD, link=link(), axis_name=None),
    "stochastic_rounding": optimizer(asam_jax.stochastic_rounding, key=0),
    "auto_radius": (
        ruled(asam_jax.auto_radius),
        {"cosine": 0.8, "rate": 0.05, "start": 0.05, "rho_max": 10.0, "over": None}),
    "rise_radius": (
        ruled(asam_jax.rise_radius),
        {"rise": 0.1, "rate": 0.05, "start": 0.05, "rho_max": 10.0}),
    "loss_budget": (ruled(asam_jax.loss_budget), {"sigma": 0.1, "rho_max": 1.0}),
    "value_and_grad(radius)": (
        lambda radius: asam_jax.value_and_grad(loss, rho=asam_jax.auto_radius())(
            W, radius=radius), {"radius": asam_jax.AutoRadiusState(jnp.array(0.1))}),
    "value_and_grad": (
        without_ascent(door(asam_jax.value_and_grad, loss, W, ROWS)),
        DOOR_GOOD | {"m_sharpness": None}),
    "grad": (
        without_ascent(door(asam_jax.grad, loss, W, ROWS)),
        DOOR_GOOD | {"m_sharpness": None}),
    "functional_value_and_grad": (
        without_ascent(functional),
        {"model": model, "loss": loss_of}
        | {name: value for name, value in DOOR_GOOD.items() if name != "fun"}),
    "nnx.value_and_grad": (
        without_ascent(door(asam_jax.nnx.value_and_grad, module_loss, MODEL, ROWS)),
        DOOR_GOOD | {"fun": module_loss, "m_sharpness": None}),
    "nnx.grad": (
        without_ascent(door(asam_jax.nnx.grad, module_loss, MODEL, ROWS)),
        DOOR_GOOD | {"fun": module_loss, "m_sharpness": None}),
    "value_and_grad(...)": (
        lambda params: asam_jax.value_and_grad(loss)(params, ROWS), {"params": W}),
    "nnx.value_and_grad(...)": (
        lambda module: asam_jax.nnx.value_and_grad(module_loss)(module, ROWS),
        {"module": MODEL}),
    "nnx.grad_fn": (
        lambda fun, module, argnums, has_aux: asam_jax.nnx.grad_fn(
            fun, module, ROWS, argnums=argnums, has_aux=has_aux),
        {"fun": module_loss, "module": MODEL, "argnums": 0, "has_aux": False}),
    "nnx.value_fn": (
        lambda fun, module, argnums, has_aux: asam_jax.nnx.value_fn(
            fun, module, ROWS, argnums=argnums, has_aux=has_aux),
        {"fun": module_loss, "module": MODEL, "argnums": 0, "has_aux": False}),
    "nnx.grad_fn(...)": (
        lambda params: asam_jax.nnx.grad_fn(module_loss, MODEL, ROWS)(params),
        {"params": None}),
    "nnx.value_fn(...)": (
        lambda params: asam_jax.nnx.value_fn(module_loss, MODEL, ROWS)(params),
        {"params": None}),
    "microbatched": (
        lambda fun, size, argnums, weights, batch: asam_jax.microbatched(
            fun, size, argnums, weights=weights)(W, batch),
        {"fun": loss, "size": 1, "argnums": 1, "weights": None, "batch": ROWS}),
    "nnx.microbatched": (
        lambda fun, size, argnums, weights, batch: asam_jax.nnx.microbatched(
            fun, size, argnums, weights=weights)(MODEL, batch),
        {"fun": module_loss, "size": 1, "argnums": 1, "weights": None,
         "batch": ROWS}),
    "describe": (
        asam_jax.describe,
        {"params": W, "geometry": None}),
    "describe(**options)": (
        functools.partial(asam_jax.describe, W),
        {k: v for k, v in ASCENT_GOOD.items() if k != "rho"}),
    "Geometry": (
        lambda **options: Geometry(**options).norm(GRADS, W),
        {k: v for k, v in ASCENT_GOOD.items() if k != "rho"}),
    "Geometry.norm": (Geometry().norm, {"epsilon": GRADS, "params": W}),
    "Geometry.dual_norm": (Geometry().dual_norm, {"grads": GRADS, "params": W}),
    "elementwise": (asam_jax.elementwise, {"w": W["kernel"], "eta": 0.01}),
    "filterwise": (
        asam_jax.filterwise,
        {"w": jnp.ones((2, 2, 2)), "eta": 0.01, "filter_axis": -1}),
    "layerwise": (asam_jax.layerwise, {"w": W["kernel"], "eta": 0.01}),
    "is_not_bias": (asam_jax.is_not_bias, {"path": KEYS, "leaf": W["kernel"]}),
    "eval_params": (
        asam_jax.eval_params,
        {"opt_state": asam_jax.carried(SGD, asam_jax.ascent()).init(W)}),
    # What an update is given.
    "adaptive_sam.update": (
        update_of(lambda: asam_jax.adaptive_sam(SGD, 0.1)),
        {"grads": GRADS, "params": W, **GRAD_FN}),
    "adaptive_sam.update(value_fn)": (
        update_of(lambda: asam_jax.adaptive_sam(SGD, 0.1)),
        {"value_fn": loss}),
    "adaptive_sam.update(with_info)": (
        with_info, {"value": jnp.array(1.0), "value_fn": loss}),
    "ascent.update": (
        update_of(asam_jax.ascent), {"grads": GRADS, "params": W}),
    "carried.update": (
        update_of(lambda: asam_jax.carried(SGD, asam_jax.ascent(0.1))),
        {"grads": GRADS, "params": W}),
    "momentum_sam.update": (
        update_of(lambda: asam_jax.momentum_sam(SGD, 0.1)),
        {"grads": GRADS, "params": W}),
    "sometimes.update": (
        update_of(lambda: asam_jax.sometimes(link(), lambda step: step < 0)),
        {"grads": GRADS, "params": W, "ascend": True, **GRAD_FN}),
    "combined.update": (
        update_of(lambda: asam_jax.combined(link(), asam_jax.surrogate_gap(0.1))),
        {"grads": GRADS, "params": W, **GRAD_FN}),
    "iterated.update": (
        update_of(lambda: asam_jax.iterated(asam_jax.ascent(0.1), 2)),
        {"grads": GRADS, "params": W, **GRAD_FN}),
    "skip_nonfinite.update": (
        update_of(lambda: asam_jax.skip_nonfinite(SGD, link())),
        {"grads": GRADS, "params": W, **GRAD_FN}),
    "subtract_ema.update": (
        update_of(asam_jax.subtract_ema), {"grads": GRADS}),
    "stochastic_rounding.update": (
        update_of(lambda: asam_jax.stochastic_rounding(0)),
        {"grads": GRADS, "params": W}),
}

POSITIVE = (*RADIUS, 0, 0.0, jnp.array(0.0), lambda step: 1.0)
BAD: dict[str, tuple[Any, ...]] = {
    "cosine": (*POSITIVE, 1, 1.0, 1.5, jnp.array(1.0)), "rate": POSITIVE,
    "start": POSITIVE, "rho_max": POSITIVE, "rise": POSITIVE, "over": SELECTION,
    "radius": (None, 0.1, "0.1", (), W, jnp.array(0.1), object(), [jnp.array(0.1)],
               asam_jax.AutoRadiusState(jnp.ones(2)), asam_jax.AutoRadiusState("a"),
               asam_jax.AutoRadiusState(None)),
    "base_tx": BASE, "ascent_tx": ASCENT, "link": LINK, "rho": SCHEDULE,
    "eta": SCHEDULE, "p": EXPONENT, "normalization": OPERATORS, "normalize": SELECTION,
    "perturb": SELECTION, "decay": DECAY, "dtype": TYPE, "k": COUNT, "steps": COUNT,
    "size": COUNT, "threshold": (*NUMBER_LIKE, *RESULTS[:len(NUMBER_LIKE)]),
    "sigma": (*NUMBER_LIKE, lambda step: 1.0), "reuse": (*RADIUS, lambda step: 1.0),
    "geometry": GEOMETRY, "info": GEOMETRY[1:], "key": KEY, "when": WHEN,
    "combine": (*FUNCTION, *((lambda g, h, value=value: value) for value in TREE)),
    "clean": TREE, "perturbed": TREE, "fun": FUNCTION, "argnums": ARGNUMS,
    "has_aux": FLAG, "average_ascent": FLAG, "with_info": FLAG,
    "ascent": tuple(value for value in ASCENT if value is not None),
    "accumulate": tuple(x for x in COUNT if not (x is None or callable(x))),
    "m_sharpness": tuple(x for x in COUNT if x is not None),
    "infos": (None, 3, "infos", (), [], [INFO] * 7, [INFO] * 8 + [None], INFO, W,
              [INFO] * 8 + [tuple(INFO)], [INFO._replace(cosine=None)] * 8,
              [INFO._replace(rise="a")] * 8, [INFO._replace(value=jnp.ones(2))] * 8,
              [INFO._replace(gap=jnp.array(1j))] * 8, iter([INFO] * 8)),
    "chance": tuple(x for x in (*NUMBER_LIKE, lambda step: 1.0) if x is not None),
    "total_steps": COUNT, "share": (*RADIUS, 1.5, 2, np.array(1.1), lambda step: 0.5),
    "axis_name": AXIS, "param_specs": SPECS,
    "model": (*FUNCTION, *(
        (lambda w, x, value=value: value)
        for value in (None, "a", 1.0, (), {}, jnp.ones(2, int), jnp.array(1j), loss))),
    "loss": (*FUNCTION, *((lambda outputs, x, f=f: f(outputs)) for f in LOSSES[3:])),
    "batch": ("rows", 3.0, (), None, jnp.ones((0, 2)), (jnp.ones(3), jnp.ones(4)),
              object(), ["a"]),
    "weights": (3, "sum", ROWS, *(
        (lambda x, value=value: value)
        for value in (None, "a", jnp.ones(2), jnp.array(1j), W, object()))),
    "params": PARAMS, "init_params": PARAMS, "grads": TREE, "epsilon": TREE,
    "grad_fn": GRADIENT_FUNCTIONS, "value_fn": LOSSES,
    "value": (None, "1", 1j, True, jnp.ones(2), [1.0], W, object(), jnp.array(1j)),
    "ascend": ("yes", 1, 1.0, jnp.ones(2, bool), [True], object(), jnp.array(1)),
    "w": (None, "w", 1j, [1.0], {}, object(), jnp.ones(2) * 1j, jnp.ones(2, int)),
    "path": (None, "kernel", ["a", "b"], ("kernel",), 3, {"kernel": 1}, (3,), (None,),
             object(), True),
    "leaf": (None, "w", object(), {}),
    "filter_axis": (None, "0", 1.0, True, 9, -9, [0]),
    "opt_state": (None, (), W, 3, SGD.init(W), [asam_jax.carried(
        SGD, asam_jax.ascent()).init(W)] * 2),
    "module": (None, 3, W, ROWS, "model", nnx.Dropout(0.5), nnx.Linear),
}
# A function transformation has no steps, an operator and a measure neither.
NO_STEPS = (*RADIUS, lambda step: 0.5)
NNX_PARAMS = (None, "w", W, {}, (), MODEL, jnp.ones(2),
              {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(2)},
              {"kernel": jnp.ones((2, 1))},
              {"kernel": jnp.ones((2, 1)), "bias": "b"})
ONLY: dict[tuple[str, str], tuple[Any, ...]] = {
    **{(f"{door}", argument): NO_STEPS
       for door in ("value_and_grad", "grad", "functional_value_and_grad",
                    "nnx.value_and_grad", "nnx.grad")
       for argument in ("rho", "eta")},
    **{(name, "eta"): NO_STEPS
       for name in ("Geometry", "elementwise", "filterwise", "layerwise")},
    ("describe(**options)", "eta"): RADIUS,  # its schedule is never asked
    ("describe(**options)", "normalization"): OPERATORS[:8],  # nor is a function
    ("loss_budget", "sigma"): SCHEDULE,
    # No limit is valid there.
    ("loss_budget", "rho_max"): tuple(
        x for x in POSITIVE if not (isinstance(x, float) and x == math.inf)),
    ("gsam", "alpha"): (*NUMBER_LIKE, lambda step: 1.0),
    ("surrogate_gap", "alpha"): (*NUMBER_LIKE, lambda step: 1.0),
    ("looksam", "alpha"): (*RADIUS, lambda step: 1.0),
    ("describe", "geometry"): GEOMETRY[1:],
    ("nnx.grad_fn(...)", "params"): NNX_PARAMS,
    ("nnx.value_fn(...)", "params"): NNX_PARAMS,
    **{(name, "argnums"): (0.5, "0", None, True, [0.5], (), 7, -7, [0], loss)
       for name in ("nnx.value_and_grad", "nnx.grad", "nnx.grad_fn", "nnx.value_fn")},
    # A loss that returns no real number is one, too.
    **{(door, "fun"): (*FUNCTION, *((lambda w, x, f=f: f(w)) for f in LOSSES[3:]))
       for door in ("value_and_grad", "grad", "nnx.value_and_grad", "nnx.grad")},
    **{(f"{name}.update", "params"): (None, *OTHER_TREES[:6], *PARAMS[2:4])
       for name in ("adaptive_sam", "ascent", "carried", "momentum_sam", "sometimes",
                    "combined", "iterated", "skip_nonfinite", "stochastic_rounding")},
    ("stochastic_rounding", "init_params"): (),  # it has a look at none
    ("above_average", "init_params"): (),
    # A gate is not told the parameters: any real arrays are a gradient to it.
    ("above_average", "grads"): ("w", object(), *map(with_entry, (
        "w", object(), jnp.ones(2) * 1j))),
    # A table may be printed outside of shard_map.
    ("describe(**options)", "param_specs"): tuple(x for x in SPECS if x != P("rows")),
    # Leaves that are no floats are left alone, as their gradients are.
    **{(name, "init_params"): PARAMS[:3]
       for name in ("subtract_ema",)},
}
CONTEXT: dict[tuple[str, str], dict[str, Any]] = {
    ("adaptive_sam.update(with_info)", "value_fn"): {"value": jnp.array(1.0)},
    **{(door, "average_ascent"): {"axis_name": "batch"}
       for door in ("value_and_grad", "grad", "functional_value_and_grad",
                    "nnx.value_and_grad", "nnx.grad")},
}
# The errors speak of what the argument is for.
SAID = {
    "init_params": "params", "grads": "gradient|grads|perturbation",
    "ascend": "when|ascend", "grad_fn": "grad_fn", "clean": "clean",
    "argnums": "argnums", "ascent": "ascent|ascent_tx", "batch": "batch|size",
    "module": "argnums|module",
}


def rows():
  for function, (_, good) in GOOD.items():
    for argument in good:
      for value in ONLY.get((function, argument), BAD.get(argument, ())):
        yield function, argument, value


def outcome(function, argument, value):
  """("silent" or "obscure" or "clear", what happened)."""
  call, good = GOOD[function]
  context = CONTEXT.get((function, argument), {})
  try:
    call(**{**good, **context, argument: value})
  except Exception as error:  # any at all, to see which
    text = " ".join([str(error), *getattr(error, "__notes__", ())])
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = ROOT in Path(last).parents or getattr(error, "__notes__", ())
    name = SAID.get(argument, re.escape(argument))
    named = re.search(rf"(?<![a-z_])({name})(?![a-z_])", text)
    kind = isinstance(error, (TypeError, ValueError))
    verdict = "clear" if ours and named and kind else "obscure"
    return verdict, f"{type(error).__name__}: {text[:150]}"
  return "silent", ""


def test_none_is_silent_and_the_errors_name_the_argument():
  counts, complaints = collections.Counter(), []
  for function, argument, value in rows():
    verdict, what = outcome(function, argument, value)
    counts[verdict] += 1
    if verdict != "clear":
      complaints.append(f"{verdict}: {function}({argument}={value!r}): {what}")
  print(dict(counts))
  assert counts["clear"] > 3000
  assert counts["silent"] == 0, "\n".join(complaints)
  assert counts["obscure"] <= 20, "\n".join(complaints)


def test_every_public_name_is_in_the_table():
  rows_of = {re.split(r"[.(]", name.removeprefix("nnx."))[0] for name in GOOD}
  classes = {"AscentInfo", "Description", "Gate", "LeafDescription", "Observed",
             "RadiusRule", "RadiusVerdict", "__version__"}
  public = {name for name in asam_jax.__all__ if not name.endswith("State")} - classes
  assert public | set(asam_jax.nnx.__all__) <= rows_of


def test_every_argument_is_in_the_table():
  rows_of = collections.defaultdict(set)
  for name, (_, good) in GOOD.items():
    rows_of[name.split("(")[0]] |= set(good)
  for prefix, module in (("", asam_jax), ("nnx.", asam_jax.nnx)):
    for name in module.__all__:
      value = getattr(module, name)
      if inspect.isfunction(value) or value is Geometry:
        arguments = {
            p.name for p in inspect.signature(value).parameters.values()
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
        assert arguments <= rows_of[prefix + name], name


def test_every_argument_has_bad_values():
  for function, (_, good) in GOOD.items():
    for argument in good:
      assert argument in BAD or (function, argument) in ONLY, (function, argument)


# Valid input, which must be accepted.

NUMBERS = (0, 1, 0.5, np.float32(0.5), np.float64(0.5), np.float16(0.5), np.int64(1),
           np.array(0.5), np.array(1), jnp.array(0.5), jnp.array(1),
           jnp.array(0.5, jnp.bfloat16))
SCHEDULES = (optax.constant_schedule(0.5), optax.linear_schedule(1.0, 0.0, 10),
             lambda step: np.float32(0.5), lambda step: 1, lambda step: 0.1 * step)
BOOLS = (True, np.bool_(True), jnp.array(True), np.array(True))
SELECTIONS = (*({"kernel": value, "bias": True} for value in BOOLS), None,
              *((lambda path, leaf, value=value: value) for value in BOOLS))
COUNTS = (1, 2, np.int32(2), np.int64(2), np.uint8(1))
DECAYS = (0, 0.0, 0.5, np.float32(0.5), np.array(0.5), jnp.array(0.5), jnp.array(0))
VALID: dict[str, tuple[Any, ...]] = {
    "rho": NUMBERS, "eta": NUMBERS, "decay": DECAYS, "sigma": (*NUMBERS, -0.5),
    "reuse": NUMBERS, "threshold": (*NUMBERS, *SCHEDULES, -1.0), "k": COUNTS,
    "infos": ([INFO] * 8, (INFO,) * 9, jax.tree.map(lambda x: np.ones(8), INFO),
              [INFO._replace(value=1.0)] * 8, [INFO._replace(cosine=np.nan)] * 8),
    "chance": (None, *NUMBERS, -1.0),
    "total_steps": COUNTS, "share": (*DECAYS, 1, 1.0, np.array(1)),
    "steps": COUNTS, "size": COUNTS, "accumulate": (None, np.int64(2)),
    "m_sharpness": (None, np.int64(2)),
    "p": (1, 2, 1.5, math.inf, np.inf, np.float32(2), np.int64(3)),
    "normalize": SELECTIONS, "perturb": SELECTIONS,
    "normalization": ("none", "layerwise", "filterwise", asam_jax.filterwise,
                      functools.partial(asam_jax.filterwise, filter_axis=0),
                      lambda w, eta: 1.0, lambda w, eta: 2, lambda w, eta: abs(w)),
    "dtype": (None, jnp.float32, "float32", np.float32, jnp.bfloat16, "f",
              np.dtype("float32")),
    "key": (0, -1, np.int64(3), np.uint32(3), jax.random.key(0), jax.random.PRNGKey(0)),
    "has_aux": (False, np.bool_(False)), "with_info": (False, np.bool_(False)),
    "average_ascent": (False, np.bool_(False)),
    "when": (lambda step: True, lambda step: np.bool_(True), lambda step: step >= 0,
             lambda step: np.array(True), asam_jax.above_average()),
    "ascend": (None, True, np.bool_(False), jnp.array(True), np.array(True)),
    "combine": (lambda g, h: g, lambda g, h: jax.tree.map(jnp.add, g, h)),
    "base_tx": (optax.identity(), optax.chain(optax.clip(1.0), SGD),
                optax.inject_hyperparams(optax.sgd)(0.1)),
    "w": (np.ones(3, np.float32), jnp.ones((), jnp.bfloat16), jnp.ones((2, 0))),
    "path": ((), [], KEYS), "leaf": (1.0, 3, np.ones(2), jax.ShapeDtypeStruct((), int)),
    "filter_axis": (-1, 0, 2), "batch": (np.ones((2, 2)), jnp.ones((4, 2))),
    "argnums": (np.int64(0),),
}


def valid_rows():
  doors = {"value_and_grad", "grad", "functional_value_and_grad",
           "nnx.value_and_grad", "nnx.grad"}
  of_links = {"looksam", "ae_sam"}  # compile a branch at every call
  for function, (_, good) in GOOD.items():
    if function in ("grad", "nnx.grad"):  # the same checks as value_and_grad's
      continue
    if function in of_links:
      yield from ((function, argument, values[-2:]) for argument, values in (
          ("k", COUNTS), ("threshold", SCHEDULES)) if argument in good)
      continue
    schedules = "eta" in good and function not in doors and "Geometry" not in function
    for argument in good:
      if argument == "filter_axis":
        yield function, argument, VALID["filter_axis"]
      elif argument in ("rho", "eta") and schedules and not function.endswith("wise"):
        yield function, argument, (*VALID[argument], *SCHEDULES)
      elif function.startswith("nnx.") and argument in ("normalize", "perturb"):
        yield function, argument, SELECTIONS[-len(BOOLS):]
      elif argument == "argnums" and "microbatched" in function:
        yield function, argument, (np.int64(1), (1,), [np.int64(1)])
      elif argument == "argnums" and function.startswith("nnx."):
        yield function, argument, (0, -2, np.int64(0), nnx.DiffState(0, nnx.Param))
      elif (function, argument) == ("loss_budget", "sigma"):
        yield function, argument, (*NUMBERS, *SCHEDULES)
      elif VALID.get(argument):
        yield function, argument, VALID[argument]


@pytest.mark.parametrize(
    ("function", "argument", "values"), [*valid_rows()],
    ids=lambda x: x if isinstance(x, str) else "")
def test_valid_input_is_accepted(function, argument, values):
  call, good = GOOD[function]
  for value in values:
    call(**{**good, argument: value})


TREES = {
    "tuple": (W["kernel"], W["bias"]), "list": [W["kernel"], W["bias"]],
    "None": {"kernel": W["kernel"], "none": None}, "array": W["kernel"],
    "NumPy": jax.tree.map(np.asarray, W), "scalars": {"kernel": jnp.array(1.0)},
    "empty leaf": {"kernel": jnp.ones((0, 2)), "bias": W["bias"]},
    "bfloat16": jax.tree.map(lambda x: x.astype(jnp.bfloat16), W),
    "nothing": {},
}
OPTIMIZERS = {
    "adaptive_sam": lambda: asam_jax.adaptive_sam(SGD),
    "momentum_sam": lambda: asam_jax.momentum_sam(SGD),
    "looksam": lambda: asam_jax.looksam(SGD),
    "gsam": lambda: asam_jax.gsam(SGD),
    "friendly_sam": lambda: asam_jax.friendly_sam(SGD),
    "vasso": lambda: asam_jax.vasso(SGD),
    "skip_nonfinite": lambda: asam_jax.skip_nonfinite(SGD, link()),
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_valid_trees_are_accepted(name, tree):
  params, tx = TREES[tree], OPTIMIZERS[name]()
  grads = jax.tree.map(jnp.ones_like, params)
  shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))
  assert jax.tree.structure(jax.eval_shape(tx.init, shapes)) == jax.tree.structure(
      tx.init(params))
  updates, _ = tx.update(grads, tx.init(params), params, grad_fn=lambda w: grads)
  assert jax.tree.structure(updates) == jax.tree.structure(params)
  asam_jax.describe(params)


@pytest.mark.parametrize("name", ["ascent", "adaptive_sam", "carried", "stochastic"])
def test_shapes_are_enough_for_init(name):
  tx = {
      "ascent": asam_jax.ascent, "adaptive_sam": OPTIMIZERS["adaptive_sam"],
      "carried": lambda: asam_jax.carried(optax.identity(), asam_jax.ascent()),
      "stochastic": lambda: asam_jax.stochastic_rounding(0),
  }[name]()
  tx.init(jax.eval_shape(lambda: W))
