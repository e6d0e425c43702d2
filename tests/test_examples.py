"""The quickstart runs and tells the truth about what it ran."""

import importlib
import json
import math

from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("sklearn", reason="the examples need the extra 'examples'")

digits = importlib.import_module("examples.digits")
quickstart = importlib.import_module("examples.quickstart")
quickstart_report = importlib.import_module("examples.quickstart_report")


@pytest.fixture(scope="module")
def halves():
  return digits.load_halves()


def _rows(images):
  return {image.tobytes() for image in images}


def test_halves_are_disjoint_and_complete(halves):
  train, test = _rows(halves.train_images), _rows(halves.test_images)
  assert len(train) == len(halves.train_labels) == 898
  assert len(test) == len(halves.test_labels) == 899
  assert not train & test
  assert halves.train_images.shape[1:] == (8, 8, 1)
  assert halves.train_images.min() == 0
  assert halves.train_images.max() == 1
  counts = [np.bincount(y) for y in (halves.train_labels, halves.test_labels)]
  assert np.abs(counts[0] - counts[1]).max() <= 1


@pytest.mark.parametrize("fraction", [0.0, 0.123, 0.4, 1.0])
def test_flip_labels_flips_exactly_so_many_to_another_class(halves, fraction):
  labels = halves.train_labels
  before = labels.copy()
  noisy = digits.flip_labels(labels, fraction, seed=3)
  np.testing.assert_array_equal(labels, before)
  assert np.sum(noisy != labels) == round(fraction * len(labels))
  assert noisy.dtype == labels.dtype
  assert noisy.min() >= 0
  assert noisy.max() <= 9


def test_flip_labels_goes_by_seed_and_reaches_every_other_class():
  labels = np.full(9000, 4, np.int32)
  noisy = digits.flip_labels(labels, 1.0, seed=0)
  np.testing.assert_array_equal(noisy, digits.flip_labels(labels, 1.0, seed=0))
  assert np.any(noisy != digits.flip_labels(labels, 1.0, seed=1))
  counts = np.bincount(noisy, minlength=10)
  assert counts[4] == 0
  # Nine classes, 1000 expected in each: five standard deviations are 150.
  assert np.abs(np.delete(counts, 4) - 1000).max() < 150


@pytest.mark.parametrize("fraction", [-0.1, 1.5, math.nan])
def test_flip_labels_rejects_what_is_no_fraction(fraction):
  with pytest.raises(ValueError, match="fraction="):
    digits.flip_labels(np.zeros(10, np.int32), fraction, seed=0)


def test_validation_never_sees_the_test_half(halves):
  runs = digits.validation_runs(halves, [0, 1], noise=0.4, fraction=0.25)
  final = digits.final_runs(halves, [0, 1], noise=0.4)
  train, test = _rows(halves.train_images), _rows(halves.test_images)
  for i in range(2):
    kept, held_out = _rows(runs.train_images[i]), _rows(runs.eval_images[i])
    assert not kept & held_out
    assert kept | held_out == train
    assert len(held_out) == round(0.25 * 898)
    assert _rows(final.train_images[i]) == train
    assert _rows(final.eval_images[i]) == test
    np.testing.assert_array_equal(final.eval_labels[i], halves.test_labels)
    # The same wrong labels in the sweep as in the runs that count.
    images = map(bytes, final.train_images[i])
    noisy = dict(zip(images, final.train_labels[i], strict=True))
    for images, labels in ((runs.train_images[i], runs.train_labels[i]),
                           (runs.eval_images[i], runs.eval_labels[i])):
      assert [noisy[bytes(image)] for image in images] == labels.tolist()
  assert np.any(final.train_labels[0] != final.train_labels[1])


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_by_patches_is_the_convolution(stride):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 4)), jnp.float32)
  expected = lax.conv_general_dilated(
      x, kernel, (stride, stride), [(1, 1), (1, 1)],
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  result = digits.convolve_patches(x, kernel, (stride, stride), "SAME")
  np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_runs_side_by_side_are_those_alone(halves):
  def optimizer(rho):
    return optax.sgd(rho)  # the radius, of all uses, as a learning rate

  def final(seeds, rhos):
    runs = digits.final_runs(halves, seeds, noise=0.4)
    return digits.train(
        digits.MLP(width=16), optimizer, runs, seeds, rhos, epochs=1, batch_size=449
    ).accuracy[-1]

  together = final([0, 0, 1], [0.0, 1.0, 1.0])
  np.testing.assert_allclose(together[2:], final([1], [1.0]), atol=0.004)
  assert len(set(together.tolist())) == 3  # radius and seed both matter


def test_quickstart_writes_what_it_prints(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folder = tmp_path / "runs" / "quickstart"  # the default
  results, figure = folder / "results.jsonl", folder / "quickstart.png"
  quickstart.main([
      "--networks", "mlp", "--methods", "sgd", "asam", "--epochs", "2",
      "--seeds", "2", "--sweep-seeds", "1", "--rhos-asam", "0.5", "300",
      "--seed", "7",
  ])
  assert [path.name for path in tmp_path.iterdir()] == ["runs"]
  assert {path.name for path in folder.iterdir()} == {results.name, figure.name}
  printed = capsys.readouterr().out
  records = [json.loads(line) for line in results.read_text("utf-8").splitlines()]

  assert [(r["network"], r["method"]) for r in records] == [
      ("mlp", "sgd"), ("mlp", "asam")
  ]
  sgd, asam = records
  assert sgd["rho"] is None
  assert sgd["sweep_validation_accuracy"] == {}
  # A radius of 300 is absurd, and validation says so.
  assert asam["rho"] == 0.5
  scores = asam["sweep_validation_accuracy"]
  assert scores["0.5"] > scores["300.0"]
  for record in records:
    assert record["seeds"] == [7, 8]
    assert record["epochs"] == [1, 2]
    assert np.shape(record["test_accuracy_by_epoch"]) == (2, 2)
    assert record["test_accuracy"] == record["test_accuracy_by_epoch"][-1]
    # Accuracies of 899 images, and more than guessing already.
    right = 899 * np.array(record["test_accuracy"])
    np.testing.assert_allclose(right, right.round(), atol=0.01)
    assert np.mean(record["test_accuracy"]) > 0.2
    assert record["seconds"] > 0
    assert record["config"]["noise"] == 0.4
    assert set(record["versions"]) == {
        "asam_jax", "flax", "jax", "optax", "python"}
    mean = 100 * np.mean(record["test_accuracy"])
    error = 100 * abs(np.subtract(*record["test_accuracy"])) / 2
    assert f"| {mean:.1f} ± {error:.1f} |" in printed
  assert "| MLP | SGD | - |" in printed
  assert "| MLP | ASAM | 0.5 |" in printed
  assert "widen --rhos-asam" in printed  # 0.5 is the end of its grid
  assert figure.read_bytes().startswith(b"\x89PNG")
  assert figure.stat().st_size > 10_000

  figure.unlink()
  quickstart.main(["--redraw", "--results", str(folder)])
  assert figure.stat().st_size > 10_000
  assert quickstart_report.table(records) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1"], "--seeds: 1: must be at least 2"),
        (["--noise", "1.5"], "--noise: 1.5: must be at least 0 and at most 1"),
        (["--p", "0.5"], "--p: 0.5: must be at least 1"),
        (["--lr", "0"], "--lr: 0: must be above 0"),
        (["--rhos-sam", "0.1", "nan"], "--rhos-sam: nan"),
        (["--epochs", "two"], "--epochs: invalid int value: 'two'"),
        (["--methods", "adam"], "--methods: invalid choice: 'adam'"),
        (["--batch-size", "700"], "--batch-size 700"),
        (["--redraw", "--results", "nowhere"], "nowhere/results.jsonl"),
    ],
)
def test_bad_options_are_refused_by_name(options, message, capsys):
  with pytest.raises(SystemExit):
    quickstart.parse_args(options)
  assert message in capsys.readouterr().err


def test_progress_bar_counts_every_gradient(halves):
  args = quickstart.parse_args([
      "--networks", "mlp", "--methods", "sgd", "sam", "asam", "--epochs", "3",
      "--seeds", "2", "--sweep-seeds", "2", "--rhos-sam", "0.1",
      "--rhos-asam", "1", "2", "3",
  ])
  # 14 batches of 64 in 898 images, 10 in the 674 that the sweep trains on.
  expected = 3 * (2 * 14 + 2 * 2 * 14 + 2 * (2 * 14 + 3 * 2 * 10))
  assert quickstart.gradients(args, len(halves.train_labels)) == expected
