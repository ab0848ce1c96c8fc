"""A small random GRPO problem, and what TRL says of it.

Where TRL is installed, ``python tests/methods/trl_golden.py`` makes the numbers again: TRL's own
``GRPOTrainer._compute_loss`` runs on the log-probs of the problem, without a model. The script writes
``trl_golden.json``: the loss and its gradient by each log-prob, for each of ``CASES``.
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
CASES: dict[str, dict[str, Any]] = {
    # What is not named here is as GRPOConfig has it: loss_type "dapo", epsilon 0.2, use_bias_correction_kl True.
    "default": {"beta": 0.1},
    "two_sided": {"beta": 0.1, "delta": 3.0},
    "paper_of_2024": {"beta": 0.04, "loss_type": "grpo", "use_bias_correction_kl": False},
    "no_kl": {"beta": 0.0, "delta": 3.0},
    "clip_higher": {"beta": 0.0, "epsilon_high": 0.28},
    "dr_grpo": {"beta": 0.0, "loss_type": "dr_grpo", "max_completion_length": 20},
    # As in the paper of GSPO but for wider bounds, on both sides of which there are ratios.
    "gspo": {
        "beta": 0.0, "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.15
    },
    "cispo": {"beta": 0.0, "loss_type": "cispo", "epsilon_high": 1.5},
    "token_truncate": {"beta": 0.0, "use_vllm": True, "vllm_importance_sampling_mode": "token_truncate",
                       "vllm_importance_sampling_clip_max": 1.3},
    "sequence_truncate": {"beta": 0.0, "use_vllm": True, "vllm_importance_sampling_mode": "sequence_truncate",
                          "vllm_importance_sampling_clip_min": 0.8, "vllm_importance_sampling_clip_max": 1.3},
    # Where the denominator is a constant, and each sequence keeps a token: TRL counts what it leaves out.
    "token_mask": {"beta": 0.0, "loss_type": "dr_grpo", "max_completion_length": 20, "use_vllm": True,
                   "vllm_importance_sampling_mode": "token_mask",
                   "vllm_importance_sampling_clip_min": 0.66, "vllm_importance_sampling_clip_max": 1.4},
    "token_mask_above": {"beta": 0.0, "loss_type": "dr_grpo", "max_completion_length": 20, "use_vllm": True,
                         "vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_max": 1.4},
    "cispo_token_truncate": {"beta": 0.0, "loss_type": "cispo", "epsilon_high": 1.5, "use_vllm": True,
                             "vllm_importance_sampling_mode": "token_truncate",
                             "vllm_importance_sampling_clip_max": 1.3},
}  # fmt: skip


def problem() -> dict[str, list[list[float]]]:
    """Log-probs for each token: of the policy now and before the step, of the reference and of the sampler.

    And an advantage for each sequence.
    """
    rng = random.Random(0)
    logp = [[rng.uniform(-4, -0.1) for _ in range(n)] for n in LENGTHS]
    # Ratios on both sides of every bound, and one beyond delta.
    old = [[x + rng.gauss(0, 0.4) for x in row] for row in logp]
    old[1][2], old[3][0] = logp[1][2] - 1.5, logp[3][0] - 1.4
    reference = [[x + rng.gauss(0, 0.8) for x in row] for row in logp]
    sampler = [[x + rng.gauss(0, 0.3) for x in row] for row in old]
    return {
        "logp": logp, "old": old, "reference": reference, "advantages": [[1.2, -0.7, 0.4, -1.1, 0.9, -0.7]],
        "sampler": sampler,
    }  # fmt: skip


def trl_gradient(knobs: dict[str, Any]) -> dict[str, Any]:
    """TRL's loss, and its gradient by each log-prob."""
    from trl import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    def padded(rows: list[list[float]]) -> torch.Tensor:
        width = max(LENGTHS)
        return torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float64)

    given = problem()
    logp = padded(given["logp"]).requires_grad_()
    mask = padded([[1.0] * n for n in LENGTHS])
    args = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **knobs)
    trainer = object.__new__(GRPOTrainer)
    trainer.args, trainer.beta, trainer.loss_type = args, args.beta, args.loss_type
    trainer.epsilon_low = args.epsilon
    trainer.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    trainer.importance_sampling_level = args.importance_sampling_level
    trainer.top_entropy_quantile, trainer.off_policy_mask_threshold = args.top_entropy_quantile, None
    trainer.aux_loss_enabled = trainer._entropy_bonus_enabled = False
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = args.use_vllm, True
    trainer.max_completion_length = args.max_completion_length
    trainer.model = SimpleNamespace(training=False)
    trainer.accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer._metrics = {"eval": defaultdict(list)}
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.zeros_like(logp), None)
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(LENGTHS), 1),
        "completion_ids": torch.zeros_like(logp, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": torch.tensor(given["advantages"][0], dtype=torch.float64),
        "old_per_token_logps": padded(given["old"]),
        "ref_per_token_logps": padded(given["reference"]),
        "num_items_in_batch": mask.sum(),
    }
    if args.use_vllm:
        # The formula of _generate_and_score_completions, which needs a model for the rest of it.
        gap = (inputs["old_per_token_logps"] - padded(given["sampler"])) * mask
        if args.vllm_importance_sampling_mode.startswith("sequence"):
            gap = gap.sum(dim=-1, keepdim=True)
        low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
        ratio = gap.exp()
        outside = (ratio < (low or 0.0)) | (ratio > high)
        masks = args.vllm_importance_sampling_mode.endswith("mask")
        inputs["importance_sampling_ratio"] = ratio.masked_fill(outside, 0.0) if masks else ratio.clamp(low, high)
    loss = trainer._compute_loss(None, inputs)
    (gradient,) = torch.autograd.grad(loss, logp)
    return {"loss": loss.item(), "gradient": [g[:n] for g, n in zip(gradient.tolist(), LENGTHS, strict=True)]}


if __name__ == "__main__":
    import trl

    golden = {"trl": trl.__version__} | {name: trl_gradient(knobs) for name, knobs in CASES.items()}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
