"""Makes the benchmarks importable; behind everything else, for their names are common ones."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
