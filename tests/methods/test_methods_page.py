"""The example of docs/methods.md works as it stands there."""

import math
import re
from pathlib import Path

import pytest
import torch
from helpers.sampled_step import make_step

from tandem.data.packing import stamp_weights
from tandem.functional.advantages import group_normalised

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


@pytest.fixture
def step():
    return make_step(0)


def test_your_own_method_in_one_file(step, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "sapo_from_docs.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    from sapo_from_docs import SAPO

    sapo = SAPO(temperature_bad=2.0)
    estimate = sapo.estimate(step.groups, step.batch(), sapo.initial_state())
    batch = stamp_weights(estimate.batch, sapo.aggregation)
    token_loss = sapo.loss(step.outputs(batch), batch)
    (token_loss.loss_T * batch.weight_T).sum().backward()

    advantages = [a for g in step.groups for a in group_normalised(g.rewards)]
    tokens = int(batch.trainable_T.sum())
    expected = torch.zeros_like(step.theta)
    for t in batch.trainable_T.nonzero().squeeze(-1).tolist():
        token, advantage = batch.token_ids_T[t], advantages[int(batch.segment_T[t])]
        ratio = (step.theta[token] - step.old_logp[token]).exp().item()
        gate = 1 / (1 + math.exp(-(1.0 if advantage > 0 else 2.0) * (ratio - 1)))
        expected[token] = -4 * gate * (1 - gate) * ratio * advantage / tokens
    # Advantages and weights are float32.
    torch.testing.assert_close(step.theta.grad, expected, rtol=0, atol=1e-7)
    assert token_loss.metrics_T["ratio"].max().item() > 1.1
    assert sapo.needs() == ()
    assert set(sapo.losses()) == {"actor"}
