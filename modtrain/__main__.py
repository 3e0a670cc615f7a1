"""``python -m modtrain``: what srun and torchrun start."""

import sys

from modtrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
