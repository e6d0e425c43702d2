"""Augmentation against Pillow and NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from PIL import ImageEnhance
from PIL import ImageOps
import pytest

from examples.paper import augment
from examples.paper import auto_augment

MEAN = (0.4, 0.5, 0.6)
STD = (0.2, 0.25, 0.3)
FILL = (102, 128, 153)


@pytest.fixture(scope="module")
def images():
  """Smooth pictures and noise; one of few values and one of a single one."""
  rng = np.random.default_rng(0)
  waves = np.sin(np.linspace(0, 3, 32))[:, None, None] * np.arange(1, 33)[:, None]
  smooth = 90 + 2 * waves + rng.normal(0, 9, (32, 32, 3))
  noise = rng.integers(0, 256, (32, 32, 3))
  few = rng.integers(0, 2, (32, 32, 3)) * 60 + 40
  return np.stack([smooth, noise, few, np.full_like(few, 70)]).astype(np.uint8)


def test_normalize(images):
  expected = (images.astype(np.float64) / 255 - MEAN) / STD
  result = augment.normalize(images, MEAN, STD)
  assert result.dtype == jnp.float32
  np.testing.assert_allclose(result, expected, atol=1e-5)


def test_every_crop_is_a_window_of_the_padded_image_and_all_occur(images):
  image = images[1]
  batch = np.stack([image] * 200)
  crops = np.asarray(augment.random_crop(jax.random.key(0), batch, 1))
  padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
  windows = {
      padded[i : i + 32, j : j + 32].tobytes() for i in range(3) for j in range(3)
  }
  assert {crop.tobytes() for crop in crops} == windows


def test_half_of_the_images_are_mirrored(images):
  batch = np.stack([images[1]] * 400)
  result = np.asarray(augment.random_flip(jax.random.key(1), batch))
  mirrored = [np.array_equal(image, images[1][:, ::-1]) for image in result]
  kept = [np.array_equal(image, images[1]) for image in result]
  assert sum(mirrored) + sum(kept) == 400
  assert 160 < sum(mirrored) < 240


@pytest.mark.parametrize("size", [1, 8, 16])
def test_cutout_is_a_square_around_any_pixel(size):
  batch = jnp.ones((1000, 32, 32, 1))
  result = np.asarray(augment.random_cutout(jax.random.key(2), batch, size))
  holes = result[..., 0] == 0
  np.testing.assert_array_equal(result, ~holes[..., None])
  rows, columns = holes.any(2), holes.any(1)
  np.testing.assert_array_equal(holes, rows[:, :, None] & columns[:, None, :])
  for lines in (rows, columns):
    lengths = lines.sum(1)
    assert lengths.max() == size
    assert lengths.min() == max(1, size // 2)  # cut off by the border
    assert np.all(lines.any(0))  # each line is hit
    changes = np.abs(np.diff(lines.astype(int), axis=1)).sum(1)
    assert changes.max() <= 2  # connected


def test_augment_under_jit_is_a_function_of_the_key(images):
  options = {"cutout": 8, "auto_augment": True}
  call = jax.jit(functools.partial(augment.augment, mean=MEAN, std=STD, **options))
  first = call(jax.random.key(0), images)
  assert first.shape == images.shape
  assert first.dtype == jnp.float32
  np.testing.assert_array_equal(first, call(jax.random.key(0), images))
  assert np.any(first != call(jax.random.key(1), images))


def test_without_options_augment_normalizes(images):
  plain = augment.augment(jax.random.key(0), images, MEAN, STD, crop=0, flip=False)
  np.testing.assert_array_equal(plain, augment.normalize(images, MEAN, STD))


def test_bad_images_and_options_are_errors(images):
  key = jax.random.key(0)
  with pytest.raises(ValueError, match=r"images of float32.*must be uint8"):
    augment.augment(key, np.float32(images), MEAN, STD)
  with pytest.raises(ValueError, match=r"uint8\[32, 32, 3\]"):
    augment.augment(key, images[0], MEAN, STD)
  with pytest.raises(ValueError, match="crop=-1"):
    augment.augment(key, images, MEAN, STD, crop=-1)


def _pillow(name, image, value):
  """The operation in Pillow; value carries its sign."""
  picture = Image.fromarray(image)

  def move(*coefficients):
    size, method = picture.size, Image.Transform.AFFINE
    return picture.transform(size, method, coefficients, fillcolor=FILL)

  pixels = int(value * 32)
  enhancers = {
      "contrast": ImageEnhance.Contrast,
      "color": ImageEnhance.Color,
      "brightness": ImageEnhance.Brightness,
      "sharpness": ImageEnhance.Sharpness,
  }
  if name in enhancers:
    return enhancers[name](picture).enhance(1 + value)
  return {
      "shear_x": lambda: move(1, value, 0, 0, 1, 0),
      "shear_y": lambda: move(1, 0, 0, value, 1, 0),
      "translate_x": lambda: move(1, 0, pixels, 0, 1, 0),
      "translate_y": lambda: move(1, 0, 0, 0, 1, pixels),
      "rotate": lambda: picture.rotate(value, fillcolor=FILL),
      "auto_contrast": lambda: ImageOps.autocontrast(picture),
      "invert": lambda: ImageOps.invert(picture),
      "equalize": lambda: ImageOps.equalize(picture),
      "solarize": lambda: ImageOps.solarize(picture, abs(value)),
      "posterize": lambda: ImageOps.posterize(picture, int(abs(value))),
  }[name]()


@pytest.fixture(scope="module")
def apply():
  batched = jax.vmap(auto_augment.apply, in_axes=(None, 0, None, None, None))
  return jax.jit(batched)


@pytest.mark.parametrize("name", auto_augment.NAMES)
@pytest.mark.parametrize("sign", [1, -1])
def test_operations_are_pillows(name, sign, images, apply):
  for level in (0, 3, 5, 7, 9):  # at others, pixels lie on boundaries
    magnitude = auto_augment.magnitude_of(name, level)
    index = auto_augment.NAMES.index(name)
    result = apply(index, images, np.float32(magnitude), sign, np.uint8(FILL))
    expected = np.stack([
        np.asarray(_pillow(name, image, sign * magnitude)) for image in images
    ])
    difference = np.abs(np.asarray(result, int) - expected)
    if name in ("shear_x", "shear_y", "rotate"):
      # Pillow counts in 16 binary digits: a pixel on a boundary may be another.
      assert np.mean(difference > 0) < 0.01
    else:
      # It rounds towards zero what floating point may leave just below an integer.
      assert difference.max() <= 1
      assert np.mean(difference > 0) < 0.01


def test_the_index_after_the_last_operation_does_nothing(images, apply):
  index = len(auto_augment.NAMES)
  result = apply(index, images, np.float32(5), 1, np.uint8(FILL))
  np.testing.assert_array_equal(result, images)


def test_operations_are_applied_as_often_as_the_policy_says(images):
  """The share of untouched images is that of the policy's probabilities."""
  batch = np.stack([images[1, :8, :8]] * 1000)
  batch[:, 0, :2] = [[0, 0, 0], [255, 255, 255]]  # no contrast to stretch
  policy = jax.jit(auto_augment.cifar10_policy)
  result = policy(jax.random.key(0), batch, np.uint8(FILL))
  untouched = np.mean([np.array_equal(a, batch[0]) for a in np.asarray(result)])
  neutral = {"auto_contrast", "equalize"}  # equalize needs more than 255 pixels
  chances = [
      np.prod([1.0 if name in neutral else 1 - p for name, p, _ in pair])
      for pair in auto_augment.POLICY
  ]
  chances[19] = 0.9  # its second operation has magnitude 0
  assert abs(untouched - np.mean(chances)) < 0.05
