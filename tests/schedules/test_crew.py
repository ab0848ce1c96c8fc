"""How a step goes through what is trained: one gradient at a time in a home, all at once over homes."""

import math
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers.sampled_step import make_step

from tandem.errors import NonFiniteError
from tandem.methods.sft import SFT
from tandem.parallel.world import World
from tandem.roles import call_all
from tandem.rollout.prepare import Preparation
from tandem.rollout.rows import Tokenized
from tandem.schedules.crew import Crew
from tandem.schedules.session import Session
from tandem.workers.homes import Here, seat_of
from tandem.workers.process import Site


class Recorded:
    """A trainer that writes down what it is asked."""

    def __init__(self, role, log, bad=False, sizes=()):
        self.role, self.log, self.bad, self.version = role, log, bad, 0
        self.sizes = list(sizes)

    def forward_backward(self, batch):
        self.log.append((self.role, "forward_backward", batch))
        if self.bad:
            raise NonFiniteError(f"the loss of the {self.role}")
        measured = {"effective_sample_size": self.sizes.pop(0)} if self.sizes else {}
        return {"loss": 1.0 + len(self.log), f"of_{self.role}": 0.5} | measured

    def optim_step(self, done, scale):
        self.log.append((self.role, "optim_step", done, scale))
        self.version += 1
        return {"grad_norm": 2.0, "learning_rate": 3.0 * scale}


class Minibatches(list):
    """As a prepared step."""

    metrics = {"kl": 0.25}  # noqa: RUF012

    class batch:
        tokens = 7


def crew(log, *homes, bad=(), sizes=(), ess_floor=None):
    """``homes`` are lists of roles that live together; ``sizes`` are effective ones of the actor's minibatches."""
    trainers = {}
    for roles in homes:
        home = Here(Site(World()))
        for role in roles:
            trainers[role] = home.place(
                role,
                lambda site, role=role: Recorded(role, log, role in bad, sizes if role == "actor" else ()),
            )
    ordered = {role: trainers[role] for role in ("actor", "critic", "judge") if role in trainers}
    return Crew(
        method=SFT(),
        tickets=None,
        source=Tokenized([]),
        prepare=Preparation(method=None, models={}),
        trainers=ordered,
        push_weights=None,
        evaluate=None,
        ess_floor=ess_floor,
    )


def train(made, log, minibatches=("a", "b"), roles=None):
    return made.train(
        Minibatches(minibatches), roles=roles or made.trainers, done=4, changing=lambda: log.append("changing")
    )


def test_roles_of_one_home_train_one_after_the_other():
    log = []
    metrics = train(crew(log, ["actor", "critic"]), log)
    step = [(role, verb) for role in ("actor", "critic") for verb in ("forward_backward", "optim_step")]
    assert [entry[:2] for entry in log if entry != "changing"] == step * 2
    assert [entry[2] for entry in log if entry[1] == "optim_step"] == [4, 4, 4.5, 4.5]
    assert log.index("changing") == 1
    # Means over minibatches. What every trainer reports carries the role's name, but for the actor's.
    assert metrics == {
        "kl": 0.25, "loss": (2 + 8) / 2, "of_actor": 0.5, "grad_norm": 2.0, "learning_rate": 3.0, "trained_tokens": 7.0,
        "critic_loss": (5 + 11) / 2, "of_critic": 0.5, "critic_grad_norm": 2.0, "critic_learning_rate": 3.0,
    }  # fmt: skip


def test_roles_of_two_homes_go_together_and_a_third_comes_after_the_one_it_lives_with():
    log = []
    train(crew(log, ["actor", "judge"], ["critic"]), log, ["a"])
    verbs = [("changing" if entry == "changing" else entry[:2]) for entry in log]
    assert verbs == [
        ("actor", "forward_backward"), ("critic", "forward_backward"), "changing",
        ("actor", "optim_step"), ("critic", "optim_step"),
        ("judge", "forward_backward"), "changing", ("judge", "optim_step"),
    ]  # fmt: skip


@pytest.mark.parametrize("homes", [[["actor", "critic"]], [["actor"], ["critic"]]])
def test_a_small_effective_sample_size_scales_the_actors_learning_rate(homes):
    log = []
    metrics = train(crew(log, *homes, sizes=[0.2, 0.5, 0.9], ess_floor=0.5), log, [SimpleNamespace(seen={})] * 3)
    scales = {role: [entry[3] for entry in log if entry[:2] == (role, "optim_step")] for role in ("actor", "critic")}
    assert scales == {"actor": [0.4, 1.0, 1.0], "critic": [1.0] * 3}
    assert metrics["ess_scale"] == pytest.approx(2.4 / 3)
    assert metrics["learning_rate"] == pytest.approx(3 * 2.4 / 3)
    assert metrics["critic_learning_rate"] == 3
    # A step that trains the critic alone has none.
    assert "ess_scale" not in train(crew(log, *homes, ess_floor=0.5), log, roles=["critic"])


def test_where_old_log_probs_are_known_the_sample_size_is_by_them():
    """What a correction has left of each minibatch, by a sum over its tokens."""
    batch = make_step(0).batch()
    gap_T = torch.linspace(-1, 1.5, batch.tokens) * batch.trainable_T
    batch = replace(batch, untruncated_logp_T=batch.proximal_logp_T - gap_T)
    minibatches = [batch.select([0, 5, 10]), batch.select([3, 8])]
    log, expected = [], []
    train(crew(log, ["actor"], sizes=[9.9, 9.9], ess_floor=0.99), log, minibatches)
    for minibatch in minibatches:
        gaps = minibatch.logp_by("actor") - minibatch.untruncated_logp_T
        w = [math.exp(gap) for gap, own in zip(gaps.tolist(), minibatch.trainable_T.tolist(), strict=True) if own]
        expected.append(sum(w) ** 2 / (len(w) * sum(x * x for x in w)) / 0.99)
    assert [entry[3] for entry in log if entry[1] == "optim_step"] == pytest.approx(expected)
    assert max(expected) < 1


def test_a_step_trains_the_roles_that_it_is_told():
    log = []
    made = crew(log, ["actor", "critic"])
    metrics = train(made, log, roles=["critic"])
    assert [entry[0] for entry in log if entry != "changing"] == ["critic"] * 4
    assert made.trainers["actor"].call("version") == 0
    assert set(metrics) == {
        "kl",
        "trained_tokens",
        "critic_loss",
        "of_critic",
        "critic_grad_norm",
        "critic_learning_rate",
    }


@pytest.mark.parametrize("bad", ["actor", "critic"])
def test_a_loss_that_is_not_finite_changes_nothing_in_either_home(bad):
    log = []
    with pytest.raises(NonFiniteError, match=bad):
        train(crew(log, ["actor"], ["critic"], bad=[bad]), log)
    assert "changing" not in log
    assert not any(entry[1] == "optim_step" for entry in log)


def test_a_learning_rate_that_stays_scaled_down_is_said_once():
    run, progress = mock.Mock(), mock.Mock()
    session = Session(run=run, store=None, save_every=None, trainers={}, progress=progress, clock=None)
    for scale in [0.5] * 4 + [0.995] + [0.25] * 7:
        session.reached({}, {"ess_scale": scale})
    session.reached({}, {"loss": 0.0})
    (note,) = run.event.call_args_list
    assert note.args == ("note",)
    assert note.kwargs["step"] == 10
    assert note.kwargs["message"].startswith("ess_floor has scaled the learning rate down for 5 steps (now by 0.25)")
    progress.note.assert_called_once()


class Slow:
    """The answer of another process, which comes when it has been waited for three times."""

    def __init__(self, waited):
        self.left, self.waited = 3, waited

    def done(self):
        return self.left == 0

    def wait(self, seconds):
        self.waited.append(seconds)
        self.left -= 1

    def result(self):
        assert self.done()
        return {"loss": 1.0}


class Elsewhere(Here):
    at_once = False

    def submit(self, role, verb, arguments):
        return Slow(self.site.roles[role])


def test_something_else_is_done_while_others_are_at_work():
    """As often as the slowest of them is asked, and once where all is done here."""
    looks, waited = [], []
    home = Elsewhere(Site(World()))
    seats = {"actor": home.place("actor", lambda site: waited), "here": seat_of(Recorded("here", []))}
    found = call_all(seats, "forward_backward", "batch", meanwhile=lambda: looks.append(len(waited)))
    assert (looks, found["actor"]) == ([0, 1, 2, 3], {"loss": 1.0})
    call_all({"here": seats["here"]}, "forward_backward", "batch", meanwhile=lambda: looks.append(9))
    assert looks[4:] == [9]
    with pytest.raises(ValueError, match="a reward failed"):
        call_all(seats, "forward_backward", "batch", meanwhile=fail)


def fail():
    raise ValueError("a reward failed")
