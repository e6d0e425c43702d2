"""ImageNet from image folders, through Grain.

``<folder>/train/<class>/*.JPEG`` and ``<folder>/val/<class>/*.JPEG``, as the official
archives are usually unpacked; so any other data set that is laid out like this.
"""

from collections.abc import Iterator
import pathlib
from typing import Any, NamedTuple

from absl import flags
import grain
import numpy as np
from PIL import Image

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SUFFIXES = (".jpeg", ".jpg", ".png")
ENLARGED = 256 / 224  # of the shorter side to the crop's, in evaluation
AREA = (0.08, 1.0)  # of a random crop to the image's
RATIO = (3 / 4, 4 / 3)  # of a random crop's width to its height


class Files(NamedTuple):
  """Images by path, with their labels."""

  paths: list[pathlib.Path]
  labels: np.ndarray  # int32 [n]


class Folders(NamedTuple):
  """A data set; a label is the place of its class among the sorted names."""

  train: Files
  test: Files
  classes: list[str]


class Batch(NamedTuple):
  """Images of one size; those of weight 0 only fill the batch up."""

  images: np.ndarray  # uint8 [n, size, size, 3]
  labels: np.ndarray  # int32 [n]
  weights: np.ndarray  # float32 [n], 1 or 0


def load_folders(
    folder: str | pathlib.Path, train: str = "train", test: str = "val"
) -> Folders:
  """Lists the images; none is opened yet.

  Args:
    folder: holds the folders of the two parts.
    train: the folder of the images to train on.
    test: the folder of those to be judged on.

  Raises:
    FileNotFoundError: a folder is not there or has no images.
    ValueError: the two parts have different classes.
  """
  folder = pathlib.Path(folder).expanduser()
  classes = _classes(folder / train)
  others = _classes(folder / test)
  if classes != others:
    different = sorted(set(classes) ^ set(others))
    raise ValueError(
        f"{folder}: {len(different)} classes are in one of {train} and {test} only"
        f" ({', '.join(different[:3])}, ...). Both must have the same folders."
    )
  return Folders(
      train=_files(folder / train, classes),
      test=_files(folder / test, classes),
      classes=classes,
  )


def _classes(folder: pathlib.Path) -> list[str]:
  if not folder.is_dir():
    raise FileNotFoundError(
        f"{folder}: no such folder. ImageNet must be unpacked as train/<class>/*.JPEG"
        " and val/<class>/*.JPEG."
    )
  classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
  if len(classes) < 2:
    raise FileNotFoundError(
        f"{folder}: has {len(classes)} folders, but one for each class is expected."
    )
  return classes


def _files(folder: pathlib.Path, classes: list[str]) -> Files:
  paths, labels = [], []
  for label, name in enumerate(classes):
    found = sorted(
        path
        for path in (folder / name).iterdir()
        if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    if not found:
      raise FileNotFoundError(
          f"{folder / name}: has no image ({', '.join(SUFFIXES)})."
      )
    paths += found
    labels += [label] * len(found)
  return Files(paths, np.array(labels, np.int32))


def train_batches(
    files: Files,
    batch_size: int,
    seed: int,
    *,
    size: int = 224,
    threads: int = 8,
    workers: int = 0,
) -> grain.DatasetIterator:
  """Random crops without end; epoch follows epoch, each in another order.

  An epoch is ``len(files.paths) // batch_size`` batches; the images that are left over
  are others in each. The iterator's ``get_state`` and ``set_state`` go on with the same
  batches as without the interruption.

  Args:
    files: the images.
    batch_size: at most as many as there are.
    seed: of order and crops.
    size: the crops' height and width.
    threads: that decode, in each process, a batch each.
    workers: processes that decode; 0: this one does. The batches are the same.

  Raises:
    ValueError: for a batch larger than the data, or, later, a file that is no image.
  """
  batches_per_epoch = len(files.paths) // batch_size if batch_size > 0 else 0
  if batches_per_epoch == 0:
    raise ValueError(
        f"batch_size={batch_size}: must be from 1 to {len(files.paths)}, the number of"
        " images."
    )

  def example(index: int, rng: np.random.Generator) -> Batch:
    image = random_crop(_open(files.paths[index]), size, rng)
    return Batch(image, files.labels[index, ...], np.array(1, np.float32))

  images: Any = grain.MapDataset.range(len(files.paths)).seed(seed).shuffle()
  images = images.slice(slice(0, batches_per_epoch * batch_size)).repeat()
  # Whole batches are handed out: they are the same however many decode.
  batches: Any = images.random_map(example).batch(batch_size)
  batches = batches.to_iter_dataset(grain.ReadOptions(threads, threads))
  if workers:
    flags.FLAGS.mark_as_parsed()  # Grain's processes read flags that nobody parsed
    batches = batches.mp_prefetch(grain.MultiprocessingOptions(workers))
  return batches.__iter__()


def eval_batches(
    files: Files, batch_size: int, *, size: int = 224, threads: int = 8
) -> Iterator[Batch]:
  """The center of every image once, in order.

  The shorter side is resized to 256 / 224 of the crop's, as usual. The last batch is
  filled up with black images of weight 0.

  Args:
    files: the images.
    batch_size: of each batch.
    size: the crops' height and width.
    threads: that decode, a batch each.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size}: must be at least 1.")
  count = len(files.paths)

  def example(index: int) -> Batch:
    if index >= count:
      blank = np.zeros((size, size, 3), np.uint8)
      return Batch(blank, np.array(0, np.int32), np.array(0, np.float32))
    image = center_crop(_open(files.paths[index]), size)
    return Batch(image, files.labels[index, ...], np.array(1, np.float32))

  whole = -(-count // batch_size) * batch_size
  batches: Any = grain.MapDataset.range(whole).map(example).batch(batch_size)
  return iter(batches.to_iter_dataset(grain.ReadOptions(threads, threads)))


def _open(path: pathlib.Path) -> Image.Image:
  """In colour, whatever the file has: ImageNet holds grey and CMYK pictures."""
  try:
    with Image.open(path) as image:
      return image.convert("RGB")
  except (OSError, SyntaxError) as error:  # the latter from damaged PNGs
    raise ValueError(
        f"{path}: cannot be read as an image ({error}). Get the file again."
    ) from error


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
  """A part of 8 to 100 % of the area, of ratio 3:4 to 4:3, mirrored or not.

  Args:
    image: in colour.
    size: what the part is resized to.
    rng: of the draw.

  Returns:
    uint8 [size, size, 3].
  """
  left, top, width, height = random_box(image.width, image.height, rng)
  part = image.crop((left, top, left + width, top + height))
  pixels = np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))
  return np.ascontiguousarray(pixels[:, ::-1] if rng.random() < 0.5 else pixels)


def random_box(
    width: int, height: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
  """Left, top, width and height of a random part (Szegedy et al. 2015).

  After ten draws that do not fit, it is the largest central part of such a ratio.
  """
  for _ in range(10):
    area = width * height * rng.uniform(*AREA)
    ratio = np.exp(rng.uniform(*np.log(RATIO)))
    w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
      return int(left), int(top), w, h
  w = min(width, round(height * RATIO[1]))
  h = min(height, round(width / RATIO[0]))
  return (width - w) // 2, (height - h) // 2, w, h


def center_crop(image: Image.Image, size: int) -> np.ndarray:
  """uint8 [size, size, 3], the center of the image after a resize."""
  scale = size * ENLARGED / min(image.size)
  width, height = (max(size, round(side * scale)) for side in image.size)
  resized = image.resize((width, height), Image.Resampling.BILINEAR)
  left, top = (width - size) // 2, (height - size) // 2
  return np.asarray(resized.crop((left, top, left + size, top + size)))
