"""`python -m trainer` from the checkout: the same as `safelight train`."""

import sys

from safelight.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
