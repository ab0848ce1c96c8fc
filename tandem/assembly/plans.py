"""What a dry run shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tandem.assembly.configs.methods import RunConfig
from tandem.assembly.configs.uses import UseConfig
from tandem.config import describe
from tandem.models.description import describe_source
from tandem.models.loading import pick_device


def models_used(
    config: RunConfig | UseConfig, scalar: Collection[str], *, shared: Collection[str] = ()
) -> dict[str, str]:
    """What would be loaded for each role, of which the first is the model that the command is about.

    ``scalar``: the roles of models with one number a token; ``shared``: of those on the policy's own layers.
    """
    section, first = config.model, next(iter(config.sources))
    return {
        "model" if role == first else role: describe_source(source, scalar=role in scalar)
        + (", on the policy's own layers" if role in shared else "")
        + f", {pick_device(section.device)}, {section.dtype}{config.placement.where(role)}"
        for role, source in config.sources.items()
    }


def print_plan(config: Any, uses: Mapping[str, str], idle: Collection[str] = ()) -> None:
    """The resolved config, but for ``idle`` keys, and what each part of the run would use."""
    width = max(map(len, uses))
    print(describe(config, idle))
    print("\nwould use")
    for what, value in uses.items():
        print(f"  {what:<{width}}  {value}")
