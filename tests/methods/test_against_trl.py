"""Loss and gradient of TRL 1.16 for the methods that it has: ``trl_golden.py`` makes the numbers again."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.batches import seen_batch
from trl_golden import CASES, GOLDEN, problem

from tandem.batch import Outputs
from tandem.config import with_keys
from tandem.data.packing import pack, stamp_weights
from tandem.methods.cispo import CISPO
from tandem.methods.dapo import DAPO
from tandem.methods.dr_grpo import DrGRPO
from tandem.methods.grpo import GRPO
from tandem.methods.gspo import GSPO
from tandem.methods.tokens import corrected
from tandem.types import Sequence

PAPER_OF_2024 = {"aggregation": "sequence", "kl_coef": 0.04, "kl_estimator": "k3", "dual_clip": None}
ONE_SIDED = with_keys(GRPO(), dual_clip=None)
METHODS = {
    "default": with_keys(ONE_SIDED, kl_coef=0.1),
    "two_sided": with_keys(GRPO(), kl_coef=0.1),
    "paper_of_2024": with_keys(GRPO(), **PAPER_OF_2024),
    "no_kl": GRPO(),
    "clip_higher": DAPO(),
    "dr_grpo": DrGRPO(),
    "gspo": with_keys(GSPO(), clip_low=0.1, clip_high=0.15),
    # TRL's epsilon_high is the bound itself.
    "cispo": with_keys(CISPO(), clip_high=0.5),
    "token_truncate": with_keys(ONE_SIDED, correction="token_tis", correction_high=1.3),
    "sequence_truncate": with_keys(ONE_SIDED, correction="sequence_tis", correction_low=0.8, correction_high=1.3),
    "token_mask": with_keys(DrGRPO(), correction="icepop", correction_low=0.66, correction_high=1.4),
    "token_mask_above": with_keys(DrGRPO(), correction="decoupled", correction_high=1.4),
    "cispo_token_truncate": with_keys(CISPO(), clip_high=0.5, correction="token_tis", correction_high=1.3),
}


def test_every_number_of_trl_is_compared():
    assert METHODS.keys() == CASES.keys() == json.loads(GOLDEN.read_text()).keys() - {"trl"}


@pytest.mark.parametrize("case", METHODS)
def test_loss_and_gradient_are_trls(case):
    method, given, golden = METHODS[case], problem(), json.loads(GOLDEN.read_text())[case]
    batch = pack([Sequence(token_ids=[0] * (1 + len(x)), trainable=[False] + [True] * len(x)) for x in given["logp"]])

    def flat(rows):
        return torch.tensor([y for row in rows for y in [0.0, *row]], dtype=torch.float64)

    batch = seen_batch(
        stamp_weights(batch, method.aggregation, constant_length=20),
        old_logp_T=flat(given["old"]),
        reference_logp_T=flat(given["reference"]),
    )
    batch = replace(
        batch,
        advantage_T=torch.tensor(given["advantages"][0], dtype=torch.float64)[batch.segment_T] * batch.trainable_T,
        untruncated_logp_T=flat(given["sampler"]),
        state={"kl_coef": method.reference_kl.kl_coef},
    )
    batch, _ = corrected(batch, method.importance)
    logp_T = flat(given["logp"]).requires_grad_()
    loss = (method.loss(Outputs(logp_T=logp_T), batch).loss_T * batch.weight_T).sum()
    (gradient_T,) = torch.autograd.grad(loss, logp_T)
    # Weights are float32.
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-7)
    torch.testing.assert_close(gradient_T, flat(golden["gradient"]), rtol=0, atol=1e-7)
