"""``python -m ecotone.experiments.tracking RUN_DIR [--follow PID]``."""

import sys

from ecotone.experiments.tracking import main

if __name__ == "__main__":
    sys.exit(main())
