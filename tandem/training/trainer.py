"""A model and its optimizer in this process. The trainer is given a loss and knows nothing of the algorithm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tandem.errors import NonFiniteError
from tandem.models.forward import LoadedModel, concatenate, forward
from tandem.roles import LossFn, Metrics
from tandem.training.optim import OptimParams, build_optimizer, learning_rate_at
from tandem.types import Batch, Outputs, TokenLoss


class LocalScorer:
    """A model that only looks: a frozen reference or a reward model (``tandem.roles.Scorer``)."""

    def __init__(self, model: LoadedModel, *, token_budget: int, temperature: float = 1.0) -> None:
        self.model = model
        self.token_budget = token_budget
        self.temperature = temperature

    @torch.no_grad()
    def score(self, batch: Batch) -> Outputs:
        """Log-probs at the temperature, or values and scores, in micro-batches of ``token_budget`` tokens."""
        device = self.model.device
        return concatenate(
            [
                forward(self.model, micro.to(device), temperature=self.temperature)
                for micro in batch.split(self.token_budget)
            ]
        )


class LocalTrainer(LocalScorer):
    """Trains a model with a loss that returns unreduced per-token values (``tandem.roles.Trainer``).

    ``entropy`` asks the forward for entropies (the loss may report them), ``entropy_gradient`` for differentiable
    ones (the loss uses them).
    """

    def __init__(
        self,
        model: LoadedModel,
        loss: LossFn,
        optim: OptimParams,
        *,
        token_budget: int,
        temperature: float = 1.0,
        entropy: bool = False,
        entropy_gradient: bool = False,
    ) -> None:
        super().__init__(model, token_budget=token_budget, temperature=temperature)
        self.loss = loss
        self.optim = optim
        self.entropy = entropy
        self.entropy_gradient = entropy_gradient
        self.optimizer = build_optimizer(model.module.parameters(), optim)
        self._version = 0

    @property
    def version(self) -> int:
        return self._version

    def forward_backward(self, batch: Batch) -> Metrics:
        """Adds the gradient of ``(loss_T * weight_T).sum()`` and returns the loss and the mean of its metrics.

        Raises NonFiniteError naming the batch's segments where the loss is not finite; the parameters are as they
        were, and the gradient gathered so far is dropped.
        """
        means = _WeightedMeans()
        for micro, token_loss in self._losses(batch):
            total = (token_loss.loss_T * micro.weight_T).sum()
            if not torch.isfinite(total):
                self.optimizer.zero_grad(set_to_none=True)
                raise NonFiniteError(_describe_non_finite(micro, token_loss))
            total.backward()
            means.add(micro, token_loss)
        return means.result()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Metrics:
        """Loss and metrics without a gradient. ``batch`` needs its weights stamped."""
        means = _WeightedMeans()
        for micro, token_loss in self._losses(batch):
            means.add(micro, token_loss)
        return means.result()

    def optim_step(self) -> Metrics:
        """Clips the gradient to ``max_grad_norm``, steps and clears it.

        Raises NonFiniteError where the gradient is not finite, before any parameter changes.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.model.module.parameters(), self.optim.max_grad_norm)
        if not torch.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError("the gradient is not finite though the loss is; lower the learning rate")
        learning_rate = learning_rate_at(self._version, self.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # Counted first: whoever is interrupted from here on must not be taken for untouched.
        self._version += 1
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm.item(), "learning_rate": learning_rate}

    def state_dict(self) -> dict[str, Any]:
        """Parameters, optimizer state and version: all that the next step depends on."""
        return {
            "model": self.model.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "version": self._version,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._version = state["version"]

    def export(self, folder: Path) -> None:
        self.model.export(folder)

    def _losses(self, batch: Batch) -> Iterator[tuple[Batch, TokenLoss]]:
        device = self.model.device
        for part in batch.split(self.token_budget):
            micro = part.to(device)
            out = forward(
                self.model,
                micro,
                temperature=self.temperature,
                entropy=self.entropy,
                entropy_gradient=self.entropy_gradient,
            )
            yield micro, self.loss(out, micro)


class _WeightedMeans:
    """The total loss, and every metric's mean over the tokens whose weight is not zero."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.tokens = 0
        self.sums: dict[str, float] = {}

    def add(self, batch: Batch, token_loss: TokenLoss) -> None:
        mask_T = batch.weight_T != 0
        self.loss += (token_loss.loss_T.detach() * batch.weight_T).sum().item()
        self.tokens += int(mask_T.sum())
        for name, value_T in token_loss.metrics_T.items():
            total = (value_T.detach() * mask_T).sum(dtype=torch.float64).item()
            self.sums[name] = self.sums.get(name, 0.0) + total

    def result(self) -> Metrics:
        return {"loss": self.loss} | {name: total / max(self.tokens, 1) for name, total in self.sums.items()}


def _describe_non_finite(batch: Batch, token_loss: TokenLoss) -> str:
    bad_T = ~torch.isfinite(token_loss.loss_T) & (batch.weight_T != 0)
    segments = batch.segment_T[bad_T].unique()
    if batch.index_S is not None:
        segments = batch.index_S[segments]
    first = ", ".join(map(str, segments.tolist()[:5])) or "none alone, only their sum"
    return f"the loss is not finite ({int(bad_T.sum())} tokens; samples of this step: {first}); lower the learning rate"
