"""`python -m msdiffusion.training` is the `lightning` command under a name nobody else installs."""

from msdiffusion.training.cli import main

main()
