"""Thin wrappers round the libraries that are heavy to import. Only steps import them, inside ``setup``."""
