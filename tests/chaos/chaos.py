"""`make chaos`. Nothing is imported on top: each daemon of the storm reads this file when it is forked."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1] / "integration"))
    from play import main

    sys.exit(main())
