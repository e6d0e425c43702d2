"""AutoAugment's policy for CIFAR-10 (Cubuk et al., CVPR 2019, arXiv 1805.09501).

The operations are Pillow's, on uint8 images [height, width, 3], written such that they
run inside ``jit``; the tests compare each with Pillow.
"""

import math

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

# A sub-policy is two operations: name, probability, magnitude 0 to 9.
POLICY = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("auto_contrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("auto_contrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("auto_contrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("auto_contrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("auto_contrast", 0.9, 0)),
)


def cifar10_policy(key: jax.Array, images: jax.Array, fill: jax.Array) -> jax.Array:
  """Applies a random sub-policy to each image.

  Args:
    key: a random key.
    images: uint8 [n, height, width, 3].
    fill: uint8 [3], the colour of pixels that come from outside an image.

  Returns:
    uint8, of the same shape.
  """
  keys = jax.random.split(key, len(images))
  return jax.vmap(_random_subpolicy, in_axes=(0, 0, None))(keys, images, fill)


def _random_subpolicy(key, image, fill):
  choice_key, apply_key, sign_key = jax.random.split(key, 3)
  choice = jax.random.randint(choice_key, (), 0, len(POLICY))
  chances = jax.random.uniform(apply_key, (2,))
  signs = jnp.where(jax.random.bernoulli(sign_key, shape=(2,)), 1.0, -1.0)
  applied = chances < jnp.asarray(_PROBABILITIES)[choice]
  operations = jnp.where(applied, jnp.asarray(_OPERATIONS)[choice], len(NAMES))
  magnitudes = jnp.asarray(_MAGNITUDES)[choice]
  for step in range(2):
    image = apply(operations[step], image, magnitudes[step], signs[step], fill)
  return image


def apply(
    operation: jax.Array,
    image: jax.Array,
    magnitude: jax.Array,
    sign: jax.Array,
    fill: jax.Array,
) -> jax.Array:
  """The operation of this index in ``NAMES``; the one after them does nothing.

  Args:
    operation: int32 [].
    image: uint8 [height, width, 3].
    magnitude: what ``magnitude_of`` gives, float32 [].
    sign: 1 or -1, used where the operation has a direction.
    fill: uint8 [3].
  """
  signed = sign * magnitude

  def moved(matrix):
    return lambda: affine(image, matrix, fill)

  branches = {
      "shear_x": moved([[1, signed, 0], [0, 1, 0]]),
      "shear_y": moved([[1, 0, 0], [signed, 1, 0]]),
      "translate_x": moved([[1, 0, jnp.trunc(signed * image.shape[1])], [0, 1, 0]]),
      "translate_y": moved([[1, 0, 0], [0, 1, jnp.trunc(signed * image.shape[0])]]),
      "rotate": moved(_rotation(signed, image.shape)),
      "auto_contrast": lambda: auto_contrast(image),
      "invert": lambda: 255 - image,
      "equalize": lambda: equalize(image),
      "solarize": lambda: jnp.where(image < magnitude, image, 255 - image),
      "posterize": lambda: posterize(image, magnitude.astype(jnp.uint8)),
      "contrast": lambda: blend(_mean_gray(image), image, 1 + signed),
      "color": lambda: blend(_gray(image)[..., None], image, 1 + signed),
      "brightness": lambda: blend(jnp.zeros_like(image), image, 1 + signed),
      "sharpness": lambda: blend(_smooth(image), image, 1 + signed),
  }
  assert tuple(branches) == NAMES
  return lax.switch(operation, [*branches.values(), lambda: image])


NAMES = (
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "auto_contrast",
    "invert",
    "equalize",
    "solarize",
    "posterize",
    "contrast",
    "color",
    "brightness",
    "sharpness",
)


def magnitude_of(name: str, level: int) -> float:
  """What a magnitude of 0 to 9 means to an operation."""
  part = level / 9
  match name:
    case "shear_x" | "shear_y":
      return 0.3 * part  # pixels to the side by pixel
    case "translate_x" | "translate_y":
      return 150 / 331 * part  # of the image's side
    case "rotate":
      return 30 * part  # degrees
    case "solarize":
      return 256 * (1 - part)  # pixels from here on are inverted
    case "posterize":
      return 8 - round(4 * part)  # bits that stay
    case "contrast" | "color" | "brightness" | "sharpness":
      return 0.9 * part  # away from the image, or as far beyond it
  return 0.0


_OPERATIONS = np.array([[NAMES.index(name) for name, _, _ in pair] for pair in POLICY])
_PROBABILITIES = np.array(
    [[chance for _, chance, _ in pair] for pair in POLICY], np.float32
)
_MAGNITUDES = np.array(
    [[magnitude_of(name, level) for name, _, level in pair] for pair in POLICY],
    np.float32,
)


def affine(image: jax.Array, matrix, fill: jax.Array) -> jax.Array:
  """The nearest pixel at ``matrix @ (x, y, 1)`` for each pixel's center (x, y)."""
  height, width, _ = image.shape
  y, x = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
  (a, b, c), (d, e, f) = matrix
  column = jnp.floor(a * x + b * y + c).astype(jnp.int32)
  row = jnp.floor(d * x + e * y + f).astype(jnp.int32)
  inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
  moved = image[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
  return jnp.where(inside[..., None], moved, fill)


def _rotation(degrees, shape):
  """Counterclockwise on the screen, about the image's center."""
  angle = -degrees * (math.pi / 180)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  x, y = shape[1] / 2, shape[0] / 2
  return [
      [cos, sin, x - cos * x - sin * y],
      [-sin, cos, y + sin * x - cos * y],
  ]


def blend(degenerate: jax.Array, image: jax.Array, factor) -> jax.Array:
  """``degenerate`` at 0, the image at 1, and as far beyond it at 2."""
  start, end = degenerate.astype(jnp.float32), image.astype(jnp.float32)
  return jnp.clip(jnp.floor(start + factor * (end - start)), 0, 255).astype(jnp.uint8)


def _gray(image):
  weights = jnp.array([19595, 38470, 7471], jnp.int32)  # of 65536
  weighted = jnp.sum(image.astype(jnp.int32) * weights, -1)
  return ((weighted + 0x8000) >> 16).astype(jnp.uint8)


def _mean_gray(image):
  gray = _gray(image).astype(jnp.int32)
  mean = (2 * jnp.sum(gray) + gray.size) // (2 * gray.size)  # rounded
  return jnp.full_like(image, mean.astype(jnp.uint8))


def _smooth(image):
  """Each pixel averaged with its neighbours, 5 : 1; the border stays."""
  height, width, _ = image.shape
  wide = image.astype(jnp.int32)
  total = 4 * wide[1:-1, 1:-1]
  for i in range(3):
    for j in range(3):
      total += wide[i : height - 2 + i, j : width - 2 + j]
  mean = (2 * total + 13) // 26  # of weights that sum to 13, rounded
  return image.at[1:-1, 1:-1].set(mean.astype(jnp.uint8))


def auto_contrast(image: jax.Array) -> jax.Array:
  """Stretches each channel to the range from 0 to 255."""
  wide = image.astype(jnp.int32)
  low, high = jnp.min(wide, (0, 1)), jnp.max(wide, (0, 1))
  stretched = 255 * (wide - low) // jnp.maximum(high - low, 1)
  return jnp.where(high > low, stretched, wide).astype(jnp.uint8)


def equalize(image: jax.Array) -> jax.Array:
  """Makes each channel's histogram as flat as a map of values can."""
  return jax.vmap(_equalize_channel, in_axes=-1, out_axes=-1)(image)


def _equalize_channel(channel):
  counts = jnp.zeros(256, jnp.int32).at[channel.reshape(-1)].add(1)
  step = (channel.size - counts[jnp.max(channel)]) // 255
  before = jnp.cumsum(counts) - counts
  table = jnp.clip((before + step // 2) // jnp.maximum(step, 1), 0, 255)
  table = jnp.where(step > 0, table, jnp.arange(256))
  return table.astype(jnp.uint8)[channel]


def posterize(image: jax.Array, bits: jax.Array) -> jax.Array:
  """Keeps so many of each pixel's 8 bits."""
  dropped = jnp.uint8(8) - bits
  return (image >> dropped) << dropped
