"""Imports and reads all that the commands of tests need, in the process that their children are forked from.

In those children the collector of cycles leaves it out.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module

from tandem.assembly.configs.methods import config_class
from tandem.collector import collect_rarely, leave_out
from tandem.config import _keys_of
from tandem.methods.table import ROWS, SAMPLES

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
    "torch.utils.serialization.config",
    "rich._emoji_codes",
    "helpers.ranks",
    "helpers.runs",
):
    with suppress(ImportError):
        import_module(name)
# Hundreds of regular expressions, with the first model.
import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
for command in (*ROWS, *SAMPLES):
    # What is read of a config is read once.
    _keys_of(config_class(command))
leave_out()
