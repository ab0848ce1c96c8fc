"""Roles in different processes are called at the same time, those of one process in order."""

import threading

import pytest

from tandem.rollout.overlap import overlapped


def test_different_homes_meet():
    # Each waits for the other: one after the other, both would time out.
    meeting = threading.Barrier(2, timeout=20)
    calls = {role: lambda role=role: (meeting.wait(), role)[1] for role in ("reference", "critic")}
    assert overlapped(calls, {"reference": "a", "critic": "b"}) == {"reference": "reference", "critic": "critic"}


@pytest.mark.parametrize("homes", [{}, {"reference": "a", "critic": "a", "actor": "a"}, {"actor": "b"}])
def test_one_home_is_called_in_order_and_by_one_thread(homes):
    seen = []
    calls = {
        role: lambda role=role: seen.append((role, threading.get_ident())) or role
        for role in ("reference", "critic", "actor")
    }
    assert list(overlapped(calls, homes)) == ["reference", "critic", "actor"]
    order = [(role, thread) for role, thread in seen if homes.get(role) == homes.get("reference")]
    assert [role for role, _ in order] == [r for r in calls if homes.get(r) == homes.get("reference")]
    assert len({thread for _, thread in order}) == 1


def test_an_error_of_one_home_is_raised_when_the_others_are_done():
    done = []

    def fail():
        raise ValueError("the reference's")

    with pytest.raises(ValueError, match="the reference's"):
        overlapped({"reference": fail, "critic": lambda: done.append(1)}, {"reference": "a", "critic": "b"})
    assert done == [1]
