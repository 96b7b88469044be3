"""The commands of ``msdiffusion``, one file each."""
