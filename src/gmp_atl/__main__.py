"""`python -m gmp_atl`: what the rules call, so that the package need not be installed in their environments."""

import sys

from gmp_atl.cli import main

sys.exit(main())
