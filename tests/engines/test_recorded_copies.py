"""Loading weights by copies that an earlier load has made: what vLLM does from the third push on (on GPUs)."""

from __future__ import annotations

import torch
from torch import nn

from tandem.engines.vllm_copies import Copies, RecordingCopies


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
    recording = RecordingCopies(copies, dict(model.named_parameters()), bucket)
    with recording:
        model.load_weights(bucket)
    recording.finish()
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
