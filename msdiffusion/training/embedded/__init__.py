"""The networks of the embedded base, and what fits into memory."""
