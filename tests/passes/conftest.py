"""The helpers for small models lie beside the IR's tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "ir"))
