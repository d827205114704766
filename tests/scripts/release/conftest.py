"""The script and the helper that makes reports are imported by name although neither lies in a package."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT / "scripts" / "release"), str(ROOT / "tests" / "psigraph")]
