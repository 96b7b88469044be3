"""Imported first in the server that workers are forked from: see ``pool.uncollected``, which ends in the workers."""

import gc

gc.disable()
