"""How evenly routers spread tokens, by hand, where not all of them spread as many."""

import pytest
import torch

from tandem.functional.balance import bias_step, load_violation

LOADS = torch.tensor([[4, 0, 2], [1, 2, 0]])
"""Of two routers, the second of which picked an expert that is not there for half of its tokens: means of 2 and 1."""


def test_biases_step_towards_each_routers_own_mean():
    assert torch.equal(bias_step(LOADS, 0.5), torch.tensor([[-0.5, 0.5, 0.0], [0.0, -0.5, 0.5]]))


def test_the_violation_is_that_of_each_routers_busiest_expert():
    assert load_violation(torch.tensor([[6, 0, 0], [1, 2, 0]])) == pytest.approx((6 / 2 - 1 + 2 / 1 - 1) / 2)
    assert load_violation(torch.full((2, 3), 7)) == 0
