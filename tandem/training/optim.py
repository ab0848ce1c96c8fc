"""The optimizers by name, on any number of ranks; the learning rate as a function of how much of the run is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tandem.arguments import checked
from tandem.lazy import extra
from tandem.models.lora.pairs import pairs_of
from tandem.parallel.sharding import assign, like, local, unsharded, whole
from tandem.parallel.shares import divide
from tandem.parallel.world import World

OptimizerName = Literal["adamw", "adamw8bit", "adafactor", "muon"]
Stepped = list[dict[str, Any]]
"""Parameter groups, as torch's optimizers take them."""


@checked
@dataclass(frozen=True, kw_only=True)
class OptimParams:
    """An optimizer with warmup. ``total_steps`` and ``warmup_steps`` are steps of the run.

    A run's step may take several optimizer steps, or none where it has nothing to learn from. The ``optimizer``:

    - ``adamw``: arXiv:1711.05101.
    - ``adamw8bit``: the same with both moments in 8 bits by blocks of 256 (arXiv:2110.02861), from bitsandbytes.
      Parameters of fewer than 4096 numbers keep theirs in float32.
    - ``adafactor``: arXiv:1804.04235, of torch: of a matrix it keeps the squared gradient's means by row and by column,
      and no first moment; ``learning_rate`` is a share of each parameter's root mean square.
    - ``muon``: of torch. The matrices of the hidden layers step along their orthogonalized momentum, scaled by
      ``0.2 sqrt(max(rows, columns))``, which gives the steps the size of AdamW's (``match_rms_adamw``,
      arXiv:2502.16982); embeddings, heads, biases, norms and whatever has not 2 dimensions are AdamW's. One learning
      rate and one weight decay for both.
    """

    learning_rate: float
    total_steps: int
    optimizer: OptimizerName = "adamw"
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    aux_loss_coef: float = 0.0
    """Of the routers' load-balancing loss beside the method's, where the model has experts. 0: none is computed."""
    bias_update_speed: float = 0.0
    """What an optimizer step adds to or takes off each bias of the routers (``functional.balance.bias_step``). 0: none.
    """
    ema_decay: float | None = None
    """Of a running average of the weights, at each optimizer step: average = decay average + (1 - decay) weights. None:
    there is none."""


def learning_rate_at(done: float, params: OptimParams) -> float:
    """Learning rate once ``done`` steps of the run are behind: linear warmup, then constant, or down to 0 at the end.

    ``done`` is a fraction within a step that takes several optimizer steps. A pure function of it, so that a resumed
    run needs no scheduler state, and a step that takes fewer optimizer steps than another, or none, leaves the end
    where it is.
    """
    if done < params.warmup_steps:
        return params.learning_rate * (done + 1) / (params.warmup_steps + 1)
    share = min(1.0, (done - params.warmup_steps) / max(1, params.total_steps - params.warmup_steps))
    if params.lr_schedule == "linear":
        return params.learning_rate * (1 - share)
    if params.lr_schedule == "cosine":
        return params.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
    return params.learning_rate


class Part:
    """One of torch's optimizers over some of a model's parameters.

    Where these are sharded, an optimizer that is not ``elementwise`` gets whole ones: each parameter has an owner, the
    rank that keeps a float32 copy of it with its optimizer state, is given its whole gradient, and tells the others
    what has become of it. Stepping, saving and loading are collectives then, and the numbers those of one process.
    """

    def __init__(
        self,
        build: Callable[[Stepped], torch.optim.Optimizer],
        decay: float,
        parameters: Seq[nn.Parameter],
        world: World,
        *,
        elementwise: bool,
    ) -> None:
        """``decay`` is the weight decay of matrices; biases and norms have none, as usual."""
        self.parameters = sorted(parameters, key=lambda p: p.ndim < 2)
        self.world = world
        self.owners: list[int] | None = None
        self.stepped = self.parameters
        """What is stepped: the parameters themselves, or copies of those that this rank owns, and empty ones."""
        if not elementwise and any(isinstance(p, DTensor) for p in parameters):
            ranks = enumerate(divide([p.numel() for p in self.parameters], world.size))
            self.owners = [rank for _, rank in sorted((place, rank) for rank, places in ranks for place in places)]
            self.stepped = [nn.Parameter(local(p).new_empty([0] * p.ndim)) for p in self.parameters]
            self._copy()
        matrices = sum(p.ndim >= 2 for p in self.parameters)
        groups = [(self.stepped[:matrices], decay), (self.stepped[matrices:], 0.0)]
        self.optimizer = build([{"params": list(group), "weight_decay": d} for group, d in groups if group])

    def _copy(self) -> None:
        for _, parameter, stepped, mine in self._owned():
            value = unsharded(parameter)
            if mine:
                stepped.data = value.to(stepped.device, copy=True)

    def _owned(self) -> Iterator[tuple[int, nn.Parameter, nn.Parameter, bool]]:
        """Of each parameter: its owner, itself, its copy, and whether this rank is the owner."""
        assert self.owners is not None
        for owner, parameter, stepped in zip(self.owners, self.parameters, self.stepped, strict=True):
            yield owner, parameter, stepped, owner == self.world.rank

    @torch.no_grad()
    def step(self) -> None:
        if self.owners is None:
            self.optimizer.step()
            return
        for _, parameter, stepped, mine in self._owned():
            if parameter.grad is not None:
                gradient = unsharded(parameter.grad)
                stepped.grad = gradient.to(stepped.device) if mine else None
        self.optimizer.step()
        for owner, parameter, stepped, mine in self._owned():
            if parameter.grad is None:
                continue
            value = stepped.detach() if mine else stepped.new_empty(parameter.shape)
            value = value.to(self.world.device)
            dist.broadcast(value, group_src=owner, group=self.world.group)
            assign(parameter, value)
            stepped.grad = None

    def state_dict(self, *, keep: bool) -> dict[str, Any]:
        """The same whatever the number of ranks: tensors whole, on the CPU; None on a rank that does not ``keep``."""
        state = self.optimizer.state_dict()
        if self.owners is not None:
            # One parameter's after the other: a rank that does not keep them never holds all.
            for place, owner in enumerate(self.owners):
                slots = self.world.gather(whole(state["state"].get(place)))[owner]
                if slots is not None and keep:
                    state["state"][place] = slots
            state["state"] = dict(sorted(state["state"].items()))
        return whole(state, keep=keep)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what ``state_dict`` gave, on any number of ranks, once the parameters are loaded."""
        if self.owners is not None:
            self._copy()
        own = {
            place: _placed(slots, self.stepped[place])
            for place, slots in state["state"].items()
            if self.owners is None or self.owners[place] == self.world.rank
        }
        self.optimizer.load_state_dict({"state": own, "param_groups": state["param_groups"]})

    def tensors(self) -> Iterator[Tensor]:
        """What it holds beside the parameters."""
        for slots in self.optimizer.state.values():
            yield from (value for value in slots.values() if isinstance(value, Tensor))
        if self.owners is not None:
            yield from self.stepped


class Optimizer:
    """What steps a model's parameters: one of torch's optimizers, or several, each over parameters of its own."""

    def __init__(self, parts: Seq[Part]) -> None:
        self.parts = parts

    def step(self, learning_rate: float) -> None:
        for part in self.parts:
            for group in part.optimizer.param_groups:
                group["lr"] = learning_rate
            part.step()

    def zero_grad(self) -> None:
        """Drops the gradients."""
        for part in self.parts:
            for parameter in part.parameters:
                parameter.grad = None

    def state_dict(self, *, keep: bool = True) -> list[dict[str, Any]]:
        """See ``Part.state_dict``."""
        return [part.state_dict(keep=keep) for part in self.parts]

    def load_state_dict(self, states: Seq[Mapping[str, Any]]) -> None:
        """See ``Part.load_state_dict``."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)

    def tensors(self) -> Iterator[Tensor]:
        """What it holds beside the parameters."""
        for part in self.parts:
            yield from part.tensors()


def build_optimizer(
    named: Mapping[str, nn.Parameter], params: OptimParams, *, hidden: Seq[str] = (), world: World | None = None
) -> Optimizer:
    """The optimizer of that name. ``hidden`` are the names of the hidden layers' matrices, for Muon.

    Raises UserError where its library is missing.
    """
    rate, betas = params.learning_rate, params.betas

    builds: dict[OptimizerName, Callable[[Stepped], torch.optim.Optimizer]] = {
        "adamw": lambda groups: torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True),
        "adamw8bit": lambda groups: require_adamw8bit().optim.AdamW8bit(groups, lr=rate, betas=betas),
        "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=rate),
        "muon": lambda groups: torch.optim.Muon(groups, lr=rate, adjust_lr_fn="match_rms_adamw"),
    }

    def part(name: OptimizerName, parameters: list[nn.Parameter]) -> Part:
        elementwise = name == "adamw"
        return Part(builds[name], params.weight_decay, parameters, world or World(), elementwise=elementwise)

    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if params.optimizer != "muon":
        return Optimizer([part(params.optimizer, [*trained.values()])])
    matrices = [parameter for name, parameter in trained.items() if name in set(hidden)]
    rest = [parameter for name, parameter in trained.items() if name not in set(hidden)]
    return Optimizer([*([part("muon", matrices)] if matrices else []), *([part("adamw", rest)] if rest else [])])


def hidden_matrices(module: Any) -> list[str]:
    """Names of the parameters that Muon is for: with 2 dimensions, and of no embedding and no head.

    ``module`` is a transformers model: what it has beside its ``base_model`` is a head.
    """
    apart = [inner for inner in module.modules() if isinstance(inner, nn.Embedding)]
    apart += [head for head in (module.get_output_embeddings(),) if head is not None]
    kept = {id(parameter) for inner in apart for parameter in inner.parameters()}
    # Adapters of an embedding are what it is, and those of experts are many matrices in one.
    others = {name for pair in pairs_of(module).values() if pair.embedding or pair.stacked for name in (pair.a, pair.b)}
    body = {id(parameter) for parameter in module.base_model.parameters()} - kept
    return [n for n, p in module.named_parameters() if p.ndim == 2 and id(p) in body and n not in others]


def require_adamw8bit() -> Any:
    """bitsandbytes, which has it. Raises UserError where that is not installed."""
    return extra("bitsandbytes", "optimizer: adamw8bit is that", "quant")


def _placed(value: Any, parameter: Tensor) -> Any:
    """A parameter's optimizer state as it is loaded: tensors of its shape where the parameter is, others too."""
    if isinstance(value, Mapping):
        return {name: _placed(inner, parameter) for name, inner in value.items()}
    if not isinstance(value, Tensor):
        return value
    return like(value, parameter) if value.ndim else value.clone()
