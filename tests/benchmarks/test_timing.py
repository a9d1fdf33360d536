from __future__ import annotations

from benchmarks.timing import TIMINGS, Timing, measure


def test_suggestions_are_timed_from_as_many_observations_on_as_are_asked_for() -> None:
    timing = measure("random", observations=200, suggestions=3, stock=0)
    assert len(timing.suggestions) == 3
    assert timing.observations[0] == 200
    assert 200 < timing.observations[1] <= 200 + 2 * 15  # at most all 15 levels of two trials
    assert "random: median" in timing.summary()
    assert "stock" not in timing.summary()
    assert TIMINGS.validate_json(TIMINGS.dump_json((timing,))) == (timing,)


def test_the_summary_gives_percentiles() -> None:
    timing = Timing(
        strategy="jfhpo", commit="x", suggestions=tuple(float(i) for i in range(101)), observations=(200, 400),
        stock=(10.0, 30.0, 20.0),
    )  # fmt: skip
    assert "jfhpo: median 50.00 s, 95th percentile 95.00 s, longest 100.00 s" in timing.summary()
    assert "20.0 s (median of 3)" in timing.summary()
