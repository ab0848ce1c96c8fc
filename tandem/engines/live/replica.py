"""A live engine with weights of its own, fed from a trainer: in the trainer's process or in another."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from tandem.data.packing import pack
from tandem.engines.live.engine import LiveEngine
from tandem.errors import UserError
from tandem.models.forward import LoadedModel, forward
from tandem.models.moe.routers import all_weights
from tandem.sync.checksum import ParameterSums
from tandem.sync.links import Link
from tandem.sync.plan import plan_of
from tandem.sync.receiver import Receiver
from tandem.types import Held, Sequence


class ReplicaEngine(LiveEngine):
    """Samples from a copy of the weights: ``model``'s own, which pushes overwrite (``tandem.roles.FedEngine``)."""

    def __init__(self, model: LoadedModel, **options: Any) -> None:
        """``options`` are ``LiveEngine``'s."""
        model.compute_in(model.torch_dtype)
        self.model = model
        self.version = 0
        self.parameters: dict[str, Tensor] = all_weights(model.module)
        self.receiver: Receiver | None = None
        self.sums = ParameterSums(self.parameters, plan_of(self.parameters.items()), model.device)
        super().__init__(model.module, model.tokenizer, version=lambda: self.version, **options)

    @torch.no_grad()
    def logprobs(self, sequences: Seq[Seq[int]]) -> list[list[float]]:
        """Log-prob, at temperature 1, of every token but the first of each sequence."""
        with self.stepper.exclusive():
            logp_T = forward(self.model, pack([Sequence.read(ids) for ids in sequences]).to(self.model.device)).logp_T
        assert logp_T is not None
        return [part[1:].tolist() for part in logp_T.split([len(ids) for ids in sequences])]

    def connect(self, links: Seq[Link]) -> None:
        """Connects to the trainer that will push."""
        (link,) = links
        if self.receiver is not None:
            self.receiver.close()
        self.receiver = Receiver(link, self.model.device)
        self.sums = ParameterSums(self.parameters, link.plan, self.model.device, link.overlaps)

    @torch.no_grad()
    def receive(self, version: int, check: bool = False) -> Seq[int | None]:
        """Takes one push, between two steps. Returns ``checksums``, if asked to ``check``: [] otherwise.

        Raises UserError, naming the tensor, for one that this model does not have.
        """
        assert self.receiver is not None, "connect() comes first"
        with self.stepper.exclusive():
            for number, bucket in enumerate(self.receiver.buckets()):
                self.load(bucket)
                if check:
                    self.sums.tally.add(number)
            self.version = version
        return list(self.sums.result().values()) if check else []

    @torch.no_grad()
    def load(self, bucket: list[tuple[str, Tensor]]) -> None:
        """Copies tensors into the parameters of these names."""
        for name, tensor in bucket:
            mine = self.parameters.get(name)
            if mine is None or mine.shape != tensor.shape:
                has = "no such parameter" if mine is None else f"one of shape {tuple(mine.shape)}"
                raise UserError(f"weight sync: {name} {tuple(tensor.shape)} arrives and the engine has {has}")
        targets = [self.parameters[name] for name, _ in bucket]
        torch._foreach_copy_(targets, [tensor for _, tensor in bucket], non_blocking=True)

    def held(self) -> list[Held]:
        """Every parameter, by its own name."""
        return [(name, name) for name in self.sums.slots]

    def checksums(self) -> Seq[int | None]:
        """The checksums of what it holds now."""
        with self.stepper.exclusive():
            return list(self.sums.now().values())

    def close(self) -> None:
        if self.receiver is not None:
            self.receiver.close()
