"""Makes helper_xenstore importable (test directories have no packages)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
