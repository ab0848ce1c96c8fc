"""Small random pairs and labelled answers, and what TRL says of them.

Where TRL is installed, ``python tests/methods/preference_golden.py`` makes the numbers again: TRL's own
``DPOTrainer._compute_loss`` and ``KTOTrainer._compute_loss`` run on the log-probs of the problem, without a model. The
script writes ``preference_golden.json``: the loss and its gradient by each log-prob, for each of ``CASES``.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

GOLDEN = Path(__file__).with_suffix(".json")
LENGTHS = [3, 6, 1, 4, 5, 2]
"""Of six answers: three pairs, chosen and rejected in turn, or six answers with a label each."""
LABELS = [True, False, False, True, True, False]
DPO_CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 0.3},
    "ipo": {"beta": 0.3, "loss_type": ["ipo"]},
    "hinge": {"beta": 0.8, "loss_type": ["hinge"]},
    "apo_zero": {"beta": 0.3, "loss_type": ["apo_zero"]},
    "sigmoid_norm": {"beta": 2.0, "loss_type": ["sigmoid_norm"]},
}
KTO_CASES: dict[str, dict[str, Any]] = {
    "kto": {"beta": 0.3},
    "kto_weights": {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.6},
    "kto_clamped": {"beta": 0.3},
}
"""In the last one the mismatched answers are less likely than by the reference, so that the KL would be below 0."""


def problem() -> dict[str, list[list[float]]]:
    """Log-probs of the policy and the reference for each token of the answers, and of the answers to other prompts."""
    rng = random.Random(0)
    logp, mismatched = ([[rng.uniform(-4, -0.1) for _ in range(n)] for n in LENGTHS] for _ in range(2))
    reference = [[x + rng.gauss(0, 0.8) for x in row] for row in logp]
    return {
        "logp": logp,
        "reference": reference,
        "mismatched": mismatched,
        "mismatched_reference": [[x - abs(rng.gauss(0, 0.2)) for x in row] for row in mismatched],
    }


def _padded(rows: list[list[float]]) -> torch.Tensor:
    """A column of the prompt before the answers, to be shifted away."""
    width = max(LENGTHS)
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float64)


def _said(logp: torch.Tensor) -> SimpleNamespace:
    """What a model with a fused head returns."""
    zeros = torch.zeros_like(logp)
    return SimpleNamespace(log_probs=logp, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def _inputs(mask: torch.Tensor, prefix: str = "") -> dict[str, torch.Tensor]:
    whole = torch.cat([torch.zeros(len(mask), 1), mask], dim=1)
    ids = torch.ones_like(whole, dtype=torch.int64)
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": ids, f"{prefix}completion_mask": whole}


def _trainer(cls: type, args: Any) -> Any:
    trainer = object.__new__(cls)
    trainer.args, trainer.beta = args, args.beta
    trainer.accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    trainer.model = SimpleNamespace(training=False)
    trainer.aux_loss_enabled, trainer.precompute_ref_logps = False, True
    trainer._metrics, trainer._total_train_tokens = {"eval": defaultdict(list)}, 0
    return trainer


def dpo_gradient(knobs: dict[str, Any]) -> dict[str, Any]:
    """TRL's loss of the pairs, and its gradient by each log-prob."""
    from trl import DPOConfig, DPOTrainer

    given = problem()
    args = DPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **knobs)
    trainer = _trainer(DPOTrainer, args)
    trainer.ld_alpha, trainer.use_weighting, trainer.f_divergence_type = None, False, "reverse_kl"
    trainer.loss_types, trainer.loss_weights = args.loss_type, [1.0] * len(args.loss_type)
    trainer.label_smoothing = args.label_smoothing
    order = [0, 2, 4, 1, 3, 5]  # chosen answers first
    logp = _padded(given["logp"]).requires_grad_()
    reference = _padded(given["reference"])[order].sum(1)
    inputs = _inputs(_padded([[1.0] * n for n in LENGTHS])[order])
    inputs |= {"ref_chosen_logps": reference[:3], "ref_rejected_logps": reference[3:]}
    return _answer(trainer._compute_loss(lambda **_: _said(logp[order]), inputs, False), logp)


def kto_gradient(name: str, knobs: dict[str, Any]) -> dict[str, Any]:
    """TRL's loss of the labelled answers, and its gradient by each log-prob."""
    from trl import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    given = problem()
    args = KTOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **knobs)
    trainer = _trainer(KTOTrainer, args)
    trainer.loss_type, trainer.calculate_KL = args.loss_type, True
    trainer.desirable_weight, trainer.undesirable_weight = args.desirable_weight, args.undesirable_weight
    logp = _padded(given["logp"]).requires_grad_()
    mask = _padded([[1.0] * n for n in LENGTHS])
    mismatched, by_reference = mismatched_of(name, given)
    inputs = _inputs(mask) | _inputs(mask, "KL_") | {"label": torch.tensor(LABELS)}
    inputs |= {"ref_logps": _padded(given["reference"]).sum(1), "ref_KL_logps": _padded(by_reference).sum(1)}
    said = iter([_said(_padded(mismatched)), _said(logp)])  # the answers to other prompts are asked for first
    return _answer(trainer._compute_loss(lambda **_: next(said), inputs, False), logp)


def mismatched_of(name: str, given: dict[str, list[list[float]]]) -> tuple[list[list[float]], list[list[float]]]:
    """Log-probs of the answers to other prompts, of policy and reference."""
    both = given["mismatched"], given["mismatched_reference"]
    return both[::-1] if name == "kto_clamped" else both


def _answer(loss: torch.Tensor, logp: torch.Tensor) -> dict[str, Any]:
    (gradient,) = torch.autograd.grad(loss, logp)
    return {"loss": loss.item(), "gradient": [g[:n] for g, n in zip(gradient.tolist(), LENGTHS, strict=True)]}


if __name__ == "__main__":
    import trl

    golden = {"trl": trl.__version__}
    golden |= {name: dpo_gradient(knobs) for name, knobs in DPO_CASES.items()}
    golden |= {name: kto_gradient(name, knobs) for name, knobs in KTO_CASES.items()}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
