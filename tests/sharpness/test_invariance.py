"""Adaptive measures are the same at w and Aw; plain ones are far from it."""

import math

import jax
import numpy as np
import pytest

from asam_jax import sharpness
from tests import problems
from tests.sharpness import cases

# value(loss, params, **geometry) in float64.
MEASURES = {
    "one step, p=2": lambda loss, w, **o: sharpness.worst_case(
        loss, w, 0.1, 0.0, 2, method="one_step", **o).value,
    "Auto-PGD, p=2": lambda loss, w, **o: sharpness.worst_case(
        loss, w, 0.5, 0.0, 2, restarts=0, **o).value,
    "Auto-PGD, p=inf": lambda loss, w, **o: sharpness.worst_case(
        loss, w, 0.05, 0.0, math.inf, restarts=1, **o).value,
    "average": lambda loss, w, **o: sharpness.average_case(
        loss, w, 0.1, 0.0, samples=32, **o).value,
    "uniform, p=inf": lambda loss, w, **o: sharpness.average_case(
        loss, w, 0.1, 0.0, math.inf, distribution="uniform", samples=32, **o).value,
    "largest eigenvalue": lambda loss, w, **o: sharpness.hessian_eigenvalues(
        loss, w, 1, 0.0, **o).values[0],
    "trace": lambda loss, w, **o: sharpness.hessian_trace(loss, w, 0.0, **o).value,
}


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
        kind: MEASURES[name](loss, w, normalization=kind, normalize=cases.every_leaf)
        for kind in ("elementwise", "none")})
    at_moved, at_params = run(moved), run(params)
    changes = {kind: abs(float(at_moved[kind]) / float(value) - 1)
               for kind, value in at_params.items()}
    record_property("relative change", changes)
    print(f"{name}: adaptive {changes['elementwise']:.1e}, plain {changes['none']:.2g}")
    # Exact but for rounding, which the searches' comparisons may amplify.
    assert changes["elementwise"] < 1e-6
    assert changes["none"] > 0.5
