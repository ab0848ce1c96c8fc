"""How a step goes through what is trained: one gradient at a time in a home, all at once over homes."""

import pytest

from tandem.errors import NonFiniteError
from tandem.methods.sft import SFT
from tandem.parallel.world import World
from tandem.rollout.prepare import Preparation
from tandem.schedules.crew import Crew
from tandem.workers.homes import Here
from tandem.workers.process import Site


class Recorded:
    """A trainer that writes down what it is asked."""

    def __init__(self, role, log, bad=False):
        self.role, self.log, self.bad, self.version = role, log, bad, 0

    def forward_backward(self, batch):
        self.log.append((self.role, "forward_backward", batch))
        if self.bad:
            raise NonFiniteError(f"the loss of the {self.role}")
        return {"loss": 1.0 + len(self.log), f"of_{self.role}": 0.5}

    def optim_step(self, done):
        self.log.append((self.role, "optim_step", done))
        self.version += 1
        return {"grad_norm": 2.0, "learning_rate": 3.0}


class Minibatches(list):
    """As a prepared step."""

    metrics = {"kl": 0.25}  # noqa: RUF012

    class batch:
        tokens = 7


def crew(log, *homes, bad=()):
    """``homes`` are lists of roles that live together."""
    trainers = {}
    for roles in homes:
        home = Here(Site(World()))
        for role in roles:
            trainers[role] = home.place(role, lambda site, role=role: Recorded(role, log, role in bad))
    ordered = {role: trainers[role] for role in ("actor", "critic", "judge") if role in trainers}
    return Crew(
        method=SFT(),
        tickets=None,
        source=None,
        prepare=Preparation(method=None, models={}),
        trainers=ordered,
        push_weights=None,
        evaluate=None,
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
