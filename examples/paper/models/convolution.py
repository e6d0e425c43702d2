"""3x3 convolutions whose kernel gradient is faster on a CPU.

XLA's CPU code takes much longer for the gradient to a 3x3 kernel than for the
convolution itself, with as many multiplications. With x shifted by each of three
columns and the output's gradient g by each of three rows,

    dk[i, j] = sum over images, rows y and columns x of X[y + i, x + j]^T G[y, x]

is one matrix product of [3 c_in, pixels] and [pixels, 3 c_out], and the shifts of a few
images at a time fit into the processor's cache.
"""

import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

GROUP = 4  # images whose shifts are held at once


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    strides: Any,
    padding: Any,
    *,
    feature_group_count: int = 1,
    **options: Any,
) -> jax.Array:
  """What ``nn.Conv`` wants of a convolution; equal to XLA's own up to rounding.

  The other gradient is used for 3x3 kernels of stride 1 in one group, with a pixel of
  padding on each side; whatever else comes is left to XLA. There is no forward-mode
  derivative. The batch must be on one device.
  """
  same = list(padding) == [(1, 1), (1, 1)] and feature_group_count == 1
  if kernel.shape[:2] == (3, 3) and tuple(strides) == (1, 1) and same:
    return _convolve3x3(images, kernel)
  return lax.conv_general_dilated(
      images,
      kernel,
      strides,
      padding,
      feature_group_count=feature_group_count,
      **options,
  )


def _convolve(images, kernel):
  return lax.conv_general_dilated(
      images,
      kernel,
      (1, 1),
      ((1, 1), (1, 1)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


@jax.custom_vjp
def _convolve3x3(images, kernel):
  return _convolve(images, kernel)


def _forward(images, kernel):
  return _convolve(images, kernel), (images, kernel)


def _backward(residuals, cotangent):
  images, kernel = residuals
  _, to_images = jax.vjp(functools.partial(_convolve, kernel=kernel), images)
  to_kernel = _kernel_gradient(images, cotangent).astype(kernel.dtype)
  return *to_images(cotangent), to_kernel


_convolve3x3.defvjp(_forward, _backward)


def _kernel_gradient(images, cotangent):
  count, inputs, outputs = len(images), images.shape[-1], cotangent.shape[-1]
  group = math.gcd(count, GROUP)
  grouped = [x.reshape(-1, group, *x.shape[1:]) for x in (images, cotangent)]

  def add(total, arrays):
    columns = _shifts(arrays[0], axis=2)
    rows = _shifts(arrays[1], axis=1)[..., ::-1, :]  # y + i here is y - i there
    left = columns.reshape(-1, 3 * inputs)
    right = rows.reshape(-1, 3 * outputs)
    product = jnp.matmul(left.T, right, preferred_element_type=total.dtype)
    return total + product, None

  dtype = jnp.promote_types(images.dtype, jnp.float32)
  zero = jnp.zeros((3 * inputs, 3 * outputs), dtype)
  total, _ = lax.scan(add, zero, tuple(grouped))
  return total.reshape(3, inputs, 3, outputs).transpose(2, 0, 1, 3)


def _shifts(x, axis):
  """[..., c] to [..., 3, c]: the pixel before, the pixel itself and the one after."""
  sides = [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)]
  padded, length = jnp.pad(x, sides), x.shape[axis]
  shifted = [lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(3)]
  return jnp.concatenate(shifted, -1).reshape(*x.shape[:-1], 3, x.shape[-1])
