"""What can't be trained ends with one line that says why, and not with a traceback."""

import functools

import numpy as np
import pytest

from examples.paper import image_task
from examples.paper import images
from examples.paper import loop
from examples.paper import train
from examples.paper.config import Options
from examples.paper.configs import NAMED
from examples.paper.configs import replace
from tests.paper import cifar_files

CIFAR10 = "cifar10-resnet20-sgd"


@pytest.fixture
def refusal(tmp_path, monkeypatch):
  """A function from a command line to the line that it ends with."""
  monkeypatch.setattr(loop, "_train", lambda *args: pytest.fail("it trained"))

  def end_of(*arguments):
    where = ["--folder", str(tmp_path / "run"), "--results", str(tmp_path / "results")]
    with pytest.raises(SystemExit) as caught:
      train.main([*map(str, arguments), *where, "--progress", "False"])
    line = str(caught.value)
    assert line.startswith("error: ")
    return line

  return end_of


@pytest.fixture
def few(monkeypatch):
  """CIFAR-10's files may hold a few images."""
  loader = functools.partial(images.load_cifar10, complete=False)
  monkeypatch.setattr(images, "load_cifar10", loader)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--model", "resnet21"], "model='resnet21': name='resnet21': no such network"),
    (["--model", "transformer"], "model='transformer': not for dataset=fake"),
    (["--method", "auto", "--cosine", "2"], "cosine=2.0: must be above 0"),
    (["--human-labels", "worse", "--labels", "."], "not fake"),
    (["--method", "asma"], "method='asma': unknown"),
])
def test_settings(arguments, message, refusal):
  assert message in refusal("fake", *arguments)


def _cut(data):
  return data[: len(data) // 2]


def _flip(data):
  middle = len(data) // 2
  return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("damage", [_cut, _flip])
def test_a_damaged_archive(damage, refusal, tmp_path):
  path = tmp_path / "archive.tar.gz"
  cifar_files.write_archive(images.CIFAR10, path)
  path.write_bytes(damage(path.read_bytes()))
  line = refusal(CIFAR10, "--data", path)
  assert f"data={path}: {path}: cannot be read" in line
  assert "get it again from" in line


def test_an_archive_of_too_few_images(refusal, tmp_path):
  path = tmp_path / "archive.tar.gz"
  cifar_files.write_archive(images.CIFAR10, path)
  assert "but 10000 images" in refusal(CIFAR10, "--data", path)


def test_a_download_that_fails(refusal, monkeypatch):
  def retrieve(url, **kwargs):
    raise OSError("no route to host")

  monkeypatch.setattr("pooch.retrieve", retrieve)
  line = refusal(CIFAR10)
  assert "could not be downloaded (no route to host)" in line
  assert "pass its path" in line


@pytest.fixture
def labels(tmp_path):
  """A folder with CIFAR-10 of twenty training images, and what people said of them."""
  content = cifar_files.write_folder(images.CIFAR10, tmp_path)
  clean = np.concatenate([content[name][:, 0] for name in images.CIFAR10.train])
  np.save(tmp_path / "cifar10n_clean_label.npy", clean)
  np.save(tmp_path / "cifar10n_worse_label.npy", (clean + 1) % 10)
  return clean


@pytest.mark.usefixtures("few")
def test_human_labels_must_be_in_the_order_of_the_images(labels, refusal, tmp_path):
  config = replace(NAMED[CIFAR10], human_labels="worse")
  data = image_task.load(config, Options(data=tmp_path, labels=tmp_path))
  np.testing.assert_array_equal(data.train.labels, (labels + 1) % 10)
  path = tmp_path / "cifar10n_clean_label.npy"
  np.save(path, labels[::-1])
  given = [CIFAR10, "--human-labels", "worse", "--data", tmp_path, "--labels"]
  assert "labels of kind 'clean' are not those of the training" in refusal(
      *given, tmp_path
  )
  assert "The folder must hold the labels" in refusal(*given, path)
