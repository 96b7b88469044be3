"""``python -m msdiffusion``: the command, where its script is not on the path."""

import sys

from msdiffusion.cli import main

sys.exit(main())
