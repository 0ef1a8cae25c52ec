"""``baton serve`` over stand-ins, as a process. Arguments: a JSON object of options, seconds before the first restart."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from baton.services.core.errors import ConfigurationError
from baton.services.local import supervisor
from baton.services.local.bundled import with_model
from baton.services.runtime import process
from baton.services.runtime.settings import ServeSettings
from baton.services.runtime.settings_loader import load_settings, report_problems

STAND_IN = Path(__file__).with_name("stand_in.py")


def stand_in_argv(*args: str) -> list[str]:
    return [sys.executable, str(STAND_IN), *args]


if __name__ == "__main__":
    process.exit_cleanly_on_signals()
    process._SAME_REQUEST_S = 0.0
    supervisor._FIRST_BACKOFF_S = float(sys.argv[2])
    settings = with_model(load_settings(ServeSettings, json.loads(sys.argv[1])))
    try:
        sys.exit(supervisor.serve(settings, argv=stand_in_argv))
    except ConfigurationError as error:
        sys.exit(report_problems("baton serve", error))
