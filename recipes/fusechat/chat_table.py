"""Make FuseChat's graph for several seeds, through mergeflow's own commands, and print the table of bits per byte.

Usage: chat_table.py [FOLDER] [--seeds 0 1 2 3 4]    (default: work/ of recipes/fuse-lm; about three minutes a seed beside its models)

The models, the measures and the test are those of recipes/fuse-lm/lm_table.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "fuse-lm"))
import lm_table

WAYS = {
    "plain": "plain training on the same documents",
    "from_code": "fused from the teacher of code",
    "from_prose": "fused from the teacher of prose",
    "at_once": "fused from both at once",
    "mean": "`linear` of the two that were fused one by one",
    "chat": "`sce` of the two (FuseChat)",
}

if __name__ == "__main__":
    lm_table.main(__doc__, Path(__file__).parent / "fuse.yaml", WAYS)
