"""Tiny data sets in the official binary formats."""

import io
import tarfile

import numpy as np

from examples.paper import images


def records(form, count, seed):
  """Random records of a file, as uint8 [count, bytes of a record]."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, form.classes, (count, form.label_bytes))
  pixels = rng.integers(0, 256, (count, images.PIXELS))
  return np.concatenate([labels, pixels], 1).astype(np.uint8)


def files(form, count=4):
  """The content of each file: ``count`` images, others in each file."""
  return {
      name: records(form, count, seed)
      for seed, name in enumerate(form.train | form.test)
  }


def write_folder(form, parent, count=4):
  """Writes the folder of files into a parent folder, and returns their content."""
  folder = parent / form.folder
  folder.mkdir(parents=True)
  content = files(form, count)
  for name, data in content.items():
    (folder / name).write_bytes(data.tobytes())
  return content


def write_archive(form, path, count=4, extra=()):
  """Writes the archive; ``extra`` are further members, (TarInfo, content)."""
  content = files(form, count)
  with tarfile.open(path, "w:gz") as archive:
    for name, data in content.items():
      member = tarfile.TarInfo(f"{form.folder}/{name}")
      member.size = data.nbytes
      archive.addfile(member, io.BytesIO(data.tobytes()))
    for member, data in extra:
      member.size = len(data)
      archive.addfile(member, io.BytesIO(data))
  return content
