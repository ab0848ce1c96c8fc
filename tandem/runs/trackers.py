"""Where a run can be followed besides its folder: TensorBoard, Weights & Biases, MLflow. Each in a process of its own.

Every library is imported where it is used (``pip install 'tandem-rlhf[trackers]'``).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tandem.errors import UserError

PROJECT = "tandem"
"""The project of runs at wandb and MLflow, where the environment names no other."""
COLUMNS = ("set", "prompt", "completion", "reward", "length", "stop", "advantage")
"""The 7 columns of the table of samples."""
Sample = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class About:
    """The run that is followed."""

    out: Path
    id: str
    config: Mapping[str, Any]


class Tracker(Protocol):
    """Where a run's metrics go besides its folder. It may raise whatever its library does."""

    def log(self, step: int, metrics: Mapping[str, float], samples: Seq[Sample]) -> None:
        """A step's metrics, which are finite, and the lines of its samples (``rollouts.jsonl``)."""
        ...

    def close(self) -> None:
        """Sends what is left."""
        ...


class TensorBoard:
    """Event files in ``<out>/tensorboard``."""

    def __init__(self, about: About, state: dict[str, Any]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._text = event_pb2.Event, summary_pb2.Summary, text_pb
        self._writer = EventFileWriter(str(about.out / "tensorboard"))
        # What a killed process has written of later steps does not count.
        self._add(state["step"] + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        config = {key: value if isinstance(value, int | float) else str(value) for key, value in about.config.items()}
        self._add(max(state["step"], 0), summary=hparams_pb(config, trial_id=about.id))

    def log(self, step: int, metrics: Mapping[str, float], samples: Seq[Sample]) -> None:
        """Scalars, and the samples as a text."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(step, summary=self._summary(value=values))
        if samples:
            self._add(step, summary=self._text("samples", markdown(samples)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, **what: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, **what))


class WandB:
    """A run of Weights & Biases that has the run's own id, so that a resumed one goes on in it."""

    def __init__(self, about: About, state: dict[str, Any]) -> None:
        import wandb

        self._table = wandb.Table
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=about.id,
            name=about.out.name,
            dir=os.environ.get("WANDB_DIR", str(about.out)),
            config=dict(about.config),
            resume="allow",
            settings=wandb.Settings(console="off"),
        )

    def log(self, step: int, metrics: Mapping[str, float], samples: Seq[Sample]) -> None:
        """Scalars, and the samples as a table."""
        tables = {"samples": self._table(columns=[*COLUMNS], data=table_rows(samples))} if samples else {}
        self._run.log({**metrics, **tables}, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, at ``MLFLOW_TRACKING_URI``, or in ``<out>/mlruns`` where that is not set."""

    def __init__(self, about: About, state: dict[str, Any]) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = f"file://{(about.out / 'mlruns').absolute()}"
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = client = MlflowClient(tracking_uri=uri)
        if (run := state.get("run")) is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = client.get_experiment_by_name(name)
            experiment = found.experiment_id if found is not None else client.create_experiment(name)
            run = client.create_run(experiment, run_name=about.out.name, tags={"tandem.id": about.id}).info.run_id
            # MLflow takes 100 parameters at a time, of 6000 characters each.
            items = [Param(key, str(value)[:6000]) for key, value in about.config.items()]
            for first in range(0, len(items), 100):
                client.log_batch(run, params=items[first : first + 100])
        else:
            client.update_run(run, status="RUNNING")
        self._id = state["run"] = run

    def log(self, step: int, metrics: Mapping[str, float], samples: Seq[Sample]) -> None:
        """Scalars, and the samples as a file of Markdown."""
        now = int(time.time() * 1000)
        entries = [self._metric(mlflow_name(name), value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._id, metrics=entries)
        if samples:
            self._client.log_text(self._id, markdown(samples), f"samples/step_{step:08d}.md")

    def close(self) -> None:
        self._client.set_terminated(self._id)


def mlflow_name(metric: str) -> str:
    """A metric as MLflow may call it: its own files cannot hold both ``reward`` and ``reward/right``."""
    return re.sub(r"[^\w\-. :]", "_", metric.replace("@", "_at_").replace("/", "."))


TRACKERS: Mapping[str, type[Any]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def require_trackers(names: Seq[str]) -> None:
    """Raises UserError where the package of one is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"track: {name} is not installed; pip install 'tandem-rlhf[trackers]', or leave it out")


def table_rows(samples: Seq[Sample]) -> list[list[Any]]:
    """A row of ``COLUMNS`` for each sample of some lines."""
    return [
        [
            (line.get("eval_set") or "held out") if line["held_out"] else "training",
            line["prompt"] if isinstance(line["prompt"], str) else str(line["prompt"]),
            *(sample.get(column) for column in COLUMNS[2:]),
        ]
        for line in samples
        for sample in line["samples"]
    ]


def markdown(samples: Seq[Sample]) -> str:
    """The samples of some lines as a table of Markdown."""

    def cell(value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
        return text.replace("|", "\\|").replace("\n", "<br>")

    rows = [COLUMNS, ["---"] * len(COLUMNS), *table_rows(samples)]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows) + "\n"
