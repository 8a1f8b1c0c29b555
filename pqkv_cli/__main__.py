"""``python -m pqkv_cli`` is the same as ``pqkv``."""

import sys

from pqkv_cli.cli.main import main

sys.exit(main())
