"""Segment sums against Python sums."""

import torch

from tandem.functional.segments import segment_sum

BOUNDS = torch.tensor([0, 2, 3, 6])


def test_sum():
    x = torch.tensor([1.0, 2.0, -4.0, 10.0, 20.0, 30.0])
    assert segment_sum(x, BOUNDS).tolist() == [3.0, -4.0, 60.0]


def test_bits_do_not_depend_on_the_neighbors():
    x = torch.randn(6, generator=torch.Generator().manual_seed(0)) * 1e3
    together = segment_sum(x, BOUNDS)
    for s, (a, b) in enumerate(zip([0, 2, 3], [2, 3, 6], strict=True)):
        assert segment_sum(x[a:b], torch.tensor([0, b - a]))[0] == together[s]


def test_gradient():
    x = torch.randn(6, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda x: segment_sum(x, BOUNDS), (x,))
