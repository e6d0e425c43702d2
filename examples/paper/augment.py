"""Augmentation of image batches on the device, inside ``jit``."""

from collections.abc import Sequence

import jax
from jax import lax
import jax.numpy as jnp

from examples.paper import auto_augment as policies


def normalize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  """uint8 images as float32 ``(x / 255 - mean) / std``, by channel.

  Args:
    images: uint8 [n, height, width, channels].
    mean: of each channel, of pixels in [0, 1].
    std: likewise.

  Returns:
    float32, of the same shape.
  """
  center, scale = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
  return (images.astype(jnp.float32) / 255 - center) / scale


def augment(
    key: jax.Array,
    images: jax.Array,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    crop: int = 4,
    flip: bool = True,
    cutout: int = 0,
    auto_augment: bool = False,
) -> jax.Array:
  """A random variant of each image, normalized.

  In this order: crop, flip, AutoAugment, normalization, cutout.

  Args:
    key: a random key; each image of the batch gets its own numbers from it.
    images: uint8 [n, height, width, 3].
    mean: of each channel, of pixels in [0, 1].
    std: likewise.
    crop: black pixels that are put on each side; a part of the old size is then cut
      out anywhere. 0: none.
    flip: whether half of the images are mirrored, left to right.
    cutout: the side of a square around a pixel drawn from the image; what of it is
      inside becomes 0, the mean colour (DeVries and Taylor 2017). 0: none.
    auto_augment: whether to apply the CIFAR-10 policy of AutoAugment (Cubuk et al.
      2019); uncovered pixels get the mean colour.

  Returns:
    float32, of the same shape.

  Raises:
    ValueError: for images of another dtype or rank, or a negative crop or cutout.
  """
  if images.dtype != jnp.uint8 or images.ndim != 4:
    raise ValueError(
        f"images of {images.dtype}{list(images.shape)}: must be uint8 [n, height,"
        " width, channels], pixels from 0 to 255."
    )
  if crop < 0 or cutout < 0:
    raise ValueError(f"crop={crop}, cutout={cutout}: must not be negative.")
  crop_key, flip_key, policy_key, cutout_key = jax.random.split(key, 4)
  if crop:
    images = random_crop(crop_key, images, crop)
  if flip:
    images = random_flip(flip_key, images)
  if auto_augment:
    fill = jnp.round(255 * jnp.asarray(mean)).astype(jnp.uint8)
    images = policies.cifar10_policy(policy_key, images, fill)
  normalized = normalize(images, mean, std)
  return random_cutout(cutout_key, normalized, cutout) if cutout else normalized


def random_crop(key: jax.Array, images: jax.Array, margin: int) -> jax.Array:
  """Each image shifted by up to ``margin`` pixels each way; 0 where it was not."""
  sides = (margin, margin)
  padded = jnp.pad(images, ((0, 0), sides, sides, (0, 0)))
  corners = jax.random.randint(key, (len(images), 2), 0, 2 * margin + 1)

  def crop(image, corner):
    return lax.dynamic_slice(image, (*corner, 0), images.shape[1:])

  return jax.vmap(crop)(padded, corners)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
  """Each image mirrored, left to right, or not."""
  mirrored = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
  return jnp.where(mirrored, images[:, :, ::-1], images)


def random_cutout(key: jax.Array, images: jax.Array, size: int) -> jax.Array:
  """Zeros in a square of side ``size`` around a random pixel of each image."""
  count, height, width, _ = images.shape
  row_key, column_key = jax.random.split(key)
  inside = _near(row_key, count, height, size)[:, :, None]
  inside &= _near(column_key, count, width, size)[:, None, :]
  return jnp.where(inside[..., None], 0, images)


def _near(key: jax.Array, count: int, length: int, size: int) -> jax.Array:
  """[count, length]: which places are in an interval around a random one."""
  center = jax.random.randint(key, (count, 1), 0, length)
  start = center - size // 2
  places = jnp.arange(length)
  return (places >= start) & (places < start + size)
