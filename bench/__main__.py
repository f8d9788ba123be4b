"""`python -m bench` from the checkout: the same as `safelight bench`."""

import sys

from safelight.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
