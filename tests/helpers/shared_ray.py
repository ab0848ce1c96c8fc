"""A Ray for a module's tests, and the inputs of their runs. Import the fixtures to use them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.runs import arguments, unevaluated, write_inputs

__all__ = ["arguments", "cluster_address", "inputs", "unevaluated"]

CPUS = 8
"""Ray only counts them: workers compute where there is time."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def cluster_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray started by this process, elsewhere than in the inputs' folder. Processes that it starts can join it.

    Ray asks for a token, and has set RAY_AUTH_MODE here so that whoever inherits it shows the right one.
    """
    import ray

    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        ray.init(
            # Whatever else runs on this machine, or has left its address behind, is none of the tests' business.
            address="local",
            num_cpus=CPUS,
            num_gpus=0,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            # Their imports take an eighth longer where all that lives is gone through again and again.
            runtime_env={"worker_process_setup_hook": "tandem.collector.collect_rarely"},
        )
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
