"""A model and its optimizer, in one process or split over several. It is given a loss and knows no method."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tandem.batch import Asks, Batch, Outputs, TokenLoss, filled, send
from tandem.data.packing import pack
from tandem.errors import NonFiniteError, UserError
from tandem.functional.balance import bias_step, load_violation
from tandem.models.forward import LoadedModel, describe_model, forward
from tandem.models.policy import Policy
from tandem.models.quantized import quantized_in
from tandem.models.routers import all_weights
from tandem.parallel.sharding import (
    assign,
    checkpoint_activations,
    forget_gathered,
    local,
    slice_like,
    transformer_layers,
    whole,
)
from tandem.parallel.shares import Share, shares
from tandem.parallel.world import World
from tandem.roles import LossFn, Metrics
from tandem.training.masters import Masters
from tandem.training.optim import OptimParams, build_optimizer, hidden_matrices, learning_rate_at
from tandem.training.parking import Parking
from tandem.training.tally import Tally
from tandem.types import Sequence

CompileMode = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True)
class MemoryParams:
    """What is given up for memory."""

    keep_gathered: bool = False
    """Several processes: keep a layer's parameters from forward to backward (ZeRO 1 and 2), not gather twice (3)."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """On the CPU between uses: nothing, the optimizer's state, or parameters and gradients as well."""
    activation_checkpointing: bool = False
    """Keep only layers' inputs for the backward, and compute the rest twice."""


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
        """What it ``asks`` for, a micro-batch at a time. ``temperature``: another one than its own."""
        asks = self.asks if temperature is None else replace(self.asks, temperature=temperature)
        with self._present():
            parts = [(share.units, forward(self.model, share.batch, asks)) for share in self._shares(batch)]
        return _assemble(batch, parts, self.world)

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
        """Log-prob, at temperature 1, of every token but the first of each sequence."""
        logp_T = self.score(pack([Sequence.read(ids) for ids in sequences]), temperature=1.0).logp_T
        assert logp_T is not None
        return [part[1:].tolist() for part in logp_T.split([len(ids) for ids in sequences])]

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
        """Of every parameter, by name."""
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

    def park(self, *, weights: bool) -> None:
        """Gives device memory away until ``unpark``: all weights, if asked."""
        if weights:
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


class LocalTrainer(LocalScorer):
    """Trains a model with a loss that returns unreduced per-token values (``tandem.roles.Trainer``).

    In a world of several ranks every rank makes the same calls with the same batch and goes through its share of it;
    all return the same numbers. ``asks`` is what the loss reads of a forward; scores are log-probs at its temperature.
    """

    def __init__(
        self,
        model: LoadedModel,
        loss: LossFn,
        optim: OptimParams,
        *,
        token_budget: int,
        asks: Asks | None = None,
        world: World | None = None,
        memory: MemoryParams | None = None,
        compile: CompileMode = "off",
    ) -> None:
        self.memory = memory or MemoryParams()
        self.loss = loss
        self.optim = optim
        self.in_training = replace(asks or Asks(), balance=optim.aux_loss_coef != 0, load=optim.bias_update_speed != 0)
        """What it asks of the forwards that are trained."""
        if self.in_training.balance:
            model.require_balance()
        if self.in_training.load:
            model.count_picks()
        if self.in_training.balance or self.in_training.load:
            if compile == "on":
                key = "aux_loss_coef" if self.in_training.balance else "bias_update_speed"
                raise UserError(f"compile: compiled layers do not give what {key} needs; leave it at auto or off")
            compile = "off"
        if model.adapters is None and quantized_in(model.module):
            raise UserError(
                f"{type(model.module).__name__}: its layers are in few bits, and only adapters can be trained on them: "
                "lora.rank 32, say"
            )
        self.loads: list[Tensor] = []
        """Of each micro-batch since the last optimizer step: ``Outputs.load_LE``."""
        self._version = 0
        scores = Asks(temperature=self.in_training.temperature)
        super().__init__(model, token_budget=token_budget, asks=scores, world=world, compile=compile)
        self.optimizer = build_optimizer(
            self.masters.named, optim, hidden=hidden_matrices(model.module), world=self.world
        )
        decayed = [] if optim.ema_decay is None else [n for n, w in self.masters.named.items() if w.requires_grad]
        self.ema = {name: self.weights[name].detach().clone() for name in decayed}
        """The running average of the weights that are trained, by name, sharded as they are; empty if not asked for."""
        self.idle = Parking()

    def _prepare(self) -> None:
        module, dtype = self.model.module, self.model.torch_dtype
        self.model.compile_blocks(self.compile)
        if self.memory.activation_checkpointing:
            # What is computed again in the backward pass would not know where segments begin.
            self.model.packed = self.model.packed and self.model.mixers is None
            checkpoint_activations(transformer_layers(module))
        if self.world.size > 1 or self.memory.offload == "parameters":
            self.model.shard(
                self.world, keep_gathered=self.memory.keep_gathered, offload=self.memory.offload == "parameters"
            )
            dtype = torch.float32
        self.model.route_in_float32(self.model.torch_dtype)
        self.masters = Masters(module, dtype)
        if self.model.split_head:
            self.model.head_gradient = self.masters.gradient_of(module.get_output_embeddings().weight)
        self.parameters = all_weights(module)
        self.policy = Policy(self.model, self.parameters)
        self.weights: dict[str, Tensor] = dict(self.masters.named)
        """The float32 weights that the optimizer steps, and frozen ones, by name: this rank's slices where sharded.
        Of a model with adapters, what is trained alone."""
        self.buffers = {name: b for name, b in module.state_dict().items() if name in dict(module.named_buffers())}
        if self.model.adapters is not None:
            self.weights, self.buffers = {name: self.weights[name] for name in self.policy.trained}, {}

    @property
    def version(self) -> int:
        return self._version

    def forward_backward(self, batch: Batch) -> Metrics:
        """Adds the gradient of ``(loss_T * weight_T).sum()`` and returns the loss and the mean of its metrics.

        The device is asked for numbers once, at the end. Raises NonFiniteError naming the batch's segments where the
        loss is not finite; the parameters are as they were, and the gradient gathered so far is dropped.
        """
        tally = Tally()
        for micro, token_loss, gap_N, balance, load_LE in self._losses(batch):
            # One that is not finite goes through too: nobody knows yet, and other ranks wait in its collectives.
            total = tally.add(micro, token_loss, gap_N, balance)
            (total if balance is None else total + self.optim.aux_loss_coef * balance).backward()
            self.loads += [] if load_LE is None else [load_LE]
        metrics, bad = tally.result(self.world)
        if bad:
            self._drop_gradient()
            raise NonFiniteError(bad)
        return metrics

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Metrics:
        """Loss and metrics without a gradient. ``batch`` needs its weights stamped."""
        tally = Tally()
        for micro, token_loss, gap_N, balance, _ in self._losses(batch):
            tally.add(micro, token_loss, gap_N, balance)
        return tally.result(self.world)[0]

    def optim_step(self, done: float | None = None, scale: float = 1.0) -> Metrics:
        """Clips the gradient to ``max_grad_norm``, steps and clears it; routers' biases take a step of their own.

        ``done`` says how many steps of the run are behind, for the learning rate (None: the optimizer steps taken),
        which is multiplied by ``scale``.
        Raises NonFiniteError where the gradient is not finite, before any parameter changes.
        """
        norm = whole(torch.nn.utils.clip_grad_norm_(self.masters.named.values(), self.optim.max_grad_norm)).item()
        if not math.isfinite(norm):
            self._drop_gradient()
            raise NonFiniteError("the gradient is not finite though the loss is; lower the learning rate")
        learning_rate = learning_rate_at(self._version if done is None else done, self.optim) * scale
        self.idle.restore()
        # Counted first: whoever is interrupted from here on must not be taken for untouched.
        self._version += 1
        self.optimizer.step(learning_rate)
        metrics = {"grad_norm": norm, "learning_rate": learning_rate} | self._steer()
        self._drop_gradient()
        self._average()
        self._changed()
        if self.memory.offload == "optimizer":
            self.idle.park([*self.optimizer.tensors(), *self.ema.values()])
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Parameters, optimizer state and version: all that the next step depends on. Whole tensors on rank 0's CPU.

        The same whatever the number of ranks and the dtype of the computation, so that a run may go on with others.
        """
        self.idle.restore()
        keep = self.world.rank == 0
        return {
            "model": self.whole_weights(),
            "optimizer": self.optimizer.state_dict(keep=keep),
            "version": self._version,
            "ema": whole(self.ema, keep=keep),
            **({} if self.model.adapters is None else {"adapters": self.model.adapters.saved}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what ``state_dict`` gave, on any number of ranks.

        Raises UserError where the adapters that it gave are of another base, or of one that was quantised otherwise.
        """
        if self.model.adapters is not None:
            self.model.adapters.require_base(state["adapters"])
            self.model.adapters.require_quantized(state["adapters"])
        self.idle.restore()
        with torch.no_grad():
            for name, target in (self.weights | self.buffers).items():
                assign(target, state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, average in self.ema.items():
            assign(average, state["ema"][name])
        self._version = state["version"]
        self._changed()

    def trained_numbers(self) -> int:
        """How many numbers are trained."""
        return sum(weight.numel() for weight in self.weights.values())

    def whole_weights(self) -> dict[str, Tensor]:
        """The float32 weights and the buffers by name, whole, on rank 0's CPU; None elsewhere."""
        return whole(self.weights | self.buffers, keep=self.world.rank == 0)

    def stir(self, size: float | None) -> None:
        """See ``tandem.models.policy.Policy.stir``."""
        with self._present():
            self.policy.stir(size)

    def remember(self, numbers: Mapping[str, float | None]) -> None:
        """Puts numbers into the model's config, which is exported with it; None takes one out."""
        config = self.model.module.config
        for name, value in numbers.items():
            if value is not None:
                setattr(config, name, value)
            elif hasattr(config, name):
                delattr(config, name)

    @torch.no_grad()
    def swap_average(self) -> None:
        """Puts the running average in the weights' places and them in its: once more, and all is as it was."""
        self.idle.restore()
        for name, average in self.ema.items():
            weight, average = local(self.weights[name]), local(average)
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        self._changed()

    def export(self, folder: Path) -> None:
        """Writes a Hugging Face folder: float32 weights, config and tokenizer. A collective; rank 0 writes."""
        state = self.whole_weights()
        if self.world.rank == 0:
            # A frozen parameter is kept as it is computed with.
            state = {name: t.float() if t.is_floating_point() else t for name, t in state.items()}
            self.model.export(folder, state)

    def park(self, *, weights: bool) -> None:
        """Gives device memory away until ``unpark``: the optimizer's state, and all weights too if asked."""
        if self.model.sharded is not None:
            forget_gathered(self.model.sharded)
        self.idle.park([*self.optimizer.tensors(), *self.ema.values()])
        self.idle.park(master for _, master in self.masters.pairs)
        if weights:
            self.idle.park([*self.parameters.values(), *self.model.module.buffers()])

    def unpark(self) -> None:
        """Takes it back."""
        self.idle.restore()

    def _drop_gradient(self) -> None:
        self.optimizer.zero_grad()
        self.loads.clear()

    @torch.no_grad()
    def _steer(self) -> Metrics:
        """Moves the routers' biases by the load of all that this step has seen, and returns ``load_violation``.

        Whole tokens of all ranks are counted, so that no cut of the step can change it.
        """
        if not self.in_training.load:
            return {}
        assert self.model.picks is not None
        biases = list(self.model.picks.biases.values())
        load_LE = torch.zeros(len(biases), max(map(len, biases)), dtype=torch.int64, device=self.world.device)
        for one in self.loads:
            load_LE += one
        self.world.sum(load_LE)
        for bias, step_E in zip(biases, bias_step(load_LE, self.optim.bias_update_speed), strict=True):
            bias.add_(step_E)
        return {"load_violation": load_violation(load_LE)}

    @torch.no_grad()
    def _average(self) -> None:
        if self.optim.ema_decay is not None:
            averages, weights = map(local, self.ema.values()), (local(self.weights[name]) for name in self.ema)
            torch._foreach_lerp_([*averages], [*weights], 1 - self.optim.ema_decay)

    def _changed(self) -> None:
        self.masters.publish()
        super()._changed()

    def _losses(self, batch: Batch) -> Iterator[tuple[Batch, TokenLoss, Tensor | None, Tensor | None, Tensor | None]]:
        """Each of this rank's micro-batches, its loss, its ``_sampler_gap``, its part of the routers' loss, and what it
        gave their experts."""
        for share in self._shares(batch):
            micro, out = share.batch, forward(self.model, share.batch, self.in_training)
            gap_N = _sampler_gap(micro, out) if share.units else None
            if micro.on_policy and out.logp_T is not None:
                micro = replace(micro, seen=micro.seen | {"actor": Outputs(logp_T=out.logp_T.detach())})
            balance = None if out.balance_S is None else (out.balance_S * filled(micro.share_S, "share_S")).sum()
            yield micro, self.loss(out, micro), gap_N, balance, out.load_LE if share.units else None


def _sampler_gap(batch: Batch, out: Outputs) -> Tensor | None:
    """[N], of the N trainable tokens: the forward's log-prob less the sampler's, in nats.

    None where the sampler gave none, and where the trainer's own were known before the step: those have been compared.
    """
    if batch.untruncated_logp_T is None or out.logp_T is None or "actor" in batch.seen:
        return None
    gap_T = out.logp_T.detach() - batch.untruncated_logp_T
    return gap_T.index_select(0, batch.index_N)


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
