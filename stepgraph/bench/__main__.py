"""``python -m stepgraph.bench``."""

import sys

from stepgraph.bench import main
from stepgraph.errors import StepgraphError

try:
    sys.exit(main())
except StepgraphError as error:
    sys.exit(f"error: {error}")
