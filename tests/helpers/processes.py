"""Where the tests' own child processes come from."""

from __future__ import annotations

import multiprocessing

# Children are forked from a server that has imported everything but computed nothing: quick, and free of threads.
PROCESSES = multiprocessing.get_context("forkserver")
# One list, since a process has one such server: of two lists the one that is set last would be that of all children.
PROCESSES.set_forkserver_preload(
    [
        "tandem.cli.train",
        "tandem.models.loading",
        "tandem.training.trainer",
        "peft",
        "transformers.models.llama.modeling_llama",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
    ]
)
