"""Names of the weights in the authors' released files, and our names for them.

One module per paper holds its tables, `patterns` says how to read a row, and `weights` applies a
table to a state dict. The names are those of the authors' code; no released file has been opened
to check them. BEATs needs no table: `beats.load_beats` takes the published names as they are.
"""

from crab_min.tools.released.crab import CONNECTORS, CRAB, CRAB_PRETRAIN, ILORA, MASK_DECODER
from crab_min.tools.released.crab_plus import CRAB_PLUS
from crab_min.tools.released.crema import CREMA
from crab_min.tools.released.pave import PATCH, PAVE

TABLES = {
    # files that the authors publish
    "crab": CRAB,
    "crab-pretrain": CRAB_PRETRAIN,
    "crab_plus": CRAB_PLUS,
    "pave": PAVE,
    "crema": CREMA,
    # single modules
    "ilora": ILORA,
    "qformer": CONNECTORS,
    "masks": MASK_DECODER,
    "patch": PATCH,
}
