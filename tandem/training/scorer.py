"""A model that only looks, in one process or split over several: what a trainer is, too."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tandem.arguments import checked
from tandem.batch import Asks, Batch, Outputs, send
from tandem.data.packing import pack
from tandem.errors import UserError
from tandem.models.forward import LoadedModel, describe_model, forward
from tandem.models.moe.routers import all_weights, has_experts
from tandem.models.proof.probe import rounding_by_token
from tandem.parallel.sharding import assign, forget_gathered, local, slice_like, whole
from tandem.parallel.shares import Share, shares
from tandem.parallel.world import World
from tandem.training.parking import Parking
from tandem.types import Sequence

CompileMode = Literal["auto", "on", "off"]


@checked
class LocalScorer:
    """A model that only looks: a frozen reference or a reward model (``tandem.roles.Scorer``).

    It changes when it is told to ``follow`` another model; ``state_dict`` and ``load_state_dict`` are for one that is.

    In a world of several ranks the parameters are sharded, every rank scores its share, and all get the whole result.
    ``offload`` keeps the parameters on the CPU between calls, ``compile`` says whether layers run as compiled graphs
    (auto: on a GPU).
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        token_budget: int,
        asks: Asks | None = None,
        world: World | None = None,
        offload: bool = False,
        compile: CompileMode = "off",
    ) -> None:
        self.model = model
        self.compile = compile
        self.token_budget = token_budget
        self.asks = asks or Asks()
        self.world = world or World(device=model.device)
        self.away = Parking()
        self.offload = offload
        self._prepare()

    def _prepare(self) -> None:
        self.model.compile_blocks(self.compile)
        if self.world.size > 1:
            self.model.shard(self.world)
        else:
            self.model.compute_in(self.model.torch_dtype)
        self.parameters: dict[str, Tensor] = all_weights(self.model.module)
        """What the model computes with, its routers' biases included. Taken here, before a forward leaves gathered ones
        in their places."""
        self.exact: dict[str, Tensor] = {}
        """Mixtures in float32, on the CPU, of parameters that are computed with in fewer bits."""
        self.followed = 0
        """The step after which it last followed."""
        self._park()

    @torch.no_grad()
    def score(self, batch: Batch, temperature: float | None = None) -> Outputs:
        """What it ``asks`` for, a micro-batch at a time. ``temperature``: another one than its own.

        Raises UserError for a token that its embedding lacks: a policy whose embedding is filled up may sample one.
        """
        asks = self.asks if temperature is None else replace(self.asks, temperature=temperature)
        with self._present():
            self._require_rows(batch)
            parts = [(share.units, forward(self.model, share.batch, asks)) for share in self._shares(batch)]
        return _assemble(batch, parts, self.world)

    def _require_rows(self, batch: Batch) -> None:
        module, largest = self.model.module, int(batch.token_ids_T.max())
        if largest >= (rows := module.get_input_embeddings().weight.shape[0]):
            raise UserError(
                f"{type(module).__name__}: token id {largest}, and its embedding has {rows} rows: that of the model "
                f"which samples has more, and the tokenizer {self.model.words} tokens; start both from the same base "
                "model"
            )

    def compile_ahead(self, batch: Batch) -> None:
        """Compiles its layers, where they are to be, on samples that nobody learns from: it would wait meanwhile."""
        if self.model.blocks is not None:
            self.score(batch)

    @torch.no_grad()
    def head(self) -> dict[str, Tensor | None]:
        """``weight`` [V, D] and ``bias`` of its language-model head, for a student that is given its hidden states.

        A collective; rank 0's are there. Raises UserError where its logits are more than a product of the two.
        """
        if not self.model.split_head or self.model.head_shape.cap is not None:
            raise UserError(
                f"{type(self.model.module).__name__}: its logits are not its head times its last hidden state, "
                "so its whole distribution cannot be given to a student; give --teacher-top-k"
            )
        module = self.model.module.get_output_embeddings()
        found: dict[str, Tensor | None] = {"weight": module.weight, "bias": module.bias}
        with self._present():
            if self.model.sharded is not None:
                found = whole(found, keep=self.world.rank == 0)
            # What is parked loses its storage.
            return {name: x.detach().clone() if x is not None and self.offload else x for name, x in found.items()}

    def learn_from(self, head: Mapping[str, Tensor | None]) -> None:
        """Takes the head of the teacher whose hidden states batches will bring (``head``)."""
        weight, bias = (None if x is None else x.detach().to(self.model.device) for x in (head["weight"], head["bias"]))
        assert weight is not None
        self.model.teacher_head = weight, bias

    def logprobs(self, sequences: Seq[Seq[int]]) -> list[list[float]]:
        """Log-prob, at temperature 1, of every token but the first of each sequence. No layer compiles for it."""
        with nullcontext() if self.model.blocks is None else self.model.blocks.resting():
            logp_T = self.score(pack([Sequence.read(ids) for ids in sequences]), temperature=1.0).logp_T
        assert logp_T is not None
        return [part[1:].tolist() for part in logp_T.split([len(ids) for ids in sequences])]

    def rounding(self, sequences: Seq[Seq[int]]) -> list[list[float]]:
        """How far rounding may move each of ``logprobs``, in nats, by deciding which experts a token takes: all 0 where
        it does not (``tandem.models.proof.probe.rounding_by_token``)."""
        if self.model.torch_dtype.itemsize >= 4 or not has_experts(self.model.module):
            return [[0.0] * (len(ids) - 1) for ids in sequences]
        return rounding_by_token(self.model.module, lambda: self.logprobs(sequences))

    @torch.no_grad()
    def follow(self, weights: Mapping[str, Tensor], mix: float, step: int) -> None:
        """Becomes ``mix`` times these weights, by name, and the rest its own: 1 takes them over. Once after a ``step``.

        They are whole, or sharded as its own are.
        """
        if step == self.followed:
            return
        with self._present():
            for name, parameter in self.parameters.items():
                source = slice_like(weights[name], parameter)
                if mix < 1 and parameter.dtype != torch.float32:
                    exact = self.exact.get(name, local(parameter).float().cpu())
                    source = self.exact[name] = exact.lerp(source.to(exact), mix)
                    local(parameter).copy_(source)
                else:
                    local(parameter).lerp_(source.to(local(parameter)), mix)
            self._changed()
        self.followed = step

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, by name."""
        return {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}

    def state_dict(self) -> dict[str, Any]:
        """The parameters, whole, on rank 0's CPU."""
        with self._present():
            return {
                "model": whole(self.parameters, keep=self.world.rank == 0),
                "exact": dict(self.exact),
                "followed": self.followed,
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what ``state_dict`` gave, on any number of ranks."""
        with self._present():
            for name, parameter in self.parameters.items():
                assign(parameter, state["model"][name])
            self.exact = {name: exact.clone() for name, exact in state["exact"].items()}
            self._changed()
        self.followed = state["followed"]

    def _changed(self) -> None:
        """The weights have changed: whatever was made of the old ones goes."""
        if self.model.sharded is not None:
            forget_gathered(self.model.sharded)

    def _shares(self, batch: Batch) -> Iterator[Share]:
        # Prefixes are shared by packed models only, and what is shared decides how a batch is cut.
        packed = self.model.packed
        whole_segments = self.model.mixers is not None
        if not packed:
            batch = batch.unshared()
        for share in shares(batch, self.token_budget, self.world, padded=not packed, whole=whole_segments):
            yield Share(batch=share.batch.to(self.model.device), units=share.units)

    def forget(self) -> None:
        """Lets the model go, and its memory: nothing more is asked of it."""
        del self.model
        self.away = Parking()
        frozen = gc.get_freeze_count() > 0
        # A module and its parts refer to each other, and what a run has frozen is not collected.
        gc.unfreeze()
        gc.collect()
        if frozen:
            gc.freeze()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def park(self, what: Literal["optimizer", "weights"]) -> None:
        """Gives device memory away until ``unpark``: its weights. It has no optimizer."""
        if what == "weights":
            self.away.park([*self.model.module.parameters(), *self.model.module.buffers()])

    def unpark(self) -> None:
        """Takes it back, unless it is kept on the CPU between uses anyway."""
        if not self.offload:
            self.away.restore()

    def memory_peak(self) -> float | None:
        """Most GB allocated on the device since the last time of asking; None on a CPU."""
        if self.model.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated(self.model.device) / 1e9
        torch.cuda.reset_peak_memory_stats(self.model.device)
        return peak

    def describe(self) -> str:
        """Class, size, device, precision and layout, for a person to read."""
        return describe_model(self.model)

    @contextmanager
    def _present(self) -> Iterator[None]:
        """With the parameters on the device."""
        self.away.restore()
        yield
        self._park()

    def _park(self) -> None:
        if self.offload:
            self.away.park(self.model.module.parameters())


def _assemble(batch: Batch, parts: list[tuple[list[int], Outputs]], world: World) -> Outputs:
    """The whole batch's outputs from every rank's micro-batches, in the batch's order."""

    def joined(name: str) -> Tensor | None:
        if getattr(parts[0][1], name) is None:
            return None
        first = getattr(parts[0][1], name)
        result = first.new_zeros(batch.tokens, *first.shape[1:])
        for units, out in parts:
            if units:
                result[send(batch.tokens_of(units), result.device)] = getattr(out, name)
        return world.sum(result)

    return Outputs(**{f.name: joined(f.name) for f in fields(Outputs)})
