"""Loading weights by copies that an earlier load has made: what vLLM does from the third push on (on GPUs)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tandem.engines.vllm.checksums import Shard, Wholes
from tandem.engines.vllm.copies import Copies, NotedCopies
from tandem.engines.vllm.loading import Sums, Target, find_summed, play_copies
from tandem.engines.vllm.regions import Piece, Region, piece_of
from tandem.sync.checksum import ParameterSums
from tandem.sync.plan import Plan, TensorSpec
from tandem.types import Held


class Fused(nn.Module):
    """Two projections in one parameter, and a norm, each filled by a loader as vLLM's are."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Parameter(torch.zeros(6, 4))
        self.norm = nn.Parameter(torch.zeros(4))

    def load_weights(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        targets = {"q": self.qk.data.narrow(0, 0, 4), "k": self.qk.data.narrow(0, 4, 2), "norm": self.norm.data}
        for name, tensor in tensors:
            targets[name].copy_(tensor.t() if name == "k" else tensor)


def bucket_in(buffer: torch.Tensor, seed: int) -> list[tuple[str, torch.Tensor]]:
    buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(seed)))
    return [("q", buffer[:16].view(4, 4)), ("k", buffer[16:24].view(4, 2)), ("norm", buffer[24:28])]


def record(model: Fused, bucket: list[tuple[str, torch.Tensor]]) -> Copies:
    copies = Copies()
    with NotedCopies(dict(model.named_parameters())) as noted:
        model.load_weights(bucket)
    copies.add(bucket, noted.made)
    return copies


def test_played_copies_load_what_lies_in_the_buffer_now():
    model, buffer = Fused(), torch.zeros(28)
    copies = record(model, bucket_in(buffer, 1))
    assert copies.covers({"qk": 24, "norm": 4})
    bucket = bucket_in(buffer, 2)
    copies.play(0)
    expected = Fused()
    expected.load_weights([(name, tensor.clone()) for name, tensor in bucket])
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
        assert parameter.abs().min() > 0


@pytest.mark.parametrize("overlap", [True, False])
def test_every_push_that_is_played_is_summed_where_it_lies_then(overlap):
    """Three pushes by the same copies, of which the sums are those of the tensors sent, until a parameter moves."""
    model, buffer = Fused(), torch.zeros(28)
    copies = record(model, bucket_in(buffer, 1))
    plan = Plan((TensorSpec("q", (4, 4), "float32"), TensorSpec("norm", (4,), "float32")))
    rows, norm = Piece("q", Region(1, 16, 0, 16), 0, 16), Piece("norm", Region(1, 4, 0, 4), 0, 4)
    pieces = {"qk": Target((6, 4), torch.float32, [rows], 16), "norm": Target((4,), torch.float32, [norm], 4)}
    sums = Sums(find_summed(model), pieces, plan, torch.device("cpu"), overlap)
    parts = [shard.part for shard in sums.shards]
    for seed in (2, 3, 4):
        sent = bucket_in(buffer, seed)
        play_copies(copies, [sent], sums)
        truth = ParameterSums(dict(sent), plan, torch.device("cpu")).now()
        assert dict(zip(parts, sums.result(), strict=True)) == truth
    # The copies go on filling the memory that the model no longer computes with.
    model.qk.data = model.qk.data.clone()
    sent = bucket_in(buffer, 5)
    play_copies(copies, [sent], sums)
    truth = ParameterSums(dict(sent), plan, torch.device("cpu")).now()
    found = dict(zip(parts, sums.result(), strict=True))
    assert found["norm"] == truth["norm"]
    assert found["q"] != truth["q"]


def test_a_tensor_that_was_not_copied_straight_is_noticed():
    class Scaling(Fused):
        def load_weights(self, tensors):
            super().load_weights([(n, t * 2 if n == "k" else t) for n, t in tensors])

    copies = record(Scaling(), bucket_in(torch.zeros(28), 1))
    assert not copies.covers({"qk": 24, "norm": 4})


def test_copies_inside_the_model_are_not_part_of_a_push():
    class Caching(Fused):
        def load_weights(self, tensors):
            super().load_weights(tensors)
            self.norm.data.copy_(self.norm.data.clone())

    assert record(Caching(), bucket_in(torch.zeros(28), 1)).covers({"qk": 24, "norm": 4})


def pieces_of(parameter: nn.Parameter, tensor: torch.Tensor, *copies: tuple[torch.Tensor, torch.Tensor]) -> Any:
    filled = Target(tuple(parameter.shape), parameter.dtype)
    with NotedCopies({"t": parameter}) as noted:
        for target, source in copies:
            target.copy_(source)
    for _, target, source in noted.made:
        filled.take(piece_of("t", tensor, parameter, target, source))
    return filled.pieces, filled.exact


def test_regions_are_where_copies_came_from():
    """Rows of a fused parameter, columns of a tensor-parallel rank, and what cannot be told."""
    memory = torch.arange(100.0)
    tensor = memory[4:28].view(6, 4)
    fused = nn.Parameter(torch.zeros(8, 4, device="meta"), requires_grad=False)
    rows = (fused.data.narrow(0, 2, 3), tensor.narrow(0, 1, 3))
    assert pieces_of(fused, tensor, rows) == ([Piece("t", Region(1, 12, 4, 12), 8, 12)], True)
    narrow = nn.Parameter(torch.zeros(6, 2), requires_grad=False)
    pieces, whole = pieces_of(narrow, tensor, (narrow.data, tensor.narrow(1, 2, 2)))
    assert (pieces, whole) == ([Piece("t", Region(6, 2, 2, 4), 0, 2)], True)
    assert torch.equal(pieces[0].of(narrow.data), tensor[:, 2:])
    square = nn.Parameter(torch.zeros(4, 6), requires_grad=False)
    assert pieces_of(square, tensor, (square.data, tensor.t())) == ([], False)
    assert pieces_of(square, tensor, (square.data, torch.ones(4, 6))) == ([], False)
    assert pieces_of(square, tensor, (torch.zeros(6, 4), tensor)) == ([], True)


def test_ranks_add_up_and_copies_of_a_region_count_once():
    plan = Plan((TensorSpec("k", (4, 2), "float32"), TensorSpec("norm", (4,), "float32")))
    top, bottom, norm = Region(1, 4, 0, 4), Region(1, 4, 4, 4), Region(1, 4, 0, 4)

    def rank(region: Region) -> list[Shard]:
        return [Shard("k", "qkv", region), Shard("norm", "norm", norm)]

    def told(wholes: Wholes, *ranks: list[int | None]) -> dict[Held, int | None]:
        return dict(zip(wholes.held, wholes.add_up(ranks), strict=True))

    four = Wholes([rank(top), rank(top), rank(bottom), rank(bottom)], plan)
    high = 2**32 - 1
    names = [("k", f"qkv@{r}") for r in range(4)] + [("norm", f"norm@{r}") for r in range(4)]
    assert four.held == names
    assert four.add_up([[3, 9], [3, 9], [high, 9], [high, 9]]) == [2, 2, 2, 2, 9, 9, 9, 9]
    assert four.add_up([[3, 9], [4, 8], [high, 9], [high, 9]]) == [2, 3, 2, 2, 9, 8, 9, 9]
    assert four.add_up([[3, 9], [3, 9], [high, 9], [7, 9]]) == [2, 2, 2, 10, 9, 9, 9, 9]
    assert told(Wholes([rank(top)], plan), [3, 9]) == {("norm", "norm"): 9}
    two = Wholes([rank(top), rank(bottom)], plan)
    both = {("norm", "norm@0"): 9, ("norm", "norm@1"): 9}
    assert told(two, [3, 9], [high, 9]) == {("k", "qkv"): 2} | both
    # What a rank cannot tell is not compared; what another rank holds of it is.
    assert four.add_up([[None, 9], [4, None], [high, 9], [high, 8]]) == [3, 3, 3, 3, 9, 9, 9, 8]
    assert told(two, [None, 9], [high, None]) == {("k", "qkv"): None} | both
    # The sums of one push say nothing of the next's.
    assert told(two, [4, 9], [high, 9]) == {("k", "qkv"): 3} | both
