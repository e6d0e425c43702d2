"""Every row of every table is a configuration that takes a step."""

import dataclasses
import functools
import json
import math
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.paper import cli
from examples.paper import configs
from examples.paper import image_task
from examples.paper import loop
from examples.paper import methods
from examples.paper import optimizers
from examples.paper import small
from examples.paper import text_task
from examples.paper.config import as_json
from examples.paper.config import Config
from examples.paper.config import ConfigError
from examples.paper.config import from_json
from examples.paper.config import key_of
from examples.paper.config import Options

replace = dataclasses.replace
SMALL = [entry.config for entry in small.PLAN]
ROWS = [*configs.NAMED.values(), *SMALL]
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}


class ImageShapes(image_task.ImageTask):
  """The task of a configuration as far as shapes go; nothing is loaded."""

  def __init__(self, config):
    self.config, self.steps = config, 100
    self.network = image_task.build(config, CLASSES[config.dataset])
    # Both passes share one trace: the deep networks take long to trace.
    self._forward = jax.jit(super().forward)
    side = 224 if config.dataset == "imagenet" else 32
    self.batch = (
        jax.ShapeDtypeStruct((config.batch_size, side, side, 3), jnp.float32),
        jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    )

  def init(self, key):
    image = jnp.zeros((1, *self.batch[0].shape[1:]))
    variables = self.network.init(key, image, train=False)
    return variables.pop("params"), variables

  def forward(self, params, variables, inputs, key):
    return self._forward(params, variables, inputs, key)

  def prepare(self, data, batch, key):
    del data, key
    return batch


class TextShapes(text_task.TextTask):
  """Likewise; sentences of 32 pieces."""

  def __init__(self, config):
    self.config, self.steps, self.lengths = config, 10_000, [32]
    self.network = image_task.build(config, config.vocabulary)
    rows = (config.subwords // 32,)
    words = jax.ShapeDtypeStruct((*rows, 32), jnp.int32)
    self.batch = (words, words, words, jax.ShapeDtypeStruct(rows, jnp.float32))


def step_of(config):
  """(batch -> (state before, state after), the batch's shapes)."""
  task = (TextShapes if config.dataset == "parallel" else ImageShapes)(config)
  recipe = optimizers.make(config, config.epochs * task.steps)

  def step(batch):
    state = loop.initial_state(task, recipe, config.seed)
    ascend = None if recipe.ascend is None else True
    return state, loop.train_step(
        task, recipe, ascend, state, (), batch, jnp.uint32(0)
    )

  return step, task.batch


def shapes_of_a_step(config):
  step, batch = step_of(config)
  return jax.eval_shape(step, batch)


def noise(shape):
  """Some pixels, classes, words or weights."""
  if jnp.issubdtype(shape.dtype, jnp.floating):
    return jnp.abs(jax.random.normal(jax.random.key(0), shape.shape))
  return jnp.arange(math.prod(shape.shape)).reshape(shape.shape) % 7 + 1


def steps_to_trace():
  """A row for each network, and for each kind of step with the smallest network."""
  # The radii of the small plan are not known yet.
  rows = [
      replace(config, rho=0.0 if config.method in methods.WITHOUT_RADIUS else 1.0)
      for config in ROWS
  ]
  chosen = {config.model: config for config in rows if config.method == "asam"}
  for config in rows:
    if config.model == "resnet8_wide":
      kind = (config.method, config.p, config.normalization, config.normalize_bias)
      chosen[kind] = config
  return list(chosen.values())


# The big networks take minutes to compile: their whole step, with both passes and the
# optimizer, is traced for its shapes, and taken only where ASAM_JAX_TESTS_REAL_STEPS is
# set. A small network takes real steps in test_train.py. Rows that differ in numbers
# alone have the same step, and networks and methods don't know of each other.
@pytest.mark.parametrize("config", steps_to_trace(), ids=lambda c: c.name)
def test_every_row_takes_a_step(config):
  before, after = shapes_of_a_step(config)
  assert after == before  # the state keeps its shapes and types
  if "ASAM_JAX_TESTS_REAL_STEPS" in os.environ:
    step, batch = step_of(replace(config, batch_size=4, subwords=128))
    _, after = jax.jit(step)(jax.tree.map(noise, batch))
    chex.assert_tree_all_finite(after)
    assert int(after.sums.total) > 0


@pytest.mark.parametrize("model", ["resnet8", "vit_small"])
def test_bfloat16_is_for_activations_alone(model):
  config = replace(
      configs.FAKE, dataset="cifar10", model=model, method="asam", rho=0.5,
      dtype="bfloat16",
  )
  before, after = shapes_of_a_step(config)
  assert after == before
  kinds = {leaf.dtype for leaf in jax.tree.leaves((after.params, after.variables))}
  assert kinds == {jnp.dtype("float32")}


def test_there_is_a_row_for_each_cell_of_each_table():
  tables = {}
  for config in configs.NAMED.values():
    tables.setdefault(config.table, []).append(config)
  counts = {table: len(rows) for table, rows in tables.items()}
  assert counts == {
      "cifar10": 24, "cifar100": 24, "imagenet": 3, "iwslt14": 3, "noise": 15,
      "normalization": 24, "fake": 1,
  }


def test_settings_are_the_paper_s():
  asam = configs.NAMED["cifar100-wrn28_10-asam"]
  assert (asam.rho, asam.eta, asam.epochs, asam.batch_size) == (1.0, 0.01, 200, 128)
  assert (asam.learning_rate, asam.momentum, asam.weight_decay) == (0.1, 0.9, 5e-4)
  assert (asam.label_smoothing, asam.crop, asam.flip) == (0.1, 4, True)
  assert configs.NAMED["cifar10-resnet20-sgd"].epochs == 400
  assert configs.NAMED["cifar10-resnet20-sam"].rho == 0.05
  pyramid = configs.NAMED["cifar10-pyramidnet272-sgd"]
  assert (pyramid.epochs, pyramid.batch_size, pyramid.auto_augment) == (1800, 256, True)
  resnet = configs.NAMED["imagenet-resnet50-asam"]
  assert (resnet.rho, resnet.batch_size, resnet.learning_rate) == (1.0, 512, 0.2)
  adam = configs.NAMED["iwslt14-asam"]
  assert (adam.rho, adam.beta2, adam.dropout, adam.epochs) == (0.2, 0.98, 0.3, 50)
  files = (adam.train_files, adam.validation_files, adam.test_files)
  assert files == ("train", "valid", "test")  # as IWSLT'14's are named


def test_correlation_has_625_models():
  rows = list(configs.correlation())
  assert len({key_of(config) for config in rows}) == len(rows) == 625
  assert len({config.name for config in rows}) == 625


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Config)])
def test_the_key_is_the_whole_configuration(field):
  value = getattr(configs.FAKE, field)
  other = {bool: lambda v: not v, str: lambda v: v + "x"}.get(
      type(value), lambda v: v + 1
  )(value)
  same = key_of(replace(configs.FAKE, **{field: other})) == key_of(configs.FAKE)
  assert same == (field in ("name", "table"))


def test_a_configuration_survives_json():
  config = configs.NAMED["normalization-elementwise-inf-0.01"]
  text = json.dumps(as_json(config), allow_nan=False)
  assert from_json(json.loads(text)) == config
  assert math.isinf(config.p)
  fields = json.loads(text)
  del fields["clip"]  # written before that field was thought of
  assert key_of(from_json(fields)) == key_of(config)
  with pytest.raises(ConfigError, match="unknown fields depth"):
    from_json({**fields, "depth": 3})


def test_command_line_changes_fields():
  config, options = cli.parse(
      ["cifar10-resnet20-asam", "--rho", "0.3", "--p", "inf", "--devices", "2"], "train"
  )
  expected = replace(configs.NAMED["cifar10-resnet20-asam"], rho=0.3, p=np.inf)
  assert config == expected
  assert options == Options(devices=2)


def test_help_explains_every_field(capsys):
  with pytest.raises(SystemExit):
    cli.parse(["fake", "--help"], "train")
  shown = capsys.readouterr().out
  fields = (*dataclasses.fields(Config), *dataclasses.fields(Options))
  for field in fields:
    flag = f"--{field.name.replace('_', '-')} "
    assert flag in shown
    explained = shown.split(flag, 1)[1].split("--")[0]
    assert len(explained.split()) > 4, f"{field.name} has no explanation"


def test_help_lists_the_configurations(capsys):
  with pytest.raises(SystemExit):
    cli.parse(["--help"], "train")
  shown = capsys.readouterr().out
  assert all(name in shown for name in configs.NAMED)


def test_unknown_configuration_gets_close_names():
  with pytest.raises(ConfigError, match="cifar10-resnet20-asam"):
    cli.parse(["cifar10-resnet21-asam"], "train")


def test_optimizers_are_found_by_name_and_take_their_steps():
  params = {"w": jnp.array([1.0, -2.0]), "bias": jnp.array(0.5)}
  value_fn = lambda p: jnp.sum(p["w"] ** 2) + p["bias"] ** 2  # noqa: E731
  grad_fn = jax.grad(value_fn)
  for method in methods.METHODS:
    rho = 0.0 if method in methods.WITHOUT_RADIUS else 0.1
    recipe = optimizers.make(replace(configs.FAKE, method=method, rho=rho), 10)
    state = recipe.tx.init(params)
    extra = {} if recipe.ascend is None else {"ascend": True}
    extra |= {"value": value_fn(params)} if recipe.losses else {}
    update = functools.partial(recipe.tx.update, value_fn=value_fn, **extra)
    updates, _ = update(grad_fn(params), state, params)
    expected_sign = jax.tree.map(lambda w: -jnp.sign(w), params)
    if not recipe.carried:
      signs = jax.tree.map(jnp.sign, updates)
      assert jax.tree.all(jax.tree.map(jnp.array_equal, signs, expected_sign))


@pytest.mark.parametrize("schedule", ["cosine", "inverse_sqrt", "constant"])
def test_learning_rate_rises_and_falls(schedule):
  config = replace(configs.FAKE, schedule=schedule, warmup=4, learning_rate=0.2)
  rates = [float(optimizers.learning_rate(config, 20)(step)) for step in range(21)]
  np.testing.assert_allclose(rates[:5], [0, 0.05, 0.1, 0.15, 0.2], rtol=1e-6)
  last = {"cosine": 0.0, "inverse_sqrt": 0.2 * (4 / 20) ** 0.5, "constant": 0.2}
  assert rates[-1] == pytest.approx(last[schedule], abs=1e-7)
  assert max(rates) == pytest.approx(0.2)
