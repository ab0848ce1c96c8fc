"""Errors on their way from a worker to the driver."""

from __future__ import annotations

import pytest

from tandem.errors import NonFiniteError, RunFailure, UserError
from tandem.workers.process import WorkerProcess, raise_failure


class LostDisk(RunFailure):
    """A kind of failure that the driver does not know by name."""


@pytest.mark.parametrize(
    ("raised", "kind"), [(LostDisk, RunFailure), (NonFiniteError, NonFiniteError), (UserError, UserError)]
)
def test_a_failure_keeps_its_kind(raised: type[UserError], kind: type[UserError]) -> None:
    """The exit code depends on it."""

    def build(site: object) -> None:
        raise raised("no room")

    answer = WorkerProcess(0, 1, "cpu").place("actor", build)
    with pytest.raises(UserError, match="no room") as caught:
        raise_failure(answer, "actor rank 0")
    assert type(caught.value) is kind
