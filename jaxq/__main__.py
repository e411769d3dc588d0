"""`python -m jaxq`: look into files from the command line."""

import sys

from jaxq.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
