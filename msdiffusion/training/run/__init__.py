"""A run: its command, folder, checkpoints, pictures and progress."""
