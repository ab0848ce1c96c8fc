"""Imports all that the commands of tests need, in the process that their children are forked from.

In those children the collector of cycles leaves it out.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module

from tandem.collector import collect_rarely, settle

collect_rarely()
for name in (
    "tandem.cli.train",
    "tandem.models.loading",
    "tandem.training.trainer",
    "peft",
    "transformers.models.llama.modeling_llama",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "numpy.ctypeslib",
    "rich._emoji_codes",
    "helpers.ranks",
    "helpers.runs",
):
    with suppress(ImportError):
        import_module(name)
settle()
