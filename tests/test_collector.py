"""What the collector of reference cycles leaves out while a run goes on, and that it is as before afterwards."""

import gc
import weakref

from tandem.collector import YOUNG, leave_out, leaving_out, pause


class Cycle:
    def __init__(self):
        self.own = self


def test_what_lives_is_left_out_until_the_end_and_new_cycles_are_not():
    before = gc.get_threshold()
    old = Cycle()
    with leaving_out():
        assert gc.get_threshold() == (YOUNG, *before[1:])
        assert gc.get_freeze_count() > 0
        assert not any(each is old for each in gc.get_objects())
        lost, own = weakref.ref(old), weakref.ref(Cycle())
        del old
        gc.collect()
        assert own() is None
        assert lost() is not None
    gc.collect()
    assert lost() is None
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)


def test_it_is_as_before_where_the_body_fails():
    before = gc.get_threshold()
    try:
        with leaving_out():
            raise RuntimeError
    except RuntimeError:
        pass
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)


def test_what_was_paused_goes_on_once_all_is_imported():
    pause()
    try:
        with leaving_out():
            assert not gc.isenabled()
        assert not gc.isenabled()
        leave_out()
        assert gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
