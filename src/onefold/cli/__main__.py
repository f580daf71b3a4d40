"""`python -m onefold.cli VERB ...` is `onefold VERB ...`."""

import sys

from onefold.cli import main

sys.exit(main())
