"""``python -m experiments.tracking RUN_DIR [--follow PID]``."""

import sys

from experiments.tracking import main

if __name__ == "__main__":
    sys.exit(main())
