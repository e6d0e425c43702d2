"""Records: the whole configuration is the key, and files are replaced as a whole."""

import os

import pytest

from examples import records

ROWS = [
    {"config": {"method": "sgd", "epochs": 40}, "accuracy": [0.5]},
    {"config": {"method": "sgd", "epochs": 2}, "accuracy": [0.1]},
]


def test_only_the_very_configuration_is_found():
  assert records.find(ROWS, {"epochs": 2, "method": "sgd"}) is ROWS[1]
  assert records.find(ROWS, {"epochs": 3, "method": "sgd"}) is None
  assert records.find(ROWS, {"method": "sgd"}) is None
  assert records.find(ROWS, {"epochs": 2, "method": "sgd", "lr": 0.1}) is None
  again = [*ROWS, {**ROWS[1], "accuracy": [0.2]}]
  assert records.find(again, ROWS[1]["config"]) is again[-1]  # the latest


def test_keys_survive_the_file(tmp_path):
  config = {"rhos": (0.1, 0.2), "p": float("inf"), "noise": 0.0}
  path = tmp_path / "a" / "b.jsonl"
  records.append(path, {"config": config})
  records.append(path, *ROWS)
  rows = records.read(path)
  assert rows[1:] == ROWS
  assert records.find(rows, config) is rows[0]
  assert records.read(tmp_path / "nothing.jsonl") == []


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_an_interrupted_replacement_leaves_the_old_file(tmp_path, monkeypatch, where):
  path = tmp_path / "rows.jsonl"
  records.write(path, ROWS)
  before = path.read_bytes()

  def interrupt(*args):
    raise KeyboardInterrupt

  if where == "write":
    monkeypatch.setattr(records.json, "dumps", interrupt)
  else:
    monkeypatch.setattr(os, where, interrupt)
  with pytest.raises(KeyboardInterrupt):
    records.append(path, {"config": {}})
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]  # nothing half-written is left


def test_replaced_files_are_as_readable_as_others(tmp_path):
  (tmp_path / "plain").write_text("x")
  records.replace(tmp_path / "replaced", "x")
  modes = [(tmp_path / name).stat().st_mode for name in ("plain", "replaced")]
  assert modes[0] == modes[1]


def test_a_broken_line_is_named(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"config": {}}\n{"config": {"epo\n')
  with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: not JSON"):
    records.read(path)


def test_environment():
  row = records.environment(("jax", "optax"))
  assert set(row) == {"date", "device", "cores", "machine", "versions"}
  assert set(row["versions"]) == {"asam_jax", "python", "jax", "optax"}
