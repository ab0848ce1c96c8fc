"""Segment sums and means against Python sums."""

import torch

from tandem.functional.segments import segment_mean, segment_sum

BOUNDS = torch.tensor([0, 2, 3, 6])


def test_sum_and_mean():
    x = torch.tensor([1.0, 2.0, -4.0, 10.0, 20.0, 30.0])
    mask = torch.tensor([True, True, False, False, True, True])
    assert segment_sum(x, BOUNDS).tolist() == [3.0, -4.0, 60.0]
    assert segment_mean(x, mask, BOUNDS).tolist() == [1.5, 0.0, 25.0]


def test_bits_do_not_depend_on_the_neighbors():
    x = torch.randn(6, generator=torch.Generator().manual_seed(0)) * 1e3
    together = segment_sum(x, BOUNDS)
    for s, (a, b) in enumerate(zip([0, 2, 3], [2, 3, 6], strict=True)):
        assert segment_sum(x[a:b], torch.tensor([0, b - a]))[0] == together[s]


def test_gradient():
    x = torch.randn(6, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([True, True, False, False, True, True])
    assert torch.autograd.gradcheck(lambda x: segment_mean(x, mask, BOUNDS), (x,))
