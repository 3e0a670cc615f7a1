import pytest

from modtrain.common.durations import duration_problems, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("30m", 1800), ("1h30m", 5400), ("2d", 172800), ("1d2h3m4s", 93784), ("90s", 90)),
        *(("00:30:00", 1800), ("100:00:00", 360000), ("1:02:03:04", 93784), ("1-02:03:04", 93784)),
        *(("", None), ("0m", None), ("30", None), ("30:00", None), ("m30", None), ("-5m", None)),
        *(("30m1h", None), ("1.5h", None), ("00:00:00", None), ("٣m", None), ("5 m", None)),
    ],
)
def test_a_duration(text, seconds):
    assert seconds_of(text) == seconds


def test_a_number_without_a_unit_is_asked_for_one():
    (problem,) = duration_problems("max_time", "30")
    assert problem.remedy == "write 30s, or 30m for minutes"
    assert duration_problems("max_time", "soon")[0].remedy == "write 30m, 1h30m, 2d or 00:30:00"
