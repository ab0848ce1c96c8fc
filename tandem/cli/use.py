"""The commands that sample without training: ``tandem generate`` and ``tandem sample``."""

from __future__ import annotations

import shlex
from pathlib import Path

from tandem.assembly.kept import write_best, write_pairs
from tandem.assembly.sampled import sample_rows
from tandem.assembly.uses import GenerateConfig, SampleConfig
from tandem.errors import UserError
from tandem.runs.folder import BEST, PAIRS


def generate(config: GenerateConfig) -> int:
    """The command."""
    if path := sample_rows(config, "generate"):
        print(f"\nThe samples are in {path}")
    return 0


def sample(config: SampleConfig) -> int:
    """The command. Raises UserError where nothing is left to train on."""
    samples = sample_rows(config, "sample")
    if samples is None:
        return 0
    print(f"\nThe samples and their rewards are in {samples}")
    keep = config.kept.keep
    if keep == "all":
        return 0
    out = samples.with_name(BEST if keep == "best" else PAIRS)
    counts = write_best(samples, out, config.kept.min_reward) if keep == "best" else write_pairs(samples, out)
    words = {
        "below": f"with a best reward below {config.kept.min_reward}",
        "ties": "whose samples are equally good",
        "unjudged": "with too few rewards",
    }
    rest = ", ".join(f"{count} {words[what]}" for what, count in counts.items() if count and what in words)
    if not counts["kept"]:
        raise UserError(f"{samples}: no prompt in it can be kept: {rest}; nothing to train on")
    print(f"{counts['kept']} prompts are kept in {out}" + (f"; left out are {rest}" if rest else ""))
    method = "sft" if keep == "best" else "dpo"
    following = Path(config.run.out).with_name(method)
    words_of = ["tandem", method, "--model", config.model.model, "--data", str(out), "--out", str(following)]
    print(f"  next: {shlex.join([*words_of, '--steps', '500'])}")
    return 0
