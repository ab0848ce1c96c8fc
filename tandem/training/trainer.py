"""A model and its optimizer, in one process or split over several. It is given a loss and knows no method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tandem.arguments import checked
from tandem.batch import Asks, Batch, Outputs, filled
from tandem.errors import NonFiniteError, UserError
from tandem.functional.balance import bias_step, load_violation
from tandem.models.forward import LoadedModel, forward
from tandem.models.moe.routers import all_weights
from tandem.models.policy import Policy
from tandem.models.quantized.layers import quantized_in
from tandem.parallel.sharding import assign, checkpoint_activations, forget_gathered, local, transformer_layers, whole
from tandem.parallel.world import World
from tandem.roles import LossFn, Metrics
from tandem.training.masters import Masters
from tandem.training.optim import OptimParams, build_optimizer, hidden_matrices, learning_rate_at
from tandem.training.parking import Parking
from tandem.training.scorer import CompileMode, LocalScorer
from tandem.training.tally import Tally


@dataclass(frozen=True, kw_only=True)
class MemoryParams:
    """What is given up for memory."""

    keep_gathered: bool = False
    """Several processes: keep a layer's parameters from forward to backward (ZeRO 1 and 2), not gather twice (3)."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """On the CPU between uses: nothing, the optimizer's state, or parameters and gradients as well."""
    activation_checkpointing: bool = False
    """Keep only layers' inputs for the backward, and compute the rest twice."""


@checked
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
        """``Outputs.load_LE`` of each micro-batch since the last optimizer step."""
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
        for total, load_LE in self._losses(batch, tally):
            # One that is not finite goes through too: nobody knows yet, and other ranks wait in its collectives.
            total.backward()
            self.loads += [] if load_LE is None else [load_LE]
        metrics, bad = tally.result(self.world)
        if bad:
            self._drop_gradient()
            raise NonFiniteError(bad)
        return metrics

    def compile_ahead(self, batch: Batch) -> None:
        """As a scorer's, and the backward: of 0, and the gradient is dropped."""
        if self.model.blocks is not None:
            out = forward(self.model, next(self._shares(batch)).batch, Asks())
            value_T = out.scalar_T if out.logp_T is None else out.logp_T
            (filled(value_T, "logp_T") * 0).sum().backward()
            self._drop_gradient()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Metrics:
        """Loss and metrics without a gradient. ``batch`` needs its weights stamped."""
        tally = Tally()
        for _ in self._losses(batch, tally):
            pass
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

    def park(self, what: Literal["optimizer", "weights"]) -> None:
        """Gives device memory away until ``unpark``: the optimizer's state, and where ``weights`` go all of these."""
        if self.model.sharded is not None:
            forget_gathered(self.model.sharded)
        self.idle.park([*self.optimizer.tensors(), *self.ema.values()])
        self.idle.park(master for _, master in self.masters.pairs)
        if what == "weights":
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

    def _losses(self, batch: Batch, tally: Tally) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Of each of this rank's micro-batches, which go into the tally: its loss, to be differentiated, and what it
        gave the routers' experts."""
        for share in self._shares(batch):
            micro, out = share.batch, forward(self.model, share.batch, self.in_training)
            gap_N = _sampler_gap(micro, out) if share.units else None
            if micro.on_policy and out.logp_T is not None:
                micro = replace(micro, seen=micro.seen | {"actor": Outputs(logp_T=out.logp_T.detach())})
            balance = None if out.balance_S is None else (out.balance_S * filled(micro.share_S, "share_S")).sum()
            total = tally.add(micro, self.loss(out, micro), gap_N, balance)
            total = total if balance is None else total + self.optim.aux_loss_coef * balance
            yield total, out.load_LE if share.units else None


def _sampler_gap(batch: Batch, out: Outputs) -> Tensor | None:
    """[N], of the N trainable tokens: the forward's log-prob less the sampler's, in nats.

    None where the sampler gave none, and where the trainer's own were known before the step: those have been compared.
    """
    if batch.untruncated_logp_T is None or out.logp_T is None or "actor" in batch.seen:
        return None
    gap_T = out.logp_T.detach() - batch.untruncated_logp_T
    return gap_T.index_select(0, batch.index_N)
