"""SFT's loss, its means, and its independence of packing."""

import math

import pytest
import torch
from helpers.models import micro_batches

from tandem.batch import Outputs
from tandem.data.packing import pack, stamp_weights
from tandem.methods.sft import SFT
from tandem.types import Sequence

SEQUENCES = [
    Sequence(token_ids=[0, 1, 2, 3], trainable=[False, False, True, True]),
    Sequence(token_ids=[4, 5], trainable=[False, True]),
]
LOGP = torch.tensor([0.0, 0.0, -1.0, -2.0, 0.0, -6.0], requires_grad=True)


@pytest.mark.parametrize(("aggregation", "expected"), [("token", 9 / 3), ("sequence", (1.5 + 6) / 2)])
def test_means(aggregation, expected):
    sft = SFT(aggregation=aggregation)
    batch = stamp_weights(pack(SEQUENCES), sft.aggregation)
    token_loss = sft.loss(Outputs(logp_T=LOGP), batch)
    assert (token_loss.loss_T * batch.weight_T).sum().item() == pytest.approx(expected, abs=1e-6)


def test_is_torchs_cross_entropy():
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = stamp_weights(pack(SEQUENCES), "token")
    logp_T = torch.zeros(6, dtype=torch.float64)
    for t in batch.trainable_T.nonzero().squeeze(-1).tolist():
        logp_T[t] = logits[t - 1].log_softmax(-1)[batch.token_ids_T[t]]
    labels = torch.where(batch.trainable_T, batch.token_ids_T, -100)
    expected = torch.nn.functional.cross_entropy(logits[:-1], labels[1:])
    loss = (SFT().loss(Outputs(logp_T=logp_T), batch).loss_T * batch.weight_T).sum()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-7)


def test_micro_batches_add_up():
    batch = stamp_weights(pack(SEQUENCES), "token")
    sft = SFT()

    def logp(b):
        return LOGP[b.token_ids_T]

    whole = (sft.loss(Outputs(logp_T=logp(batch)), batch).loss_T * batch.weight_T).sum()
    parts = sum((sft.loss(Outputs(logp_T=logp(b)), b).loss_T * b.weight_T).sum() for b in micro_batches(batch, 1))
    assert math.isclose(whole.item(), parts.item(), abs_tol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(parts, LOGP), torch.autograd.grad(whole, LOGP), rtol=0, atol=1e-6)


def test_missing_output_is_named():
    with pytest.raises(ValueError, match="logp_T"):
        SFT().loss(Outputs(), stamp_weights(pack(SEQUENCES), "token"))
