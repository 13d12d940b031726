"""``python -m baselines``: another door to the ``czsl`` command, whose methods these are."""

import sys

from czsl_heads.cli import main

if __name__ == "__main__":
    sys.exit(main())
