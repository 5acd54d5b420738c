"""The one logger, for what the package did on its own account: a cache file written, a broken one made anew.

Silent unless its user configures `logging`. The command line prints it on stderr; `--quiet` is `setLevel(WARNING)`,
which hides progress of downloads too. What a caller should know of a call that works is a UserWarning instead.
"""

from __future__ import annotations

import logging

log = logging.getLogger("flashformer")
log.addHandler(logging.NullHandler())


def wants_notes() -> bool:
    """Whether progress and notes may be shown: unless the logger's own level was set above INFO."""
    return log.level <= logging.INFO
