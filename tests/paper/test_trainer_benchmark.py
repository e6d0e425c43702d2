"""The trainer's benchmark runs, and reports each case."""

import json

import pytest

from benchmarks import trainer
from examples.paper import images
from tests.paper import cifar_files
from tests.paper.tiny import tiny  # noqa: F401


@pytest.mark.usefixtures("tiny")
def test_it_measures_bare_synthetic_and_real_steps(tmp_path, monkeypatch, capsys):
  cifar_files.write_folder(images.CIFAR10, tmp_path)
  load = images.load_cifar10
  monkeypatch.setattr(images, "load_cifar10", lambda path: load(path, complete=False))
  output = tmp_path / "trainer.jsonl"
  trainer.main(["--data", str(tmp_path), "--batch-size", "4", "--steps", "2",
                "--rounds", "2", "--output", str(output)])
  rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
  assert [row["case"] for row in rows] == [
      f"{method} {kind}" for method in ("plain", "asam")
      for kind in ("bare", "synthetic", "real")
  ]
  assert all(row["milliseconds"][1] > 0 for row in rows)
  assert rows[0]["to_bare"] == [1.0, 1.0, 1.0]
  assert "to_synthetic" in rows[2]
  assert str(tmp_path) not in output.read_text("utf-8")
  assert "asam real" in capsys.readouterr().out
