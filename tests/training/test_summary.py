"""Numbers over seeds: spreads, and paired differences with Student's intervals."""

import pytest

from czsl_heads.training.summary import paired_difference, spread


def test_a_spread_is_mean_and_sample_deviation() -> None:
    assert spread([0.1, 0.2, 0.6]) == {"mean": pytest.approx(0.3), "std": pytest.approx(0.07**0.5)}
    assert spread([0.4]) == {"mean": 0.4, "std": None}
    assert spread([0.4, None]) == {"mean": None, "std": None}


def test_a_paired_difference_has_the_interval_of_a_table() -> None:
    # Differences 0.1, 0.2, 0.6: mean 0.3, standard error sqrt(0.07 / 3); t(0.975, 2) = 4.302653 (any table)
    found = paired_difference([0.5, 0.5, 0.9], [0.4, 0.3, 0.3])
    assert found == {"mean": pytest.approx(0.3), "half_width": pytest.approx(4.302653 * (0.07 / 3) ** 0.5, rel=1e-6)}


def test_equal_shifts_have_no_width_although_seeds_differ() -> None:
    found = paired_difference([0.25, 0.5, 0.875], [0.125, 0.375, 0.75])
    assert found == {"mean": 0.125, "half_width": 0.0}


def test_one_seed_has_no_interval_and_a_missing_number_no_difference() -> None:
    assert paired_difference([0.5], [0.25]) == {"mean": 0.25, "half_width": None}
    assert paired_difference([0.5, None], [0.25, 0.5]) == {"mean": None, "half_width": None}
