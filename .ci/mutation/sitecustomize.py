"""For .ci/mutation/run: notes each line of trqam.py that runs, once, in the file $TRQAM_LINES.

Python imports it at its start where this folder is in PYTHONPATH, so that what the tests start is
followed, too. Each line is written at once: processes may be killed.
"""

import os
import sys
import threading

path = os.environ.get("TRQAM_LINES", "")
seen: set = set()


def start(new_path) -> None:
    """From here on lines are noted in another file, those of processes to be started, too."""
    global path
    path = os.environ["TRQAM_LINES"] = str(new_path)
    sys.settrace(follow)
    threading.settrace(follow)


def follow(frame, event, arg):
    return note if os.path.basename(frame.f_code.co_filename) == "trqam.py" else None


def note(frame, event, arg):
    key = path, frame.f_lineno
    if key not in seen:
        seen.add(key)
        with open(path, "a") as file:
            file.write(f"{frame.f_lineno}\n")
    return note


if path:
    start(path)
