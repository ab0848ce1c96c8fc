"""The example of docs/methods.md works as it stands there, and its table is that of the methods."""

import math
import re
from pathlib import Path

import pytest
import torch
from helpers.sampled_step import make_step

from tandem.assembly.configs.methods import config_class
from tandem.config import _keys_of
from tandem.data.packing import stamp_weights
from tandem.functional.advantages import group_normalised
from tandem.methods.table import METHODS, method_class

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


def test_the_table_names_each_command_once_its_section_and_its_knobs():
    """In the columns: section, command, paper, formula, needs, knobs, when to take it."""
    text = PAGE.read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| ["]
    found = {row[1].strip("`"): row for row in lines if row[1].strip("`") in METHODS}
    assert found.keys() == METHODS.keys()
    assert len(lines) == len(found)
    for name, (title, _, _, formula, needs, knobs, when) in found.items():
        method = method_class(name)
        anchor = re.fullmatch(rf"\[{method.__name__}\]\(#(\w+)\)", title)
        assert anchor, name
        assert f"\n## {method.__name__}\n" in text
        assert anchor[1] == method.__name__.lower()
        assert formula
        assert when
        assert sorted(filter(None, needs.split(", "))) == sorted(need.role for need in method().needs()), name
        assert {knob.strip("`") for knob in knobs.split(", ")} <= _keys_of(config_class(name)).keys(), name
