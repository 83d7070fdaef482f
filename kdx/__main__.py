"""`python -m kdx` is `kdx`."""

from __future__ import annotations

import sys

from kdx.cli import main

if __name__ == "__main__":
    sys.exit(main())
