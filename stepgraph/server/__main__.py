"""``python -m stepgraph.server`` is ``stepgraph serve``."""

import sys

from stepgraph.cli import main

sys.exit(main(["serve", *sys.argv[1:]]))
