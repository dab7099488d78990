"""``python convert.py ...`` is ``mlx_flashhead.convert ...``."""

import sys

from mlx_flashhead.cli import convert_main

if __name__ == "__main__":
    sys.exit(convert_main())
