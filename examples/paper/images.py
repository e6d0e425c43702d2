"""CIFAR-10 and CIFAR-100 from their official binary files, with label noise.

The layout is that of https://www.cs.toronto.edu/~kriz/cifar.html, "binary version":
a record is the label byte (CIFAR-100: the coarse label's, then the fine one's) and
3072 bytes, the red, the green and the blue plane in row-major order. Nothing is
unpickled, and nothing is unpacked to disk: an archive's files are read from it.
"""

from collections.abc import Iterator
import gzip
import pathlib
import tarfile
from typing import NamedTuple
import zlib

import numpy as np

from examples.label_noise import flip_labels
from examples.label_noise import validation_split

__all__ = [
    "Images",
    "Split",
    "flip_labels",
    "load_cifar10",
    "load_cifar10n",
    "load_cifar100",
    "validation_split",
]

CIFAR10N_KINDS = (
    "clean",
    "aggre",
    "random_label1",
    "random_label2",
    "random_label3",
    "worse",
)
PIXELS = 3 * 32 * 32


class Split(NamedTuple):
  """Images and what they show."""

  images: np.ndarray  # uint8 [n, height, width, 3]
  labels: np.ndarray  # int32 [n]


class Images(NamedTuple):
  """A data set; mean and std are the channels', of pixels in [0, 1]."""

  train: Split
  test: Split
  classes: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]


class _Format(NamedTuple):
  """How one of the two data sets is kept."""

  archive: str
  sha256: str
  folder: str
  train: dict[str, int]  # file: number of images
  test: dict[str, int]
  label_bytes: int  # the last one is the label that counts
  classes: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]


URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR10 = _Format(
    archive="cifar-10-binary.tar.gz",
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    folder="cifar-10-batches-bin",
    train={f"data_batch_{i}.bin": 10_000 for i in range(1, 6)},
    test={"test_batch.bin": 10_000},
    label_bytes=1,
    classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
)
CIFAR100 = _Format(
    archive="cifar-100-binary.tar.gz",
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    folder="cifar-100-binary",
    train={"train.bin": 50_000},
    test={"test.bin": 10_000},
    label_bytes=2,
    classes=100,
    mean=(0.5071, 0.4867, 0.4408),
    std=(0.2675, 0.2565, 0.2761),
)


def load_cifar10(
    path: str | pathlib.Path | None = None, *, complete: bool = True
) -> Images:
  """CIFAR-10: 50,000 + 10,000 images of 10 classes, in the official order.

  Args:
    path: the official archive ``cifar-10-binary.tar.gz``, the folder
      ``cifar-10-batches-bin`` of its files, or the folder that this one lies in.
      None downloads the archive once (162 MB, to the user's cache folder) and checks
      its digest.
    complete: whether each file must hold as many images as the official one. False
      takes any number, as for small files in the same format.

  Returns:
    The images as uint8 [n, 32, 32, 3] and the labels; mean and std are those that the
    paper's code normalizes with.

  Raises:
    FileNotFoundError: there is no such path, or a file is missing in it.
    ValueError: a file or archive is damaged, cut off or of another format.
  """
  return _load(CIFAR10, path, complete)


def load_cifar100(
    path: str | pathlib.Path | None = None, *, complete: bool = True
) -> Images:
  """CIFAR-100: 50,000 + 10,000 images with their 100 fine labels.

  As ``load_cifar10``; the archive is ``cifar-100-binary.tar.gz``, its folder
  ``cifar-100-binary``.
  """
  return _load(CIFAR100, path, complete)


def load_cifar10n(
    path: str | pathlib.Path, kind: str, true_labels: np.ndarray | None = None
) -> np.ndarray:
  """CIFAR-10N: what people said the 50,000 training images of CIFAR-10 show.

  Wei et al., "Learning with Noisy Labels Revisited", ICLR 2022. The authors publish
  a pickle, which runs whatever code it holds when it is opened, so it is not read
  here; who trusts it saves one array a kind from it, the order kept::

      human = np.load("CIFAR-10_human.npy", allow_pickle=True).item()
      for key, labels in human.items():  # "worse_label", "random_label1", ...
        np.save(f"cifar10n_{key}.npy", labels.astype(np.uint8))

  Args:
    path: the folder of the files ``cifar10n_<kind>_label.npy`` (and
      ``cifar10n_random_label1.npy`` to 3).
    kind: "worse" (40 % wrong), "aggre" (9 %), "random_label1" to 3 (17 to 18 %), or
      "clean".
    true_labels: the training labels as loaded from CIFAR-10. If given, the file of
      kind "clean" must agree with them, so that the order is sure to be the same.

  Returns:
    The labels, int32 [50000].

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: for an unknown kind, a pickle, or an array of another shape, range or
      order.
  """
  if kind not in CIFAR10N_KINDS:
    raise ValueError(f"kind={kind!r}: must be one of {', '.join(CIFAR10N_KINDS)}.")
  size = 50_000 if true_labels is None else len(true_labels)
  if true_labels is not None:
    clean = _human_labels(pathlib.Path(path), "clean", size)
    different = int(np.sum(clean != true_labels))
    if different:
      raise ValueError(
          f"{path}: {different} of {size} labels of kind 'clean' are not those of the"
          " training images. Both must be in the order of the official files."
      )
  return _human_labels(pathlib.Path(path), kind, size)


def _human_labels(folder: pathlib.Path, kind: str, size: int) -> np.ndarray:
  suffix = "" if kind.startswith("random") else "_label"
  path = folder / f"cifar10n_{kind}{suffix}.npy"
  if not path.is_file():
    raise FileNotFoundError(
        f"{path}: no such file. The folder must hold the labels of CIFAR-10N as one"
        " array a file; the docstring of load_cifar10n says how to get them."
    )
  try:
    labels = np.load(path, allow_pickle=False)
  except (ValueError, EOFError) as error:
    raise ValueError(
        f"{path}: not a plain array of numbers ({error}). A pickle is not opened, for"
        " it can run any code: convert it as the docstring of load_cifar10n shows."
    ) from error
  if labels.shape != (size,) or not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(
        f"{path}: {labels.dtype}{list(labels.shape)}, but {size} integers are expected."
    )
  _check_range(path, labels, CIFAR10.classes)
  return labels.astype(np.int32)


def _load(form: _Format, path: str | pathlib.Path | None, complete: bool) -> Images:
  path = _download(form) if path is None else pathlib.Path(path).expanduser()
  parts = {
      name: _records(form, where, raw, count if complete else None)
      for name, where, raw, count in _files(form, path)
  }
  train, test = (
      Split(*map(np.concatenate, zip(*(parts[name] for name in names), strict=True)))
      for names in (form.train, form.test)
  )
  return Images(train, test, form.classes, form.mean, form.std)


def _download(form: _Format) -> pathlib.Path:
  import pooch

  try:
    return pathlib.Path(
        pooch.retrieve(
            URL + form.archive,
            known_hash=f"sha256:{form.sha256}",
            fname=form.archive,
            path=pooch.os_cache("asam_jax"),
        )
    )
  except (OSError, ValueError) as error:
    raise RuntimeError(
        f"{URL}{form.archive} could not be downloaded ({error}). Get the archive by"
        " other means and pass its path."
    ) from error


def _files(
    form: _Format, path: pathlib.Path
) -> Iterator[tuple[str, str, bytes, int]]:
  """Name, place, content and number of images of each file."""
  expected = form.train | form.test
  if not path.exists():
    raise FileNotFoundError(
        f"{path}: no such file or folder. Pass the archive {form.archive} from"
        f" {URL}cifar.html, the folder {form.folder} in it, or no path to download it."
    )
  if path.is_file():
    yield from _archived_files(form, path)
    return
  folder = path / form.folder if (path / form.folder).is_dir() else path
  missing = [name for name in expected if not (folder / name).is_file()]
  if missing:
    raise FileNotFoundError(
        f"{folder}: {', '.join(missing)} not found. The folder must be {form.folder}"
        f" of the archive {form.archive} (binary version), or the one it lies in."
    )
  for name, count in expected.items():
    yield name, str(folder / name), (folder / name).read_bytes(), count


def _archived_files(
    form: _Format, path: pathlib.Path
) -> Iterator[tuple[str, str, bytes, int]]:
  """Reads the expected members, and no other, without writing anything."""
  expected = form.train | form.test
  advice = f"It must be the whole {form.archive}; get it again from {URL}cifar.html."
  missing = set(expected)
  try:
    with (
        gzip.open(path) as stream,
        tarfile.open(fileobj=stream, mode="r|") as archive,
    ):
      for member in archive:
        folder, _, name = member.name.rpartition("/")
        if folder != form.folder or name not in missing or not member.isfile():
          continue
        missing.remove(name)
        limit = expected[name] * (form.label_bytes + PIXELS)
        content = archive.extractfile(member)
        assert content is not None  # as it is a file
        # One byte more than is right shows a member that is too large.
        yield name, f"{path}:{member.name}", content.read(limit + 1), expected[name]
      while stream.read(2**20):  # the checksum is at the very end
        pass
  except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
    raise ValueError(f"{path}: cannot be read ({error}). {advice}") from error
  if missing:
    raise ValueError(f"{path}: {', '.join(sorted(missing))} not in it. {advice}")


def _records(
    form: _Format, where: str, raw: bytes, count: int | None
) -> tuple[np.ndarray, np.ndarray]:
  """Images [n, 32, 32, 3] and labels [n] of a file."""
  record = form.label_bytes + PIXELS
  if not raw or len(raw) % record or count not in (None, len(raw) // record):
    images = "whole images" if count is None else f"{count} images"
    raise ValueError(
        f"{where}: {len(raw)} bytes, but {images} of {record} bytes each are expected"
        + ("." if count is None else f", {count * record} bytes.")
        + f" The file is cut off, damaged or of another format; get {form.archive}"
        f" again from {URL}cifar.html."
    )
  records = np.frombuffer(raw, np.uint8).reshape(-1, record)
  labels = records[:, form.label_bytes - 1]
  _check_range(where, labels, form.classes)
  planes = records[:, form.label_bytes :].reshape(-1, 3, 32, 32)
  images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
  return images, labels.astype(np.int32)


def _check_range(where: object, labels: np.ndarray, classes: int) -> None:
  if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
    raise ValueError(
        f"{where}: labels from {labels.min()} to {labels.max()}, but they must lie in"
        f" [0, {classes}). The file is damaged or of another data set."
    )
