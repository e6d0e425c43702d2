"""Finished networks are measured from their checkpoints, and put into the table."""

import dataclasses
import json

import numpy as np
import pytest

from asam_jax import sharpness
from examples.paper import correlation
from examples.paper import plans
from examples.paper import run
from tests.paper.tiny import CONFIG
from tests.paper.tiny import tiny  # noqa: F401

replace = dataclasses.replace


@pytest.mark.usefixtures("tiny")
def test_networks_are_measured_from_their_checkpoints(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  entries = [
      plans.Entry(replace(CONFIG, table="correlation", epochs=1, learning_rate=rate),
                  (0,))
      for rate in (0.01, 0.02, 0.05)
  ]
  monkeypatch.setattr(plans, "of_table", lambda table, seeds: entries)
  run.main(["correlation", "--results", str(tmp_path), "--progress", "False",
            "--keep-checkpoints", "True"])
  monkeypatch.setattr(sharpness, "rank_correlation", _no_bootstrap)
  correlation.main(["--results", str(tmp_path), "--least-accuracy", "0",
                    "--images", "32", "--batch", "16", "--steps", "2"])
  lines = (tmp_path / "correlation_measures.json").read_text("utf-8").splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row["learning_rate"] for row in rows] == [0.01, 0.02, 0.05]
  for row in rows:
    assert set(row["sharpness"]) == set(correlation.MEASURES)
    assert np.all(np.array(list(row["sharpness"].values())) >= 0)
    # 64 training images and 130 to test on.
    right = 64 * row["train_accuracy"]
    assert right == pytest.approx(round(right))
  printed = capsys.readouterr().out
  assert "3 of 3 networks" in printed
  assert "Kendall τ" in printed
  assert "+0.636" in printed  # as published


_correlate = sharpness.rank_correlation


def _no_bootstrap(*args, **options):
  return _correlate(*args, **{**options, "resamples": 2})
