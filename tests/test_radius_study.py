"""The radius study and the choice of the rule's defaults, on a few cells."""

import math

import numpy as np
import pytest

from examples import radius_choice
from examples import radius_report
from examples import radius_study
from examples import records


@pytest.fixture
def one_cell(monkeypatch):
  """The cell with wrong labels, elementwise T and p = 2."""
  monkeypatch.setattr(radius_study, "FIRST_RADIUS", {("elementwise", 2): 0.25})


@pytest.mark.usefixtures("one_cell")
def test_the_study_does_what_is_missing_and_reports(tmp_path, capsys):
  arguments = ["--networks", "mlp", "--seeds", "2", "--tuning-seeds", "1", "--epochs",
               "1", "--quiet", "--results", str(tmp_path)]
  radius_study.main(arguments)
  path = tmp_path / radius_study.RECORDS
  rows = records.read(path)
  # Two noise levels: plain, and sweep and targets with and without validation.
  assert len(rows) == 2 * 5
  for row in rows:
    count = 1 if row["config"]["rule"] == "plain" else (
        7 if row["config"]["rule"] == "fixed" else 3)
    assert np.shape(row["accuracy"]) == (count, len(row["config"]["seeds"]))
    assert np.all((np.array(row["accuracy"]) > 0) & (np.array(row["accuracy"]) < 1))
  printed = capsys.readouterr().out
  assert "MLP, 40 % wrong, elementwise, p = 2" in printed
  assert (tmp_path / "radius.md").read_text("utf-8") == printed[:-1]
  assert (tmp_path / "radius.png").stat().st_size > 1000
  before = path.read_bytes()
  radius_study.main(arguments)
  assert path.read_bytes() == before
  radius_study.main([*arguments, "--rate", "0.2"])  # the rule's rows alone are others
  assert len(records.read(path)) == 10 + 4
  radius_study.main([*arguments, "--report"])
  assert capsys.readouterr().out.endswith(printed)


def test_cells_have_the_filters_of_convolutions_alone():
  cells = radius_study.cells(["mlp", "cnn"])
  filters = {cell.network for cell in cells if cell.normalization == "filterwise"}
  assert filters == {"cnn"}
  assert len(cells) == 2 * 3 + 2 * 4
  assert all(np.allclose(np.diff(np.log2(cell.radii)), 1) for cell in cells)
  assert {cell.p for cell in cells} == {2, math.inf}


def result(cell, plain, tuned, auto):
  return radius_report.Result(cell, plain, [1.0], [tuned], 0, [0.7, 0.8], auto, 1, 5)


def test_the_verdict_is_of_the_cells_that_chose_nothing():
  chosen = result((radius_report.CHOSEN_ON, 0.4, "none", "2"), (50, 1), (90, 1),
                  [(50, 1), (50, 1)])
  judged = [
      result(("cnn", 0.4, "none", "2"), (50, 1), (90, 1), [(70, 1), (90, 1)]),
      result(("cnn", 0.0, "none", "2"), (97, 1), (98, 1), [(95, 1), (97, 1)]),
  ]
  words = radius_report.verdict([chosen, *judged])
  # (70 - 50) / 40 in the one large cell; (20 - 2) / 41 of the sum.
  assert "c = 0.7: 50 % of the tuned" in words
  assert "mean of the 1 cells" in words
  assert "44 % of the sum of gains over all 2" in words
  assert "worse than plain by more than the error: CNN, clean" in words
  assert "Best of the three on the validation split: 100 %" in words


def a_row(rule, numbers, accuracy, validation):
  config = dict(network="transformer", noise=0.4, normalization="none", p="2",
                rule=rule, numbers=numbers, validation=validation, epochs=50,
                batch_size=64)
  return dict(config=config, accuracy=[[a, a] for a in accuracy], device="cpu",
              cores=1 + validation, date="today", versions={"jax": "0.10"})


def test_radii_that_were_added_do_not_hide_what_seven_gave(tmp_path):
  """The smaller ones look better by validation here, and are worse."""
  radii = [2.0**k for k in range(8)]
  rows = [a_row("plain", [0.0], [0.5], False)]
  for validation in (False, True):
    accuracy = [0.6, 0.9, *[0.55] * 6]
    if validation:
      accuracy[0] = 0.95
    rows += [a_row("fixed", radii[1:], accuracy[1:], validation),
             a_row("fixed", radii[:1], accuracy[:1], validation),
             a_row("auto", [0.7, 0.8], [0.5, 0.7], validation)]
  radius_report.write(tmp_path, rows, 0.05)
  whole, seven = (tmp_path / "radius.md").read_text("utf-8").split("With seven radii")
  assert "60.0 ± 0.0 (1)" in whole
  assert "cpu, 1 and 2 cores, today" in whole
  assert "c = 0.8: 200 % of the tuned" in whole
  assert "c = 0.8: 50 % of the tuned" in seven
  radius_report.write(tmp_path, [
      one for one in rows if one["config"]["numbers"] != radii[:1]], 0.05)
  assert "With seven" not in (tmp_path / "radius.md").read_text("utf-8")


@pytest.mark.usefixtures("one_cell")
def test_the_choice_ranks_every_setting(tmp_path, capsys):
  arguments = ["--networks", "mlp", "--seeds", "1", "--epochs", "1", "--results",
               str(tmp_path)]
  radius_choice.main(arguments)
  rows = records.read(tmp_path / radius_choice.RECORDS)
  assert [np.shape(row["accuracy"]) for row in rows] == (
      [(len(radius_choice.SETTINGS), 1)] * 2
  )
  lines = (tmp_path / "choice.md").read_text("utf-8").splitlines()[2:]
  behind = [float(line.split("|")[4]) for line in lines]
  assert behind == sorted(behind)
  assert len(behind) == len(radius_choice.SETTINGS)
  best = np.argmin(np.mean(
      [np.max(row["accuracy"]) - np.mean(row["accuracy"], 1) for row in rows], 0
  ))
  assert [float(x) for x in lines[0].split("|")[1:4]] == list(
      radius_choice.SETTINGS[best]
  )
  assert capsys.readouterr().out.strip() == "\n".join(
      (tmp_path / "choice.md").read_text("utf-8").splitlines()
  )
