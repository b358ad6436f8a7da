"""``python -m hqod_ops.cli``, which torchrun starts."""

import sys

from hqod_ops.cli import main

if __name__ == "__main__":
    sys.exit(main())
