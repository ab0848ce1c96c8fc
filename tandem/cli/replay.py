"""``tandem replay``."""

from __future__ import annotations

from pathlib import Path

from tandem.assembly.inputs import weights_digest
from tandem.assembly.replays import ReplayConfig
from tandem.assembly.run import run as train
from tandem.cli.train import tell_end
from tandem.runs.folder import MODEL, RunFolder


def run(config: ReplayConfig) -> int:
    """The command. Says whether the model is that of the run, where both ended after the same step."""
    model = train(config)
    if model is None:
        return 0
    replayed, out = Path(config.replay.replayed), Path(config.run.out)
    tell_end(out, config.method.leads)
    if RunFolder.finished(replayed) == RunFolder.finished(out):
        before = replayed / MODEL
        same = weights_digest(str(before)) == weights_digest(str(model))
        print(f"Its weights are {'those' if same else 'not those'} of {before}{', bit for bit' if same else ''}")
    return 0
