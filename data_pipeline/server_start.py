"""Imported first in the server that workers are forked from: see ``pool.uncollected``, which ends in the workers."""

from __future__ import annotations

import gc

gc.disable()
