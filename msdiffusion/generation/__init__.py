"""From a checked request to pictures."""
