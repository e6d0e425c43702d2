"""A part of the cases, as on other versions of JAX."""

import itertools

import pytest

from tests.conftest import drawn

GRID = [
    f"test_a.py::test_grid[{p}-{t}]" for p, t in itertools.product(range(30), "xyz")
]
ALONE = ["test_a.py::test_alone", "test_a.py::A::test_method", "test_b.py::test_1[x]"]


def test_each_test_is_in_each_part():
  for part in range(3):
    assert set(ALONE) <= drawn(ALONE + GRID, part, 3)


def test_the_parts_are_apart_and_make_the_whole():
  parts = [drawn(GRID, part, 3) for part in range(3)]
  assert sum(map(len, parts)) == len(GRID)
  assert set().union(*parts) == set(GRID)
  assert all(15 < len(part) < 45 for part in parts)


@pytest.mark.parametrize("column", "xyz")
def test_no_part_is_one_column_of_a_grid(column):
  for part in range(3):
    assert any(f"-{column}]" in name for name in drawn(GRID, part, 3))


def test_without_a_wish_all_are_run():
  assert drawn(ALONE + GRID, 0, 1) == {*ALONE, *GRID}
