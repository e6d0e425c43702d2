"""Adaptive measures are the same at w and Aw; plain ones are far from it."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from asam_jax import Geometry
from asam_jax import sharpness
from tests import problems
from tests.sharpness import cases

# value(loss, params, geometry with p = 2) in float64.
MEASURES = {
    "one step, p=2": lambda loss, w, g: sharpness.worst_case(
        loss, w, 0.1, geometry=g, method="one_step").value,
    "Auto-PGD, p=2": lambda loss, w, g: sharpness.worst_case(
        loss, w, 0.5, geometry=g, restarts=0).value,
    "Auto-PGD, p=inf": lambda loss, w, g: sharpness.worst_case(
        loss, w, 0.05, geometry=boxed(g), restarts=1).value,
    "average": lambda loss, w, g: sharpness.average_case(
        loss, w, 0.1, geometry=g, samples=32).value,
    "uniform, p=inf": lambda loss, w, g: sharpness.average_case(
        loss, w, 0.1, geometry=boxed(g), distribution="uniform", samples=32).value,
    "largest eigenvalue": lambda loss, w, g: sharpness.hessian_eigenvalues(
        loss, w, geometry=g).values[0],
    "trace": lambda loss, w, g: sharpness.hessian_trace(loss, w, geometry=g).value,
}


def boxed(geometry):
  return dataclasses.replace(geometry, p=math.inf)


@pytest.mark.parametrize("name", MEASURES)
def test_rescaling_a_relu_network(name, record_property):
  with problems.enable_x64(True):
    params, batch = cases.network(0, dtype=np.float64)
    loss = cases.network_loss(batch)
    moved = cases.rescaled(params)
    compiled = jax.jit(loss)
    np.testing.assert_allclose(compiled(moved), compiled(params), rtol=1e-12)

    # Both kinds in one program: they share some of their work.
    run = jax.jit(lambda w: {
        kind: MEASURES[name](loss, w, Geometry(
            0.0, normalization=kind, normalize=cases.every_leaf))
        for kind in ("elementwise", "none")})
    at_moved, at_params = run(moved), run(params)
    changes = {kind: abs(float(at_moved[kind]) / float(value) - 1)
               for kind, value in at_params.items()}
    record_property("relative change", changes)
    print(f"{name}: adaptive {changes['elementwise']:.1e}, plain {changes['none']:.2g}")
    # Exact but for rounding, which the searches' comparisons may amplify.
    assert changes["elementwise"] < 1e-6
    assert changes["none"] > 0.5
