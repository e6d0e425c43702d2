"""CIFAR is read as its authors wrote it, and what is no CIFAR is told apart."""

import tarfile

import numpy as np
import pytest

from examples import label_noise
from examples.paper import images
from tests.paper import cifar_files

FORMS = {"cifar10": images.CIFAR10, "cifar100": images.CIFAR100}
LOADERS = {"cifar10": images.load_cifar10, "cifar100": images.load_cifar100}
NAMES = pytest.mark.parametrize("name", FORMS)


def _check(data, content, form):
  """Each pixel and label stands where the format's description says."""
  for split, names in ((data.train, form.train), (data.test, form.test)):
    rows = np.concatenate([content[name] for name in names])
    assert split.images.shape == (len(rows), 32, 32, 3)
    assert split.images.dtype == np.uint8
    assert split.labels.dtype == np.int32
    for n, y, x, channel in [(0, 0, 0, 0), (1, 31, 7, 1), (3, 12, 30, 2)]:
      place = form.label_bytes + channel * 1024 + y * 32 + x
      assert split.images[n, y, x, channel] == rows[n, place]
    np.testing.assert_array_equal(split.labels, rows[:, form.label_bytes - 1])
  assert data.classes == form.classes


@NAMES
@pytest.mark.parametrize("place", ["the folder", "its parent", "the archive"])
def test_pixels_and_labels_are_the_files(name, place, tmp_path):
  form = FORMS[name]
  if place == "the archive":
    path = tmp_path / form.archive
    content = cifar_files.write_archive(form, path)
  else:
    content = cifar_files.write_folder(form, tmp_path)
    path = tmp_path if place == "its parent" else tmp_path / form.folder
  _check(LOADERS[name](path, complete=False), content, form)


def test_an_archive_writes_nothing_and_nothing_else_in_it_is_read(tmp_path):
  link = tarfile.TarInfo(f"{images.CIFAR10.folder}/data_batch_1.bin")
  link.type = tarfile.SYMTYPE
  link.linkname = "/etc/passwd"
  outside = tarfile.TarInfo("../outside.bin")
  path = tmp_path / "folder" / "archive.tar.gz"
  path.parent.mkdir()
  content = cifar_files.write_archive(
      images.CIFAR10, path, extra=[(link, b""), (outside, b"x")]
  )
  data = images.load_cifar10(path, complete=False)
  _check(data, content, images.CIFAR10)
  assert sorted(tmp_path.rglob("*")) == [path.parent, path]


@NAMES
def test_by_default_the_official_numbers_of_images_are_expected(name, tmp_path):
  cifar_files.write_folder(FORMS[name], tmp_path)
  with pytest.raises(ValueError, match=r"train\.bin|data_batch_1\.bin") as error:
    LOADERS[name](tmp_path)
  assert "0000 images" in str(error.value)


def test_without_a_path_the_archive_is_downloaded_with_its_digest(
    tmp_path, monkeypatch
):
  path = tmp_path / "archive.tar.gz"
  content = cifar_files.write_archive(images.CIFAR10, path)
  asked = {}

  def retrieve(url, **kwargs):
    asked.update(kwargs, url=url)
    return str(path)

  monkeypatch.setattr("pooch.retrieve", retrieve)
  _check(images.load_cifar10(complete=False), content, images.CIFAR10)
  assert asked["url"] == "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
  assert asked["known_hash"] == f"sha256:{images.CIFAR10.sha256}"
  assert len(images.CIFAR10.sha256) == len(images.CIFAR100.sha256) == 64


def test_a_download_that_fails_says_what_to_do(monkeypatch):
  def retrieve(url, **kwargs):
    raise ValueError("the digest does not match")

  monkeypatch.setattr("pooch.retrieve", retrieve)
  with pytest.raises(RuntimeError, match=r"digest does not match.*pass its path"):
    images.load_cifar100()


@NAMES
def test_a_wrong_path_is_named(name, tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
    LOADERS[name](tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match=r"test.*\.bin not found"):
    LOADERS[name](tmp_path)


def test_a_missing_file_is_named(tmp_path):
  cifar_files.write_folder(images.CIFAR10, tmp_path)
  (tmp_path / images.CIFAR10.folder / "data_batch_3.bin").unlink()
  with pytest.raises(FileNotFoundError, match=r": data_batch_3.bin not found"):
    images.load_cifar10(tmp_path, complete=False)


@pytest.mark.parametrize("keep", [0, 1, 3072, 3 * 3073 + 100])
def test_a_file_that_is_cut_off_is_named(keep, tmp_path):
  cifar_files.write_folder(images.CIFAR10, tmp_path)
  path = tmp_path / images.CIFAR10.folder / "test_batch.bin"
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(ValueError, match=rf"test_batch.bin: {keep} bytes, but whole"):
    images.load_cifar10(tmp_path, complete=False)


def test_a_label_out_of_range_is_an_error(tmp_path):
  cifar_files.write_folder(images.CIFAR10, tmp_path)
  path = tmp_path / images.CIFAR10.folder / "test_batch.bin"
  path.write_bytes(b"\x0a" + path.read_bytes()[1:])
  with pytest.raises(ValueError, match=r"to 10, but they must lie in \[0, 10\)"):
    images.load_cifar10(tmp_path, complete=False)


def _cut(data):
  return data[: len(data) // 2]


def _flip(data):
  middle = len(data) // 2
  return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [_cut, _flip, lambda _: b"", lambda _: b"no gzip"])
def test_a_damaged_archive_is_named(damage, tmp_path):
  path = tmp_path / "archive.tar.gz"
  cifar_files.write_archive(images.CIFAR10, path)
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(ValueError, match=r"archive.tar.gz: .*get it again"):
    images.load_cifar10(path, complete=False)


def test_the_archive_of_the_other_data_set_is_an_error(tmp_path):
  path = tmp_path / "archive.tar.gz"
  cifar_files.write_archive(images.CIFAR100, path)
  with pytest.raises(ValueError, match=r"data_batch_1.bin.*not in it"):
    images.load_cifar10(path, complete=False)


@pytest.fixture
def human_labels(tmp_path):
  """A folder with the labels of five images, one array a kind."""
  labels = {kind: np.arange(5) + i for i, kind in enumerate(images.CIFAR10N_KINDS)}
  for kind, values in labels.items():
    suffix = "" if kind.startswith("random") else "_label"
    np.save(tmp_path / f"cifar10n_{kind}{suffix}.npy", values.astype(np.uint8))
  return tmp_path, labels


def test_human_labels_of_each_kind(human_labels):
  folder, labels = human_labels
  for kind, values in labels.items():
    read = images.load_cifar10n(folder, kind, labels["clean"])
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, values)


def test_human_labels_in_another_order_are_an_error(human_labels):
  folder, labels = human_labels
  with pytest.raises(ValueError, match="4 of 5 labels of kind 'clean'"):
    images.load_cifar10n(folder, "worse", labels["clean"][::-1])


def test_human_labels_that_are_no_such_thing(human_labels):
  folder, labels = human_labels
  with pytest.raises(ValueError, match="kind='worst': must be one of clean, aggre"):
    images.load_cifar10n(folder, "worst")
  with pytest.raises(ValueError, match="50000 integers are expected"):
    images.load_cifar10n(folder, "worse")
  with pytest.raises(FileNotFoundError, match=r"cifar10n_worse_label.npy"):
    images.load_cifar10n(folder / "nowhere", "worse")
  path = folder / "cifar10n_worse_label.npy"
  np.save(path, {"worse_label": labels["worse"]}, allow_pickle=True)
  with pytest.raises(ValueError, match="A pickle is not opened"):
    images.load_cifar10n(folder, "worse", labels["clean"])
  np.save(path, np.full(5, 10))
  with pytest.raises(ValueError, match="labels from 10 to 10"):
    images.load_cifar10n(folder, "worse", labels["clean"])


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_label_noise_is_symmetric(dtype):
  labels = np.repeat(np.arange(100), 200).astype(dtype)
  noisy = images.flip_labels(labels, 0.4, classes=100, seed=0)
  assert noisy.dtype == dtype
  wrong = noisy != labels
  assert wrong.sum() == 8000
  # Each of the 99 other classes is as likely: the shift's histogram is flat.
  shift = (noisy.astype(int) - labels.astype(int)) % 100
  counts = np.bincount(shift[wrong], minlength=100)
  assert counts[0] == 0
  assert np.abs(counts[1:] - 8000 / 99).max() < 5 * np.sqrt(8000 / 99)


def test_label_noise_rejects_bad_classes():
  with pytest.raises(ValueError, match="labels from 0 to 3: must lie in"):
    label_noise.flip_labels(np.arange(4), 0.5, classes=3, seed=0)
  with pytest.raises(ValueError, match="classes=1"):
    label_noise.flip_labels(np.zeros(4, int), 0.5, classes=1, seed=0)


def test_validation_split_is_a_partition():
  kept, held_out = images.validation_split(1000, 0.1, seed=0)
  assert len(held_out) == 100
  assert sorted([*kept, *held_out]) == list(range(1000))
  with pytest.raises(ValueError, match="fraction=1"):
    images.validation_split(10, 1, seed=0)
