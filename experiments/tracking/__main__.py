"""``python -m ecotone.experiments.tracking RUN_DIR [--tracker NAME] [--follow PID]``."""

import sys

from ecotone.experiments.tracking import main

if __name__ == "__main__":
    sys.exit(main())
