"""What the tests of the folder import of others."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "models"))  # whose writers of files serve here too
