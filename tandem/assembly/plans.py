"""What a dry run shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem.config import describe


def print_plan(config: Any, uses: Mapping[str, str]) -> None:
    """The resolved config, and what each part of the run would use."""
    width = max(map(len, uses))
    print(describe(config))
    print("\nwould use")
    for what, value in uses.items():
        print(f"  {what:<{width}}  {value}")
