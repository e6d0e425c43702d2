"""The networks have the published sizes and compute what they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.paper import models
from examples.paper.models import convolution

# Parameters with 10 classes (1000 for ImageNet's), as published: ResNets, ResNeXt,
# WRN-28-10 and ResNet-50 in the tables of pytorchcv and torchvision, WRN-28-2 in
# FixMatch's code; the others by hand from the paper's table.
PARAMETERS = {
    "resnet20": 272_474,
    "resnet56": 855_770,
    "resnext29_32x4d": 4_775_754,
    "wrn28_2": 1_467_610,
    "wrn28_10": 36_479_194,
    "resnet50": 25_557_032,
}


def _image_shape(name):
  return (1, 224, 224, 3) if name == "resnet50" else (1, 32, 32, 3)


def _variables(model, shape):
  def init(key):
    return model.init(key, jnp.zeros(shape), False)

  return jax.eval_shape(init, jax.random.key(0))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name):
  classes = 1000 if name == "resnet50" else 10
  variables = _variables(models.build(name, classes), _image_shape(name))
  count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
  assert count == PARAMETERS[name]


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_and_variables_are_float32(name, dtype):
  model = models.build(name, 7, dtype=dtype)
  shape = _image_shape(name)
  variables = _variables(model, shape)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  logits, updates = jax.eval_shape(
      lambda variables: model.apply(
          variables,
          jnp.zeros((2, *shape[1:])),
          True,
          mutable=["batch_stats"],
          rngs={"dropout": jax.random.key(0)},
      ),
      variables,
  )
  assert logits.shape == (2, 7)
  assert logits.dtype == jnp.float32
  if "batch_stats" in variables:
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype),
            updates["batch_stats"],
            variables["batch_stats"],
        )
    )


def test_an_unknown_name_or_option_is_an_error():
  with pytest.raises(ValueError, match=r"name='resnet21'.*resnet20, resnet32"):
    models.build("resnet21", 10)
  with pytest.raises(ValueError, match=r"options \{'dropout': 0.1\} of resnet20"):
    models.build("resnet20", 10, dropout=0.1)
  with pytest.raises(ValueError, match="classes=1"):
    models.build("resnet20", 1)
  with pytest.raises(ValueError, match="conv='patches': must be one of lax, shifts"):
    models.build("resnet20", 10, conv="patches")


@pytest.fixture(scope="module")
def resnet8():
  model = models.build("resnet8", 10)
  variables = jax.jit(lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), False))(
      jax.random.key(0)
  )
  return model, variables


def test_convolutions_start_by_he_and_batch_norm_at_the_identity(resnet8):
  _, variables = resnet8
  kernels = [
      (path, leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
      if leaf.ndim == 4 and leaf.size > 2000
  ]
  assert kernels
  for path, kernel in kernels:
    fan_out = kernel.shape[0] * kernel.shape[1] * kernel.shape[3]
    error = 5 / np.sqrt(2 * kernel.size)  # of an estimated standard deviation
    np.testing.assert_allclose(
        np.std(kernel), np.sqrt(2 / fan_out), rtol=error, err_msg=str(path)
    )
  norm = variables["params"]["BatchNorm_0"]
  np.testing.assert_array_equal(norm["scale"], 1)
  np.testing.assert_array_equal(norm["bias"], 0)
  dense = variables["params"]["Dense_0"]
  for leaf in dense.values():
    assert 0.9 / 8 < np.abs(leaf).max() <= 1 / 8 or leaf.size < 20  # fan-in 64
    assert np.abs(leaf).max() <= 1 / 8


def test_running_means_keep_nine_tenths(resnet8):
  model, variables = resnet8
  images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3)) + 1
  _, updates = model.apply(variables, images, True, mutable=["batch_stats"])
  first = variables["params"]["Conv_0"]["kernel"]
  convolved = jax.lax.conv_general_dilated(
      images, first, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  stats = updates["batch_stats"]["BatchNorm_0"]
  np.testing.assert_allclose(
      stats["mean"], 0.1 * convolved.mean((0, 1, 2)), atol=1e-5
  )
  np.testing.assert_allclose(
      stats["var"], 0.9 + 0.1 * convolved.var((0, 1, 2)), rtol=1e-4
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize(
    ("size", "stride", "groups"), [(3, 1, 1), (3, 2, 1), (1, 2, 1), (3, 1, 2)]
)
def test_convolutions_by_shifts_are_xlas(size, stride, groups, count, dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  images = jax.random.normal(keys[0], (count, 6, 8, 4), dtype)
  kernel = jax.random.normal(keys[1], (size, size, 4 // groups, 6), dtype)
  strides, padding = (stride, stride), [(size // 2, size // 2)] * 2
  options = {
      "feature_group_count": groups,
      "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
  }

  def value_and_pullback(convolve):
    out, pullback = jax.vjp(
        lambda *arrays: convolve(*arrays, strides, padding, **options), images, kernel
    )
    return out, pullback(jax.random.normal(keys[2], out.shape, dtype))

  expected = value_and_pullback(jax.lax.conv_general_dilated)
  results = value_and_pullback(convolution.convolve)
  tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
  for result, reference in zip(
      jax.tree.leaves(results), jax.tree.leaves(expected), strict=True
  ):
    assert result.dtype == reference.dtype
    scale = float(jnp.max(jnp.abs(reference)))
    np.testing.assert_allclose(
        np.float32(result), np.float32(reference), atol=tolerance * scale
    )
