"""The end of a command's process."""

from __future__ import annotations

import sys

from tests import processes

ENDS = """
import atexit, os, threading, time
from lodestar.commands import end
class Finalised:
    def __del__(self): print("finalised", flush=True)
kept = Finalised()
threading.Thread(target=time.sleep, args=[600], daemon=True).start()
atexit.register(print, "handler")
print("written")
end(3)
"""


def test_the_process_ends_with_its_code_its_output_and_its_handlers_but_is_not_finalised() -> None:
    done = processes.run([sys.executable, "-c", ENDS], limit_s=60)
    assert (done.returncode, done.stdout.split()) == (3, ["written", "handler"])
