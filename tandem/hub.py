"""The Hugging Face hub, asked only where it can be reached."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

REACH_S = 5.0
"""Seconds within which the hub's computer takes a connection, or counts as out of reach."""


def unreached() -> str:
    """Why the hub cannot be reached from here; empty where it can, where a proxy would know, and where it is not to be.

    The hub's own client tries five times and more, with pauses of 23 s in all, before it says so of a single file.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():
        return ""
    place = urlsplit(constants.ENDPOINT)
    try:
        port = place.port or (80 if place.scheme == "http" else 443)
        socket.create_connection((place.hostname or "", port), REACH_S).close()
    except OSError as error:
        return f"{constants.ENDPOINT} cannot be reached: {error.strerror or error}"
    return ""


@contextmanager
def asking_hub() -> Iterator[str]:
    """With a hub that is not asked where it is ``unreached``, which is given: what is in its cache is taken at once."""
    from huggingface_hub import constants

    why, own = unreached(), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = own or bool(why)
    try:
        yield why
    finally:
        constants.HF_HUB_OFFLINE = own
