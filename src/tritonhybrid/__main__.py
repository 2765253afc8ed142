"""``python -m tritonhybrid``."""

from __future__ import annotations

import sys

from tritonhybrid.cli import main

if __name__ == "__main__":
    sys.exit(main())
