"""Calls to roles, at the same time where their processes differ."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def overlapped(calls: Mapping[str, Callable[[], Result]], homes: Mapping[str, Hashable]) -> dict[str, Result]:
    """What each role's call returned. ``homes`` says where a role lives; those without one live in this process.

    Calls to one home are made in order, from one thread: its ranks must all see them in the same order. Raises what
    the first call to fail raised, in the order of ``calls``, once all that were begun have ended.
    """
    queues: dict[Hashable, list[str]] = {}
    for role in calls:
        queues.setdefault(homes.get(role), []).append(role)
    if len(queues) <= 1:
        return {role: call() for role, call in calls.items()}
    results: dict[str, Result] = {}

    def serve(roles: list[str]) -> None:
        for role in roles:
            results[role] = calls[role]()

    with ThreadPoolExecutor(len(queues), thread_name_prefix="home") as pool:
        served = [pool.submit(serve, roles) for roles in queues.values()]
    for future in served:
        future.result()
    return {role: results[role] for role in calls}
