"""``python -m baton.services.runtime.exec_child PROGRAM ARG...`` becomes PROGRAM, set to end with the process that started it."""

from __future__ import annotations

import os
import sys

from baton.services.runtime.process import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    os.execv(sys.argv[1], sys.argv[1:])
