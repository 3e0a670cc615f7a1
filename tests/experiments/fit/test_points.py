"""Points are read from CSV and lists, and what is wrong with them is named by row and column."""

import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modtrain.common.errors import DataError
from modtrain.experiments.fit.config import FitConfig
from modtrain.experiments.fit.points import make_points, read_points

HEAD = "loss,N,D"
ROWS = ["3.1,1e6,2e7", "2.9,2e6,2e7"]
SIZES = st.floats(1, 1e15)


def read(tmp_path, *lines, **settings):
    path = tmp_path / "points.csv"
    path.write_text("\n".join(lines))
    return read_points(path, FitConfig(**settings))


def refused(tmp_path, *lines, **settings) -> str:
    with pytest.raises(DataError) as error:
        read(tmp_path, *lines, **settings)
    return str(error.value)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.tuples(st.floats(0.1, 12), SIZES, SIZES), min_size=1), st.sampled_from("NDC"))
def test_a_missing_quantity_is_by_6nd(rows, missing):
    loss, *sizes = map(list, zip(*rows, strict=True))
    given_names = [name for name in "NDC" if name != missing]
    points = make_points(loss, **dict(zip(given_names, sizes, strict=True)))
    assert points.derived == missing
    np.testing.assert_allclose(points.C_P, 6 * points.N_P * points.D_P, rtol=1e-12)
    for name, values in zip(given_names, sizes, strict=True):
        assert getattr(points, f"{name}_P").tolist() == values


def test_all_three_stay_as_they_are_given():
    points = make_points([3.0, 2.0], N=[10, 20], D=[5, 6], C=[1, 2])
    assert points.derived == ""
    assert points.C_P.tolist() == [1, 2]


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.floats(0.1, 12), SIZES, SIZES, st.sampled_from(["dense", 'a "b", c', "mod $x$"])
        ),
        min_size=1,
    )
)
def test_a_file_gives_the_points_of_the_lists(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "points.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(
            [["noted", "loss", "N", "C", "family"], *[["", *r] for r in rows]]
        )
    loss, N, C, family = map(list, zip(*rows, strict=True))
    read_back, made = read_points(path, FitConfig()), make_points(loss, N=N, C=C, family=family)
    assert read_back.families == made.families
    assert read_back.rows == tuple(range(2, len(rows) + 2))
    for name in ("loss_P", "N_P", "D_P", "C_P"):
        assert getattr(read_back, name).tolist() == getattr(made, name).tolist()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("nan", "is not finite"),
        ("inf", "is not finite"),
        ("1e999", "is not finite"),
        ("0", "is not above 0"),
        ("-2", "is not above 0"),
        ("1e-999", "is not above 0"),
        ("", "is not a number"),
        ("2;5", "is not a number"),
        ("\x1b[2J", "is not a number"),
    ],
)
@pytest.mark.parametrize("column", ["loss", "N", "D"])
def test_a_wrong_value_is_named(tmp_path, column, value, reason):
    cells = dict(zip(HEAD.split(","), ROWS[1].split(","), strict=True)) | {column: value}
    message = refused(tmp_path, HEAD, ROWS[0], "", ",".join(cells.values()))
    # Row 3 is blank, and counts.
    assert f"row 4, column {column}" in message
    assert reason in message
    assert "remedy:" in message
    assert "\x1b" not in message


def test_all_problems_are_listed_at_once_and_no_screenful(tmp_path):
    message = refused(tmp_path, HEAD, "x,0,1", "1,nan,-1", *["-1,1,1"] * 30)
    assert "34 problems" in message
    assert message.count("remedy:") == 20
    assert "and 14 more" in message


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], "column loss: is missing"),
        (["Loss,N,D", *ROWS], "column loss: is missing"),
        (["loss,N", "3,1"], "columns N, D, C: fewer than two"),
        (["loss,n,D", *ROWS], "as they are: loss, n, D"),
        (["loss,N,D,N", "3,1,2,1"], "column N: is there twice"),
        ([HEAD], "has no points"),
        ([HEAD, "3,1"], "row 2: has 2 cells"),
        ([HEAD, ROWS[0], "3,1,2,4"], "row 3: has 4 cells"),
        (["loss,N,D,family", "3,1,2,"], "row 2, column family"),
        (["loss,N,D,family", "3,1,2,a\x1bb"], "row 2, column family"),
        (["loss,N,D", "3,1e200,1e200"], "row 2, C=inf"),
        (["loss,N,D", '3,1,"2'], "is not CSV"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, lines, expected):
    message = refused(tmp_path, *lines)
    assert expected in message
    assert "remedy:" in message


def test_columns_may_have_other_names(tmp_path):
    lines = ["final,params,N,D", "3,7,1,2", "2,8,1,2"]
    points = read(tmp_path, *lines, columns={"loss": "final", "N": "params"})
    assert points.N_P.tolist() == [7, 8]
    message = refused(tmp_path, *lines, columns={"loss": "Final"})
    assert "column Final: is missing" in message
    assert "final, params, N, D" in message


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "points.csv"
    path.write_bytes(b"loss,N,D\n3,1,\xff\n")
    with pytest.raises(DataError, match="is not CSV"):
        read_points(path, FitConfig())


def test_a_file_over_the_limit_is_not_read_whole(tmp_path):
    path = tmp_path / "points.csv"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match="larger than 1,000 bytes"):
        read_points(path, FitConfig(max_bytes=1_000))
    assert len(read(tmp_path, HEAD, *ROWS, max_bytes=len("\n".join([HEAD, *ROWS])))) == 2


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(DataError, match=r"loss: 2, N: 1, D: 1"):
        make_points([3.0, 2.0], N=[1], D=[1])


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0]), min_size=1), st.integers(0, 12))
def test_the_highest_losses_are_left_out(losses, count):
    points = make_points(losses, N=[1] * len(losses), D=[1] * len(losses))
    kept = points.without_highest(count)
    assert sorted(kept.loss_P) == sorted(losses)[: max(len(losses) - count, 0)]
    assert list(kept.rows) == sorted(kept.rows)
