"""Commands: `python -m crab_min.tools.NAME`. The installed libraries are checked before any is imported."""

from crab_min.installation import require_installation

require_installation()
