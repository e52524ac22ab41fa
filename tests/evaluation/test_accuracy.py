from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.errors import ConfigError
from fomoe.evaluation.accuracy import binomial_p, mcnemar


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_p_value_is_the_binomial_sum(lost: int, won: int) -> None:
    n = lost + won
    tail = sum(Fraction(math.comb(n, i), 2**n) for i in range(min(lost, won) + 1))
    assert binomial_p(lost, won) == float(min(Fraction(1), 2 * tail))


def test_the_p_value_holds_for_thousands_of_pairs() -> None:
    # The normal approximation with continuity correction, 4,200 against 3,800: z = 4.461.
    expected = math.erfc((abs(4200 - 3800) - 1) / math.sqrt(8000) / math.sqrt(2))
    assert binomial_p(4200, 3800) == pytest.approx(expected, rel=0.01)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_counts_and_error_are_those_of_the_paired_difference(
    pairs: list[tuple[bool, bool]],
) -> None:
    exact, policy = np.array(pairs).T
    result = mcnemar(exact, policy)
    change = policy.astype(float) - exact
    assert result.difference == pytest.approx(change.mean(), abs=1e-12)
    assert result.standard_error == pytest.approx(change.std() / math.sqrt(len(pairs)), abs=1e-9)
    assert result.won - result.lost == change.sum()
    assert (result.exact, result.policy) == (exact.mean(), policy.mean())


def test_answers_to_other_questions_are_refused() -> None:
    with pytest.raises(ConfigError, match="same questions"):
        mcnemar([True], [True, False])
    with pytest.raises(ConfigError, match="same questions"):
        mcnemar([], [])
