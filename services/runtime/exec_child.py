"""``python -m baton.services.runtime.exec_child PROGRAM ARG...``: becomes PROGRAM, which then ends with our parent."""

from __future__ import annotations

import os
import sys

from baton.services.runtime.process import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606  no shell is the point
