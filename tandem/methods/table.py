"""The methods by the name of their command. Nothing is imported before a method is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tandem.methods.base import Method


class Line(NamedTuple):
    """A method's class, ``module:name`` in this room, and what its command is for."""

    where: str
    about: str


ROWS = {
    "sft": Line("sft:SFT", "supervised fine-tuning on demonstrations"),
    "pretrain": Line("pretrain:Pretrain", "continued pre-training on plain text of any size"),
    "distill": Line("distill:Distill", "knowledge distillation from a teacher on a dataset"),
    "rm": Line("rm:RewardModeling", "a reward model from preference pairs"),
    "prm": Line("prm:ProcessReward", "a process reward model from answers in labelled steps"),
    "dpo": Line("dpo:DPO", "DPO: a policy from preference pairs, without a reward model"),
    "kto": Line("kto:KTO", "KTO: a policy from answers that are labelled good or bad, without pairs"),
}
"""Methods that train on a dataset."""
SAMPLES = {
    "ppo": Line("ppo:PPO", "PPO with a critic and a KL penalty to a reference"),
    "grpo": Line("grpo:GRPO", "GRPO: each sample against the others of its prompt"),
    "rloo": Line("rloo:RLOO", "RLOO: each sample against the mean of the others of its prompt, without scaling"),
    "reinforce": Line("reinforce:REINFORCE", "REINFORCE: rewards less one baseline for all prompts, no critic"),
    "reinforce-pp": Line("reinforce_pp:ReinforcePP", "REINFORCE++: token rewards whitened over the step, no critic"),
    "reinforce-pp-baseline": Line(
        "reinforce_pp_baseline:ReinforcePPBaseline", "REINFORCE++ with the mean of a prompt's samples as baseline"
    ),
    "dr-grpo": Line("dr_grpo:DrGRPO", "Dr.GRPO: GRPO without its divisions by spread and length"),
    "gspo": Line("gspo:GSPO", "GSPO: GRPO with one ratio for each sequence"),
    "cispo": Line("cispo:CISPO", "CISPO: GRPO in which every token learns, with a clipped weight"),
    "dapo": Line("dapo:DAPO", "DAPO: GRPO clipped higher, with new groups in the place of those that teach nothing"),
    "online-dpo": Line("online_dpo:OnlineDPO", "online DPO: a prompt's best sample against its worst"),
    "opd": Line("opd:OPD", "on-policy distillation from a teacher"),
}
"""Methods that train on samples of the policy."""
METHODS = ROWS | SAMPLES


def method_class(name: str) -> type[Method]:
    """The class of the method with this command."""
    module, _, cls = METHODS[name].where.partition(":")
    found: type[Method] = getattr(import_module(f"tandem.methods.{module}"), cls)
    return found
