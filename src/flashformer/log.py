"""The one logger. Silent unless its user configures `logging`; the command line shows warnings on stderr."""

from __future__ import annotations

import logging

log = logging.getLogger("flashformer")
log.addHandler(logging.NullHandler())
