"""What every method of the table promises. A method that is added to the table is held to it by its line alone."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import Literal, get_args, get_origin

import pytest
import torch
from helpers.method_steps import Models, estimated, items_of, losses_and_gradients
from helpers.models import micro_batches
from torch import Tensor

from tandem.batch import Outputs
from tandem.config import _keys_of, settings, with_keys
from tandem.errors import UserError
from tandem.methods.base import Method, Rows, Samples
from tandem.methods.grpo import GRPO
from tandem.methods.ppo import PPO
from tandem.methods.table import METHODS, ROWS, method_class
from tandem.methods.tokens import TokenMethod
from tandem.types import Group, Prompt

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def settings_of(cls: type[Method]) -> Iterator[Method]:
    """The defaults; those with the terms that a coefficient of 0 leaves out; of these each with another choice."""
    keys = _keys_of(cls).items()
    yield cls()
    full = with_keys(cls(), **{name: 0.1 for name, key in keys if key.annotation is float and key.default == 0.0})
    yield full
    for name, key in keys:
        kinds = get_args(key.annotation) if get_origin(key.annotation) is UnionType else (key.annotation,)
        literals = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        choices = literals or ((True, False) if bool in kinds else ())
        for choice in (*choices, *([None] if type(None) in kinds else [])):
            try:
                yield with_keys(full, **{name: choice})
            except UserError:
                continue  # A choice that the other knobs exclude.


def named(method: Method) -> str:
    defaults = settings(type(method)())
    return "-".join([type(method).__name__, *(f"{k}={x}" for k, x in settings(method).items() if x != defaults[k])])


COMBINED = [
    with_keys(PPO(), kl="loss", entropy_coef=0.01, dual_clip=2.0, normalize_rewards=True),
    with_keys(PPO(), aggregation="sequence", whiten_advantages=False, value_clip=None, kl="none"),
    with_keys(PPO(), kl_target=6.0, critic_warmup_steps=1),
    PPO(lam_alpha=0.5, critic_lam=1.0),
    with_keys(GRPO(), normalize="none", aggregation="constant", kl_coef=0.0),
]
SETTINGS = list(
    {named(x): x for x in [*(x for name in METHODS for x in settings_of(method_class(name))), *COMBINED]}.values()
)


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


@pytest.fixture
def cls(name):
    return method_class(name)


@pytest.fixture(params=SETTINGS, ids=named)
def method(request):
    return request.param


def test_a_method_is_read_without_torch():
    code = """
import sys
from tandem.methods.dapo import DAPO
from tandem.methods.grpo import GRPO
from tandem.methods.ppo import PPO
from tandem.methods.table import METHODS, method_class
for name in METHODS:
    method = method_class(name)()
    method.needs(), method.losses(), method.asks, method.initial_state()
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_it_is_a_frozen_dataclass_of_documented_knobs(cls):
    assert issubclass(cls, Method)
    assert cls.__dataclass_params__.frozen
    assert all(f.kw_only for f in fields(cls))
    for key in _keys_of(cls).values():
        assert not key.required, key.name
        assert key.doc, f"{key.name} has no docstring"


def test_it_says_what_it_is(name, cls):
    assert cls.__doc__
    assert [other for other in METHODS if method_class(other).title == cls.title] == [name]
    first, *_ = cls.help_of(name).strip().splitlines()
    assert first.endswith(".")
    assert re.search(rf"^\s*Example: tandem {name} ", cls.help_of(name), re.MULTILINE)
    assert cls.leads
    assert isinstance(cls.reads, Rows if name in ROWS else Samples)


def test_the_page_has_a_section_with_every_knob(cls):
    section = PAGE.read_text().split(f"\n## {cls.__name__}\n")[1].split("\n## ")[0]
    on_the_page = set(re.findall(r"`(\w+)`", section)) | {"aggregation"}
    shared = set(re.findall(r"`(\w+)`", PAGE.read_text().split("\n## Knobs that methods share\n")[1].split("\n## ")[0]))
    common = {name: key.default for name, key in _keys_of(TokenMethod).items()}
    for name, key in _keys_of(cls).items():
        # What is as everywhere stands once on the page.
        usual = name in common and key.default == common[name]
        assert name in (on_the_page | shared if usual else on_the_page), name


def test_its_models_have_roles_of_their_own(cls):
    roles = [need.role for need in cls.models]
    assert len({"actor", *roles}) == 1 + len(roles)
    assert all(need.doc for need in cls.models)


def test_it_needs_some_of_its_models_and_has_a_loss_for_what_is_trained(method):
    assert set(method.needs()) <= set(method.models)
    assert set(method.losses()) == {"actor"} | {need.role for need in method.needs() if need.trained}


def test_losses_are_finite_and_reach_nothing_but_what_was_answered(method):
    models = Models(method)
    batch = estimated(method, models, items_of(method)).batch
    # Where a head has read an answer's token, and where it is about to.
    answered_T = batch.trainable_T
    before_T = torch.cat([answered_T[1:], answered_T.new_zeros(1)])
    for role, loss in method.losses().items():
        said = models.said(role, models.tables[role].detach(), batch)
        leaves = {name: x.requires_grad_() for name, x in vars(said).items() if x is not None}
        token_loss = loss(Outputs(**leaves), batch)
        assert token_loss.loss_T.shape == (batch.tokens,)
        for x_T in (token_loss.loss_T, *token_loss.metrics_T.values()):
            assert x_T.shape == (batch.tokens,)
            assert torch.isfinite(x_T).all()
        assert not any(x_T.requires_grad for x_T in token_loss.metrics_T.values())
        (token_loss.loss_T * batch.weight_T).sum().backward()
        gradients = {name: x.grad for name, x in leaves.items() if x.grad is not None}
        assert any(gradient_T.any() for gradient_T in gradients.values())
        for name, gradient_T in gradients.items():
            reached_T = answered_T if name != "scalar_T" else before_T if role != "actor" else answered_T | before_T
            assert torch.isfinite(gradient_T).all()
            assert not gradient_T[~reached_T].any(), name


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def test_law_3_micro_batches_add_up_to_the_whole(method):
    models = Models(method)
    batch = estimated(method, models, items_of(method)).batch
    expected = losses_and_gradients(method, models, batch)
    for token_budget in (1, 20, 50):
        micros = micro_batches(batch, token_budget)
        assert len(micros) > 1
        close(losses_and_gradients(method, models, batch, lambda whole, micros=micros: micros), expected)


def test_law_3_order_does_not_matter(method):
    models, items = Models(method), items_of(method)
    forwards, backwards = estimated(method, models, items), estimated(method, models, items[::-1])
    expected = losses_and_gradients(method, models, forwards.batch)
    close(losses_and_gradients(method, models, backwards.batch), expected)
    assert backwards.metrics == pytest.approx(forwards.metrics, abs=1e-12)
    assert backwards.state == pytest.approx(forwards.state, abs=1e-12)
    turned = forwards.batch.select(list(range(forwards.batch.units))[::-1])
    close(losses_and_gradients(method, models, turned), expected)


SAMPLED = [method for method in SETTINGS if isinstance(method.reads, Samples)]


@pytest.mark.parametrize("method", SAMPLED, ids=named)
def test_tokens_that_are_not_trained_on_do_not_matter(method):
    models, results = Models(method), []
    for extra in ({}, {"extra_prompt": 5}, {"extra_tail": 3}):
        estimate = estimated(method, models, items_of(method, **extra))
        results.append((losses_and_gradients(method, models, estimate.batch), estimate.metrics))
    for found, metrics in results[1:]:
        close(found, results[0][0], 1e-12)
        assert metrics == pytest.approx(results[0][1], abs=1e-12)


@pytest.mark.parametrize("method", SAMPLED, ids=named)
def test_rollouts_that_are_not_usable_change_nothing(method):
    models, groups = Models(method), items_of(method)

    def unusable(rollout):
        return [replace(rollout, stop="error", reward=99.0), replace(rollout, reward=None)]

    among = [replace(g, rollouts=[*unusable(g.rollouts[0]), *g.rollouts]) for g in groups]
    alone = Group(prompt=Prompt(prompt_id="p", prompt="", token_ids=()), rollouts=unusable(groups[0].rollouts[0]))
    without, found = (estimated(method, models, x) for x in (groups, [*among, alone]))
    assert torch.equal(*(losses_and_gradients(method, models, x.batch) for x in (found, without)))
    assert (found.metrics, found.state) == (without.metrics, without.state)
