"""The trainer takes the steps that the paper describes."""

import dataclasses
import functools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from examples.paper import clock
from examples.paper import image_task
from examples.paper import loop
from examples.paper import methods
from examples.paper import optimizers
from examples.paper import programs
from examples.paper import train
from examples.paper.config import ConfigError
from tests.paper.tiny import CONFIG
from tests.paper.tiny import options
from tests.paper.tiny import tiny  # noqa: F401

pytestmark = pytest.mark.usefixtures("tiny")
replace = dataclasses.replace


def first_step(config, tmp_path):
  """(task, state before, state after the first step, its batch)."""
  task = image_task.ImageTask(config, options(tmp_path))
  recipe = optimizers.make(config, config.epochs * task.steps)
  before = loop.initial_state(task, recipe, config.seed)
  batch = task.batches(0)[0]
  step = jax.jit(functools.partial(loop.train_step, task, recipe, None))
  after = step(before, task.data, batch, jnp.uint32(config.seed))
  return task, before, after, batch


def hand_written_loss(task, config, before, batch):
  """The loss of parameters, with the first step's crops and dropout."""
  key = jax.random.fold_in(jax.random.key(config.seed), 0)
  crops, dropout = jax.random.split(key)
  images, labels = task.prepare(task.data, batch, crops)

  def loss(params):
    logits, variables = task.network.apply(
        {"params": params, **before.variables}, images, train=True,
        rngs={"dropout": dropout}, mutable=["batch_stats"],
    )
    smooth = 0.9 * jax.nn.one_hot(labels, 10) + 0.1 / 10
    return -jnp.mean(jnp.sum(smooth * jax.nn.log_softmax(logits), -1)), variables

  return loss


@pytest.mark.parametrize("method", ["plain", "sam", "asam"])
def test_first_step_is_the_formula(method, tmp_path):
  rho = {"plain": 0.0, "sam": 0.05, "asam": 0.5}[method]
  config = replace(CONFIG, method=method, rho=rho)
  task, before, after, batch = first_step(config, tmp_path)
  loss = jax.jit(
      jax.value_and_grad(hand_written_loss(task, config, before, batch), has_aux=True)
  )
  (value, variables), g = loss(before.params)

  def t(path, w):
    normalized = method == "asam" and path[-1].key != "bias"
    return jnp.abs(w) + 0.01 if normalized else jnp.ones_like(w)

  T = jax.tree_util.tree_map_with_path(t, before.params)
  norm = optax.tree_utils.tree_norm(jax.tree.map(jnp.multiply, T, g))
  moved = jax.tree.map(
      lambda w, t, g: w + rho * t**2 * g / norm, before.params, T, g
  )
  _, g = loss(moved)
  # Decay is not in the ascent; the momentum begins with the first gradient.
  expected = jax.tree.map(lambda w, g: w - 0.1 * (g + 5e-4 * w), before.params, g)
  chex.assert_trees_all_close(after.params, expected, rtol=2e-5, atol=2e-6)
  # Statistics and loss are those of the clean pass.
  chex.assert_trees_all_close(after.variables, variables, rtol=1e-5, atol=1e-6)
  assert int(after.sums.total) == 16
  np.testing.assert_allclose(after.sums.loss / 16, value, rtol=1e-5)


def test_one_group_of_m_sharpness_is_the_whole_batch(tmp_path):
  asam = replace(CONFIG, method="asam", rho=0.5)
  expected, found = (
      first_step(config, tmp_path)[2]._replace(opt_state=None)
      for config in (asam, replace(asam, method="m_sharpness", m=16))
  )
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["functional", "m_sharpness", "rise", "iterated"])
def test_methods_with_a_door_or_losses_of_their_own(method, tmp_path):
  rho = 0.0 if method in methods.WITHOUT_RADIUS else 0.5
  config = replace(CONFIG, method=method, rho=rho, m=8)
  task, before, after, batch = first_step(config, tmp_path)
  (loss, _), g = jax.value_and_grad(
      hand_written_loss(task, config, before, batch), has_aux=True
  )(before.params)
  assert int(after.sums.total) == 16
  if method != "m_sharpness":  # whose groups have their own batch statistics
    np.testing.assert_allclose(after.sums.loss / 16, loss, rtol=1e-5)
  plain = jax.tree.map(lambda w, g: w - 0.1 * (g + 5e-4 * w), before.params, g)
  moved, other = (
      optax.tree_utils.tree_sub(x, before.params) for x in (after.params, plain)
  )
  apart = optax.tree_utils.tree_norm(optax.tree_utils.tree_sub(moved, other))
  share = apart / optax.tree_utils.tree_norm(other)
  if method == "rise":  # a rule takes its first radius from the first step
    assert share < 1e-5
    assert optax.tree_utils.tree_get(after.opt_state, "rho") > 0
  else:
    assert 1e-3 < share < 1


def test_steps_differ_by_seed_and_epoch_only(tmp_path):
  task = image_task.ImageTask(CONFIG, options(tmp_path))
  other = image_task.ImageTask(replace(CONFIG, seed=1), options(tmp_path))
  np.testing.assert_array_equal(task.batches(3), task.batches(3))
  assert np.any(task.batches(3) != task.batches(4))
  assert np.any(task.batches(3) != other.batches(3))
  assert sorted(task.batches(0).ravel()) == list(range(64))


def test_the_whole_test_set_counts(tmp_path, monkeypatch):
  monkeypatch.setattr(image_task, "EVAL_BATCH", 50)  # 130 images: 20 of padding
  task = image_task.ImageTask(CONFIG, options(tmp_path))
  params, variables = task.init(jax.random.key(0))
  test = image_task.load(CONFIG, options(tmp_path)).test
  logits = task.network.apply(
      {"params": params, **variables}, test.images / 63.75 - 2.0, train=False
  )
  result = task.evaluate(params, variables, True)
  assert round(130 * result["accuracy"]) == np.sum(np.argmax(logits, -1) == test.labels)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, test.labels)
  np.testing.assert_allclose(result["loss"], np.mean(losses), rtol=1e-5)


def test_validation_is_held_out_of_training(tmp_path):
  config = replace(CONFIG, examples=300, validation=100)
  data = image_task.load(config, options(tmp_path))
  training, judged = image_task.split_for_training(data, config)
  seen, kept = ({x.tobytes() for x in s.images} for s in (training, judged))
  assert (len(seen), len(kept)) == (300, 100)
  assert not seen & kept
  assert kept.isdisjoint(x.tobytes() for x in data.test.images)


def test_a_run_learns_and_says_what_it_did(tmp_path):
  config = replace(CONFIG, epochs=12, learning_rate=0.02, crop=0, dropout=0.0)
  outcome = loop.run(config, options(tmp_path))
  record = outcome.record
  assert [line["epoch"] for line in record["history"]] == list(range(1, 13))
  assert record["history"][-1]["accuracy"] > 0.25  # guessing has 0.1
  assert record["history"][-1]["train_loss"] < record["history"][0]["train_loss"]
  assert record["steps"] == 48 == int(outcome.state.step)
  # A 3x3 kernel on 8x8 pixels, and the last layer.
  assert record["multiply_adds"] == 64 * 27 * 4 + 256 * 10
  assert record["config"]["learning_rate"] == 0.02
  assert not record["diverged"]
  lines = (tmp_path / "run" / "log.jsonl").read_text("utf-8").splitlines()
  assert [json.loads(line) for line in lines][1:] == record["history"]
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_epochs_in_one_loop_and_on_many_devices_are_the_same_run(tmp_path):
  config = replace(CONFIG, epochs=2, method="asam", rho=0.5)
  alone = loop.run(config, options(tmp_path / "a", dispatch="step")).state
  for place, how in (("b", {"dispatch": "epoch"}), ("c", {"devices": 4})):
    other = loop.run(config, options(tmp_path / place, **how))
    chex.assert_trees_all_close(other.state, alone, rtol=1e-3, atol=1e-4)
    assert other.record["devices"] == how.get("devices", 1)


def test_one_compilation_a_run_and_two_where_the_host_decides(tmp_path):
  for method, rho, count in (("plain", 0.0, 1), ("asam", 0.1, 1), ("looksam", 0.1, 2)):
    config = replace(CONFIG, method=method, rho=rho, every=3)
    task = image_task.ImageTask(config, options(tmp_path))
    recipe = optimizers.make(config, 12)
    step = functools.partial(loop.train_step, task, recipe)
    program = programs.Program(
        step, task, recipe.ascend, config, options(tmp_path), clock.Clock()
    )
    state = program.place(loop.initial_state(task, recipe, 0))
    for epoch in range(2):
      states = list(program.epoch(state, epoch, 0))
      assert [step for step, _ in states] == list(range(4 * epoch + 1, 4 * epoch + 5))
      state = states[-1][1]
    assert program.compilations == count
    assert int(state.step) == 8


def test_carried_methods_are_judged_without_the_perturbation(tmp_path):
  config = replace(CONFIG, method="momentum_sam", rho=1.0)
  task, _, state, _ = first_step(config, tmp_path)
  recipe = optimizers.make(config, 12)
  clean = loop.clean_params(recipe, state)
  chex.assert_trees_all_equal(clean, asam_jax.eval_params(state.opt_state))
  apart = jax.tree.map(jnp.subtract, clean, state.params)
  assert optax.tree_utils.tree_norm(apart) > 0.5
  assert task.evaluate(clean, state.variables, True)["accuracy"] >= 0


def test_what_diverges_is_stopped_and_recorded(tmp_path):
  config = replace(CONFIG, learning_rate=1e30, epochs=5)
  record = loop.run(config, options(tmp_path)).record
  assert record["diverged"]
  assert len(record["history"]) < 5
  assert "accuracy" in record["history"][-1]
  json.loads(json.dumps(record), parse_constant=lambda name: pytest.fail(name))


def test_main_writes_a_line_of_results(tmp_path, capsys):
  arguments = [
      "fake", "--examples", "32", "--batch-size", "16", "--epochs", "1",
      "--folder", str(tmp_path / "run"), "--results", str(tmp_path / "results"),
      "--tensorboard", "True",
  ]
  train.main(arguments)
  (line,) = (tmp_path / "results" / "fake.jsonl").read_text("utf-8").splitlines()
  record = json.loads(line)
  assert record["config"]["examples"] == 32
  assert "fake, seed 0: accuracy" in capsys.readouterr().out
  assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize(("fields", "more", "message"), [
    ({"epochs": -1}, {}, "epochs=-1: must be a number of at least 1"),
    ({"rho": math.nan, "method": "sam"}, {}, "rho=nan"),
    ({"rho": 0.1}, {}, "rho=0.1: method='plain' takes no radius"),
    ({"method": "asam"}, {}, "rho=0: method='asam' needs a radius"),
    ({"method": "asma", "rho": 1.0}, {}, "method='asma': unknown; take one of plain"),
    ({"batch_size": 18}, {"devices": 4}, "batch_size=18: does not divide into 4"),
    ({"batch_size": 600}, {}, "batch_size=600: there are only 64"),
    ({}, {"devices": 99}, "devices=99: there are "),
    ({"dataset": "cifar10"}, {"data": "nowhere"}, "data=nowhere: there is no such"),
    ({"dataset": "imagenet"}, {}, "dataset=imagenet needs --data, its place."),
    ({"dataset": "parallel", "model": "transformer"}, {},
     "dataset=parallel needs --data, its place (of a plan: --text)."),
    ({"dataset": "cifar10", "human_labels": "worse"}, {}, "needs --labels, the place"),
    ({"human_labels": "worse"}, {}, "CIFAR-10N's labels are for dataset=cifar10, not"),
    ({"noise": 0.2, "human_labels": "worse"}, {}, "choose one of the two kinds"),
    ({"noise": 1.5}, {}, "noise=1.5: must be at most 1"),
    ({"validation": 600}, {}, "examples=64 with validation=600"),
    ({"warmup": 12}, {}, "warmup=12: the whole run has 12 steps"),
    ({"method": "auto", "cosine": 2.0}, {}, "cosine=2.0: must be above 0 and below 1"),
    ({"cosine": math.nan}, {}, "cosine=nan"),
    ({"model": "transformer"}, {}, "model='transformer': not for dataset=fake; take"),
    ({"model": "vgg19_bn", "dataset": "parallel"}, {}, "take one of transformer, t"),
    ({"method": "looksam", "rho": 0.1}, {"dispatch": "epoch"}, "take dispatch=step"),
])
def test_bad_input_is_refused_before_anything_is_trained(
    fields, more, message, tmp_path, monkeypatch
):
  monkeypatch.setattr(loop, "_train", lambda *args: pytest.fail("it trained"))
  if "data" in more:
    more = {"data": tmp_path / more["data"]}
    message = message.replace("nowhere", str(more["data"]))
  with pytest.raises(ConfigError) as caught:
    loop.run(replace(CONFIG, **fields), options(tmp_path, **more))
  assert message in str(caught.value)
