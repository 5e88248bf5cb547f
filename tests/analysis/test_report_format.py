"""Numbers as people read them, and axes whose ticks suit tiny ladders and real ones."""

import math

import pytest

from analysis.report import format as fmt


@pytest.mark.parametrize(
    ("value", "text"),
    [(512, "512"), (85_300, "85.3k"), (999_900, "1.00M"), (123_456_789, "123M"), (3.81e9, "3.81B"), (1.2e12, "1.20T"), (None, "–")],
)
def test_counts_use_the_fields_units(value, text):
    assert fmt.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1e13, "10¹³"), (1.6e13, "1.6×10¹³"), (2.154e18, "2.15×10¹⁸"), (4e-7, "4×10⁻⁷"), (math.nan, "–"), (0, "0")]
)
def test_scientific_numbers_are_written_with_superscripts(value, text):
    assert fmt.scientific(value) == text


def test_small_and_large_numbers_keep_their_significant_digits():
    assert [fmt.significant(v) for v in (0.0143, 1.6, 12.34, 1234.5, 0.00001234)] == [
        "0.0143",
        "1.60",
        "12.3",
        "1,230",
        "1.23×10⁻⁵",
    ]


def test_percent_and_interval():
    assert fmt.percent(0.0123) == "1.2%"
    assert fmt.percent(-0.2, signed=True) == "−20%"
    assert fmt.percent(0.003, signed=True) == "+0.30%"
    assert fmt.interval(10.0, 14.0, fmt.significant) == "10.0 to 14.0"
    assert fmt.interval(None, 14.0, fmt.significant) == "no interval"


def test_durations_pick_the_unit():
    assert [fmt.duration(v) for v in (0.42, 12, 90, 7200, 86400 * 3)] == ["0.42 s", "12 s", "1.5 min", "2.0 h", "3.0 days"]


@pytest.mark.parametrize(
    ("low", "high"), [(2e4, 5e5), (4e11, 1.6e13), (1e18, 1e21), (1e8, 4e8), (10.2, 13.9), (0.021, 0.029), (5, 5e9)]
)
def test_log_ticks_are_few_inside_and_increasing(low, high):
    positions, labels = fmt.log_ticks(low, high, fmt.tick_plain, most=6)
    assert 2 <= len(positions) <= 7
    assert all(low * 0.99 <= p <= high * 1.01 for p in positions)
    assert positions == sorted(positions)
    assert len(set(labels)) == len(labels), labels


def test_ticks_of_a_decade_of_parameters_read_well():
    assert fmt.log_ticks(2e4, 5e5, fmt.tick_count)[1] == ["20k", "50k", "100k", "200k", "500k"]


def test_words():
    assert fmt.join(["a", "b", "c"]) == "a, b and c"
    assert fmt.plural(1, "run") == "1 run"
    assert fmt.plural(1200, "run") == "1,200 runs"
