"""A live engine with weights of its own, fed from a trainer: in the trainer's process or in another."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from tandem.data.packing import pack
from tandem.engines.live.engine import CacheDtype, LiveEngine, StaleCache, Way
from tandem.errors import UserError
from tandem.futures import Future
from tandem.models.forward import LoadedModel, forward
from tandem.models.routers import all_weights
from tandem.sync.checksum import ParameterSums
from tandem.sync.links import Link
from tandem.sync.plan import plan_of
from tandem.sync.receiver import Receiver
from tandem.types import Completion, Held, Request, Sequence, Watch


class ReplicaEngine:
    """Samples from a copy of the weights: ``model``'s own, which pushes overwrite."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        max_slots: int = 256,
        max_length: int | None = None,
        way: Way = "auto",
        kv_cache_dtype: CacheDtype = "auto",
        stale_cache: StaleCache = "keep",
    ) -> None:
        model.compute_in(model.torch_dtype)
        self.model = model
        self.version = 0
        self.parameters: dict[str, Tensor] = all_weights(model.module)
        self.receiver: Receiver | None = None
        self.sums = ParameterSums(self.parameters, plan_of(self.parameters.items()), model.device)
        self.live = LiveEngine(
            model.module,
            model.tokenizer,
            max_slots=max_slots,
            max_length=max_length,
            way=way,
            kv_cache_dtype=kv_cache_dtype,
            stale_cache=stale_cache,
            version=lambda: self.version,
        )

    @property
    def ended(self) -> int:
        return self.live.ended

    @property
    def busy_seconds(self) -> float:
        return self.live.busy_seconds

    @property
    def sampled_tokens(self) -> int:
        return self.live.sampled_tokens

    def submit(self, requests: Seq[Request], watch: Watch | None = None) -> list[Future[list[Completion]]]:
        return self.live.submit(requests, watch)

    def generate(self, requests: Seq[Request], watch: Watch | None = None) -> list[list[Completion]]:
        return self.live.generate(requests, watch)

    def wait(self, until: Callable[[], bool], at_least: int = 0) -> None:
        self.live.wait(until, at_least)

    def sample(self, until: Callable[[], bool]) -> None:
        self.live.sample(until)

    def give_way(self) -> None:
        self.live.give_way()

    def look(self) -> None:
        self.live.look()

    def cancel(self) -> None:
        self.live.cancel()

    def hold(self, held: bool) -> None:
        self.live.hold(held)

    @property
    def running(self) -> int:
        return self.live.running

    @torch.no_grad()
    def logprobs(self, sequences: Seq[Seq[int]]) -> list[list[float]]:
        """Log-prob, at temperature 1, of every token but the first of each sequence."""
        with self.live.stepper.exclusive():
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
        with self.live.stepper.exclusive():
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
        """Of what it holds now."""
        with self.live.stepper.exclusive():
            return list(self.sums.now().values())

    def close(self) -> None:
        if self.receiver is not None:
            self.receiver.close()
