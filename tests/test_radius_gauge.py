"""The gauge's example: a tiny run, and that its page has the committed numbers."""

import importlib
import pathlib
import re

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the examples need the extra 'examples'")

gauge = importlib.import_module("examples.radius_gauge")
report = importlib.import_module("examples.radius_gauge_report")
ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs/radius_gauge.md").read_text()
ROWS = gauge.records.read(ROOT / "results/radius_gauge/gauge.jsonl")


def test_a_tiny_run(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  command = ["--networks", "mlp", "--noises", "0.4", "--rhos", "0", "0.5", "64",
             "--shown", "0.5", "64", "--seeds", "1", "--epochs", "3"]
  table = gauge.main(command)
  folder = tmp_path / "runs/radius_gauge"
  assert {path.name for path in tmp_path.iterdir()} == {"runs"}
  assert {path.name for path in folder.iterdir()} == {
      "gauge.jsonl", "gauge.md", "gauge.png"}
  (row,) = gauge.records.read(folder / "gauge.jsonl")
  for entry in ("accuracy", *gauge.ENTRIES):
    assert np.shape(row[entry]) == (3, 1, 3)
  assert np.min(row["accuracy"][1]) > np.max(row["accuracy"][2])
  assert np.min(row["cosine"][0]) > 0.9999  # both gradients are the same at rho = 0
  np.testing.assert_allclose(row["linearity"][0], 1)
  assert row["verdict"][2] == ["collapsed"]
  assert "MLP, 40 % wrong labels" in table
  assert table in capsys.readouterr().out
  assert (folder / "gauge.md").read_text() == table

  monkeypatch.setattr(gauge, "train", None)  # nothing is trained again
  assert gauge.main(command) == gauge.main([*command, "--report"]) == table
  with pytest.raises(SystemExit, match="no records of this configuration"):
    gauge.main([*command, "--report", "--epochs", "4"])


def test_bad_options(capsys):
  for option, message in (
      (["--shown", "0.3"], "--shown 0.3: is not among --rhos"),
      (["--seeds", "0"], "--seeds: 0: must be at least 1"),
      (["--report", "--results", "nowhere"], "--report: no file nowhere/gauge.jsonl"),
  ):
    with pytest.raises(SystemExit):
      gauge.main(option)
    assert message in capsys.readouterr().err


def test_the_committed_records_are_those_of_the_default():
  reader = gauge.parser()
  wanted = gauge.configs(reader.parse_args([]))
  found = [gauge.records.find(ROWS, config) for config in wanted]
  assert None not in found
  table = report.table(found)
  assert (ROOT / "results/radius_gauge/gauge.md").read_text() == table


def test_the_code_of_the_page_gives_the_line_below_it():
  (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
  names = {}
  exec(compile(code, "radius_gauge.md", "exec"), names)
  said = re.search(r"^    (radius .*)$", PAGE, re.MULTILINE)[1]
  # The last digits are the machine's.
  numbers = lambda text: [float(x) for x in re.findall(r"\d+\.\d+", text)]  # noqa: E731
  np.testing.assert_allclose(numbers(str(names["verdict"])), numbers(said), rtol=0.05)
  assert str(names["verdict"]).split(":")[0] == said.split(":")[0]


def test_the_page_has_the_tables_of_the_results():
  table = (ROOT / "results/radius_gauge/gauge.md").read_text()
  for part in re.findall(r"(?:^\|.*\n)+", table, re.M):
    assert part in PAGE
  assert re.search(r"The same in \d+ of \d+ runs\.", table)[0] in PAGE


def test_the_thresholds_of_the_picture_are_those_of_the_verdict():
  text = (ROOT / "asam_jax/_verdict.py").read_text()
  assert "_TOO_SMALL = 0.93" in text
  assert "_TOO_LARGE = 0.70" in text
  assert "axhspan(0.70, 0.93" in (ROOT / "examples/radius_gauge_report.py").read_text()
