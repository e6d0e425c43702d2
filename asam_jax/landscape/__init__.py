"""Slices of the loss surface around w, in units of the adaptive ball, and plots.

Needs the extra ``asam_jax[sharpness]``.
"""

from asam_jax import _interop

_interop.require("landscape", "jaxtyping")

# ruff: noqa: E402  (after the error that names the extra)
from asam_jax.landscape._directions import direction
from asam_jax.landscape._plots import plot_line
from asam_jax.landscape._plots import plot_plane
from asam_jax.landscape._plots import plot_surface
from asam_jax.landscape._slices import Line
from asam_jax.landscape._slices import line
from asam_jax.landscape._slices import Plane
from asam_jax.landscape._slices import plane
from asam_jax.landscape._slices import Surface
from asam_jax.landscape._slices import surface

__all__ = [
    "Line",
    "Plane",
    "Surface",
    "direction",
    "line",
    "plane",
    "plot_line",
    "plot_plane",
    "plot_surface",
    "surface",
]
