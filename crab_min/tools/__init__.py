"""Commands: `python -m crab_min.tools.NAME`.

Libraries are checked before they are imported.
"""

from crab_min.installation import require_installation

require_installation()
