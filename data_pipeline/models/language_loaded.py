"""Imported in the server that workers are forked from: they are born with the usual language model, and share it."""

import contextlib

from data_pipeline.errors import InputError
from data_pipeline.models.language import MODELS, load_chunker

with contextlib.suppress(InputError):  # the worker will say so
    load_chunker(MODELS)
