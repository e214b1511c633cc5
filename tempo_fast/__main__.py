"""``python -m tempo_fast`` is ``tempo-fast``."""

import sys

from tempo_fast.cli import main

sys.exit(main())
