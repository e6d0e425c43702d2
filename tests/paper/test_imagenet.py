"""Image folders become batches; every test image counts."""

import itertools

import numpy as np
from PIL import Image
import pytest

from examples.paper import imagenet

COLOURS = {"ant": (200, 30, 40), "bee": (20, 180, 60), "cat": (10, 60, 220)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Five training and three test images of each class, each of one colour."""
  folder = tmp_path_factory.mktemp("imagenet")
  for part, count in (("train", 5), ("val", 3)):
    for name, colour in COLOURS.items():
      (folder / part / name).mkdir(parents=True)
      for i in range(count):
        image = Image.new("RGB", (40 + 3 * i, 50 - 3 * i), colour)
        image.save(folder / part / name / f"{i}.{'JPEG' if i % 2 else 'jpg'}")
  (folder / "train" / "ant" / "notes.txt").write_text("no image")
  return folder


@pytest.fixture(scope="module")
def data(folder):
  return imagenet.load_folders(folder)


def _labels_of(images):
  """The class whose colour each image has."""
  colours = np.array(list(COLOURS.values()))
  means = images.astype(float).mean((1, 2))
  return np.abs(means[:, None] - colours).sum(-1).argmin(-1)


def test_folders_are_classes(data):
  assert data.classes == ["ant", "bee", "cat"]
  assert len(data.train.paths) == 15
  assert len(data.test.paths) == 9
  np.testing.assert_array_equal(data.test.labels, np.repeat([0, 1, 2], 3))


@pytest.mark.parametrize("batch_size", [1, 4, 9, 20])
def test_every_test_image_counts_once(data, batch_size):
  batches = list(imagenet.eval_batches(data.test, batch_size, size=16))
  assert {batch.images.shape for batch in batches} == {(batch_size, 16, 16, 3)}
  weights = np.concatenate([batch.weights for batch in batches])
  labels = np.concatenate([batch.labels for batch in batches])
  images = np.concatenate([batch.images for batch in batches])
  assert images.dtype == np.uint8
  assert weights.sum() == 9
  np.testing.assert_array_equal(labels[weights == 1], data.test.labels)
  np.testing.assert_array_equal(_labels_of(images[weights == 1]), data.test.labels)
  assert not images[weights == 0].any()


def test_an_epoch_has_each_image_once_and_the_next_another_order(data):
  batches = imagenet.train_batches(data.train, 15, seed=0, size=8)
  epochs = list(itertools.islice(batches, 2))
  for batch in epochs:
    assert batch.images.shape == (15, 8, 8, 3)
    np.testing.assert_array_equal(np.bincount(batch.labels), [5, 5, 5])
    np.testing.assert_array_equal(_labels_of(batch.images), batch.labels)
  assert np.any(epochs[0].labels != epochs[1].labels)


def test_training_goes_on_where_it_was_interrupted(data):
  def start():
    return imagenet.train_batches(data.train, 4, seed=1, size=8)

  whole = list(itertools.islice(start(), 6))
  interrupted = start()
  for _ in range(2):
    next(interrupted)
  state = interrupted.get_state()
  resumed = start()
  resumed.set_state(state)
  for batch, expected in zip(itertools.islice(resumed, 4), whole[2:], strict=True):
    np.testing.assert_array_equal(batch.images, expected.images)
    np.testing.assert_array_equal(batch.labels, expected.labels)
  other = next(imagenet.train_batches(data.train, 4, seed=2, size=8))
  assert np.any(other.labels != whole[0].labels) or np.any(
      other.images != whole[0].images
  )


def test_processes_give_the_same_batches(data):
  alone = imagenet.train_batches(data.train, 4, seed=1, size=8)
  helped = imagenet.train_batches(data.train, 4, seed=1, size=8, workers=2)
  for batch, expected in zip(itertools.islice(helped, 4), alone, strict=False):
    np.testing.assert_array_equal(batch.images, expected.images)
    np.testing.assert_array_equal(batch.labels, expected.labels)
  helped.close()


def test_random_boxes_lie_inside_and_have_the_areas_and_ratios():
  rng = np.random.default_rng(0)
  boxes = np.array([imagenet.random_box(500, 375, rng) for _ in range(3000)])
  left, top, width, height = boxes.T
  assert left.min() == 0
  assert (left + width).max() == 500
  assert top.min() == 0
  assert (top + height).max() == 375
  area, ratio = width * height / (500 * 375), width / height
  assert 0.078 < area.min() < 0.1
  assert 0.9 < area.max() <= 1
  assert 0.73 < ratio.min() < 0.77
  assert 1.3 < ratio.max() < 1.36
  # The logarithm of the ratio is uniform: as many are wide as high.
  small = area < 0.4  # all of which fit
  assert abs(np.mean(ratio[small] > 1) - 0.5) < 0.05


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 10), (493, 0, 13, 10)), ((10, 1000), (0, 493, 10, 13))],
)
def test_what_no_box_fits_is_cropped_at_its_center(size, expected):
  assert imagenet.random_box(*size, np.random.default_rng(0)) == expected


def test_a_random_crop_is_mirrored_half_of_the_time():
  ramp = np.tile(np.arange(100, dtype=np.uint8), (100, 1))
  image = Image.fromarray(np.stack([ramp] * 3, -1))
  rng = np.random.default_rng(0)
  crops = [imagenet.random_crop(image, 10, rng) for _ in range(300)]
  rising = [crop[0, 0, 0] < crop[0, -1, 0] for crop in crops]
  assert 0.4 < np.mean(rising) < 0.6


def test_the_center_crop_is_the_center():
  pixels = np.zeros((64, 128, 3), np.uint8)
  pixels[28:36, 60:68] = 255
  crop = imagenet.center_crop(Image.fromarray(pixels), 56)  # resized to 64 x 128
  assert crop.shape == (56, 56, 3)
  expected = np.zeros((56, 56), bool)
  expected[24:32, 24:32] = True
  np.testing.assert_array_equal(crop[..., 0] > 127, expected)


def test_grey_and_small_images_are_images(tmp_path):
  for part, name in itertools.product(("train", "val"), ("a", "b")):
    (tmp_path / part / name).mkdir(parents=True)
    Image.new("L", (3, 5), 77).save(tmp_path / part / name / "grey.png")
  data = imagenet.load_folders(tmp_path)
  (batch,) = imagenet.eval_batches(data.test, 2, size=6)
  np.testing.assert_array_equal(batch.images, 77)


def test_bad_folders_are_errors(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match="train: no such folder"):
    imagenet.load_folders(tmp_path)
  with pytest.raises(FileNotFoundError, match="ant: has 0 folders"):
    imagenet.load_folders(folder / "train", train="ant")
  for part, name in itertools.product(("train", "val"), ("a", "b")):
    (tmp_path / part / name).mkdir(parents=True)
  with pytest.raises(FileNotFoundError, match=r"a: has no image \(.jpeg"):
    imagenet.load_folders(tmp_path)
  (tmp_path / "val" / "c").mkdir()
  with pytest.raises(ValueError, match=r"1 classes are in one of train and val.*\(c"):
    imagenet.load_folders(tmp_path)


def test_bad_batches_and_images_are_errors(data, tmp_path):
  with pytest.raises(ValueError, match="batch_size=16: must be from 1 to 15"):
    imagenet.train_batches(data.train, 16, seed=0)
  with pytest.raises(ValueError, match="batch_size=0"):
    imagenet.eval_batches(data.test, 0)
  path = tmp_path / "cut.jpg"
  path.write_bytes(data.test.paths[0].read_bytes()[:300])
  files = imagenet.Files([path], np.zeros(1, np.int32))
  with pytest.raises(ValueError, match=r"cut.jpg: cannot be read as an image"):
    list(imagenet.eval_batches(files, 1))
