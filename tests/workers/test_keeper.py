"""A keeper kills what is stopped, but not what was stopped together with the process that it keeps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from helpers.drivers import running, wait_until

PATIENCE_S = 2.0
SCRIPT = f"""
import os, subprocess, time
from tandem.workers.keeper import start_keeper

started = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL)
start_keeper("nobody's", {PATIENCE_S})
print(started.pid, flush=True)
started.wait()
time.sleep(1000)
"""


def test_a_family_that_is_suspended():
    root = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True)
    assert root.stdout is not None
    started = int(root.stdout.readline())
    for pid in (root.pid, started):
        os.kill(pid, signal.SIGSTOP)
    # Nothing may happen for longer than what is stopped alone is given.
    time.sleep(PATIENCE_S + 3)
    assert started in running()
    os.kill(root.pid, signal.SIGCONT)
    wait_until(lambda: started not in running(), "what stays stopped when the driver goes on is not killed")
    root.kill()
    root.communicate()
