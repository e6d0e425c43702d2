"""The networks have the published sizes and compute what they should."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.paper import models
from examples.paper.models import convolution
from examples.paper.models import costs
from examples.paper.models import densenet
from examples.paper.models import layers
from examples.paper.models import pyramid
from examples.paper.models import transformer

# Published with 10 classes (1000 for ImageNet's), and multiply-adds in millions.
# pytorchcv's tables, which count norms and activations as well, up to 3 % of the whole;
# resnet32: pytorch-cifar-models', 0.47 million parameters, convolutions and products
# alone; the last two: torchvision's metadata, to the million.
PUBLISHED = {
    "resnet20": (272_474, 41.29, 0.03),
    "resnet32": (466_906, 69.12, 0.0002),
    "resnet56": (855_770, 127.06, 0.03),
    "resnext29_32x4d": (4_775_754, 780.55, 0.03),
    "wrn28_10": (36_479_194, 5246.98, 0.03),
    "pyramidnet272": (26_210_842, 4541.36, 0.03),
    "resnet50": (25_557_032, 4089, 0.0002),
    "densenet121": (7_978_856, 2834, 0.0002),
}
OTHERS = sorted(set(models.NAMES) - {"pyramidnet272", "densenet121"})


def _inputs(name, count=1):
  if name.startswith("transformer"):
    return (jax.ShapeDtypeStruct((count, 7), jnp.int32),) * 2
  size = 224 if name in ("resnet50", "densenet121") else 32
  return (jax.ShapeDtypeStruct((count, size, size, 3), jnp.float32),)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_multiply_adds_are_as_published(name):
  classes = 1000 if name in ("resnet50", "densenet121") else 10
  options = {"stem": "imagenet"} if name == "densenet121" else {}
  model = models.build(name, classes, **options)
  parameters, millions, tolerance = PUBLISHED[name]
  assert costs.parameters(model, *_inputs(name)) == parameters
  counted = costs.multiply_adds(model, *_inputs(name)) / 1e6
  assert (1 - tolerance) * millions <= counted <= 1.0002 * millions


# The millions of parameters are those of the table of their paper.
@pytest.mark.parametrize(
    ("name", "blocks", "widen", "millions"),
    [("wrn28_2", 4, 2, 1.5), ("wrn16_8", 2, 8, 11.0)],
)
def test_wide_resnets_by_hand(name, blocks, widen, millions):
  """Three stages; two norms and convolutions a block, a shortcut in a stage's first."""
  weights, products, before = 9 * 3 * 16, 1024 * 9 * 3 * 16, 16
  for width, side in ((16 * widen, 32), (32 * widen, 16), (64 * widen, 8)):
    convolutions = 10 * before * width + 9 * width**2
    convolutions += (blocks - 1) * 18 * width**2
    weights += convolutions + 2 * before + 2 * width + (blocks - 1) * 4 * width
    products += side**2 * convolutions
    before = width
  last = before * 10
  model = models.build(name, 10)
  parameters = weights + 2 * before + last + 10
  assert costs.parameters(model, *_inputs(name)) == parameters
  assert round(parameters / 1e6, 1) == millions
  assert costs.multiply_adds(model, *_inputs(name)) == products + last


def test_vgg19_by_hand():
  widths = [3, 64, 64, 128, 128, *[256] * 4, *[512] * 8]
  sides = [32, 32, 16, 16, *[8] * 4, *[4] * 4, *[2] * 4]
  pairs = list(itertools.pairwise(widths))
  parameters = sum(9 * i * o + 3 * o for i, o in pairs) + 512 * 10 + 10
  products = sum(
      side**2 * 9 * i * o for side, (i, o) in zip(sides, pairs, strict=True)
  )
  model = models.build("vgg19_bn", 10)
  assert costs.parameters(model, *_inputs("vgg19_bn")) == parameters
  assert round(parameters / 1e6, 2) == 20.04  # as bearpaw/pytorch-classification's
  assert costs.multiply_adds(model, *_inputs("vgg19_bn")) == products + 512 * 10


def test_parameters_of_the_transformer_by_hand():
  vocabulary, width, hidden = 10_152, 512, 1024
  attention = 4 * (width**2 + width)
  feedforward = 2 * width * hidden + hidden + width
  encoder = attention + feedforward + 2 * 2 * width
  decoder = 2 * attention + feedforward + 3 * 2 * width
  model = models.build("transformer", vocabulary)
  counted = costs.parameters(model, *_inputs("transformer"))
  assert counted == vocabulary * width + 6 * (encoder + decoder)


@pytest.mark.parametrize(
    ("name", "width", "side"), [("resnet8", 16, 32), ("resnet8_wide", 32, 16)]
)
def test_eight_layers_by_hand(name, width, side):
  c, s = width, side
  convolutions = [
      (s, 3, c, 9), (s, c, c, 9), (s, c, c, 9),
      (s / 2, c, 2 * c, 9), (s / 2, 2 * c, 2 * c, 9), (s / 2, c, 2 * c, 1),
      (s / 4, 2 * c, 4 * c, 9), (s / 4, 4 * c, 4 * c, 9), (s / 4, 2 * c, 4 * c, 1),
  ]  # fmt: skip
  last = 4 * c * 10
  products = sum(side**2 * i * o * k for side, i, o, k in convolutions) + last
  weights = sum(i * o * k + 2 * o for _, i, o, k in convolutions) + last + 10
  for conv in ("lax", "shifts"):
    model = models.build(name, 10, conv=conv)
    assert costs.multiply_adds(model, *_inputs(name)) == products
    assert costs.parameters(model, *_inputs(name)) == weights


@pytest.mark.parametrize(
    ("name", "depth", "patch"), [("vit_small", 6, 4), ("vit_tiny", 4, 8)]
)
def test_vision_transformers_by_hand(name, depth, patch):
  width, tokens, entries = 96, (32 // patch) ** 2, 3 * patch**2
  products = tokens * entries * width + 10 * width + depth * (
      12 * tokens * width**2 + 2 * tokens**2 * width
  )
  block = 12 * width**2 + (4 + 5 + 4) * width  # products, their biases, two norms
  weights = (entries + 1 + tokens + 2) * width + depth * block + 10 * (width + 1)
  model = models.build(name, 10)
  assert costs.multiply_adds(model, *_inputs(name)) == products
  assert costs.parameters(model, *_inputs(name)) == weights


# Tracing the two deepest networks takes as long as all others.
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_and_variables_are_float32(name, dtype):
  model, inputs = models.build(name, 7, dtype=dtype), _inputs(name, 2)
  variables = costs.variables_of(model, *inputs)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

  def forward(variables, *inputs):
    rngs = {"dropout": jax.random.key(0)}
    return model.apply(variables, *inputs, True, mutable=["batch_stats"], rngs=rngs)

  logits, updates = jax.eval_shape(forward, variables, *inputs)
  shape = inputs[-1].shape if name.startswith("transformer") else (2,)
  assert logits.shape == (*shape, 7)
  assert logits.dtype == jnp.float32
  if "batch_stats" in variables:
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(
        jnp.shape, {"batch_stats": variables["batch_stats"]}
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


def _initial(model, *inputs):
  return jax.jit(lambda key: model.init(key, *inputs, False))(jax.random.key(0))


@pytest.fixture(scope="module")
def resnet8():
  model = models.build("resnet8", 10)
  return model, _initial(model, jnp.zeros((1, 32, 32, 3)))


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


def test_shake_drop_scales_values_and_gradients_apart():
  branch = jax.random.normal(jax.random.key(0), (4000, 1, 1, 1))
  key = jax.random.key(1)
  out, pullback = jax.vjp(lambda x: pyramid.shake_drop(key, x, 0.75), branch)
  (gradient,) = pullback(jnp.ones_like(out))
  forward, backward = (out / branch).reshape(-1), gradient.reshape(-1)
  kept = np.abs(backward - 1) < 1e-6
  np.testing.assert_allclose(forward[kept], 1, atol=1e-5)
  assert 0.72 < kept.mean() < 0.78
  shaken = np.asarray(forward)[~kept]
  assert shaken.min() < -0.95
  assert shaken.max() > 0.95
  assert abs(shaken.mean()) < 0.06
  assert backward.min() >= 0
  assert abs(backward[~kept].mean() - 0.5) < 0.03
  assert abs(np.corrcoef(shaken, backward[~kept])[0, 1]) < 0.1


def test_pyramidnet_shakes_in_training_only():
  model = pyramid.PyramidNet(3, 11, 12, 0.5, layers.Layers())
  images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  variables = _initial(model, images)

  @functools.partial(jax.jit, static_argnums=1)
  def logits(seed, train):
    rngs = {"shakedrop": jax.random.key(seed)}
    out, _ = model.apply(variables, images, train, mutable=["batch_stats"], rngs=rngs)
    return out

  assert np.any(logits(0, True) != logits(1, True))
  np.testing.assert_array_equal(logits(0, False), logits(1, False))


def test_dropout_acts_in_training_only():
  model = models.build("vit_small", 3, depth=1, width=12, dropout=0.5)
  images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
  variables = _initial(model, images)

  @functools.partial(jax.jit, static_argnums=1)
  def logits(seed, train):
    rngs = {"dropout": jax.random.key(seed)}
    return model.apply(variables, images, train, rngs=rngs)

  assert np.any(logits(0, True) != logits(1, True))
  np.testing.assert_array_equal(logits(0, False), logits(1, False))


def test_an_unknown_stem_is_an_error():
  with pytest.raises(ValueError, match="stem='big': must be one of cifar, imagenet"):
    models.build("densenet121", 10, stem="big")
  assert densenet.STEMS == ("cifar", "imagenet")


@pytest.fixture(scope="module")
def translator():
  model = models.build(
      "transformer", 11, depth=2, width=16, hidden=32, heads=2, dropout=0.1
  )
  source = jnp.array([[3, 4, 5, 2, 0, 0], [6, 7, 8, 9, 10, 2]])
  target = jnp.array([[1, 3, 4, 0, 0], [1, 5, 6, 7, 8]])
  variables = _initial(model, source, target)


  @jax.jit
  def logits(source, target):
    return model.apply(variables, source, target, False)

  return logits, source, target


def test_a_translator_sees_no_later_subword(translator):
  logits, source, target = translator
  whole = logits(source, target)
  later = logits(source, target.at[1, 3].set(9))
  np.testing.assert_allclose(whole[1, :3], later[1, :3], atol=1e-6)
  assert np.all(np.abs(whole[1, 3:] - later[1, 3:]).max(-1) > 1e-4)


def test_a_translator_does_not_see_padding(translator):
  logits, source, target = translator
  whole = logits(source, target)
  short = logits(source[:1, :4], target[:1, :3])
  np.testing.assert_allclose(whole[0, :3], short[0], atol=1e-5)


def test_a_translator_sees_the_source_and_its_order(translator):
  logits, source, target = translator
  whole = logits(source, target)
  swapped = logits(source[:, jnp.array([1, 0, 2, 3, 4, 5])], target)
  assert np.all(np.abs(whole - swapped).max(-1) > 1e-4)


def test_positions_are_those_of_the_paper():
  table = transformer.positions(jnp.arange(5), 8)
  np.testing.assert_allclose(table[:, 0], np.sin(np.arange(5)), rtol=1e-6)
  np.testing.assert_allclose(table[:, 4], np.cos(np.arange(5)), rtol=1e-6)
  np.testing.assert_allclose(table[3, 3], np.sin(3 / 10_000), rtol=1e-6)
