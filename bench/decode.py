"""How long does one more token take, beside the others and beside the physical limit?

    python bench/decode.py [--cells fine:33,coarse:ram] [--contestants understudy,llama.cpp]
                           [--repeats 5] [--smoke] [--json]

Wide twins of the reference models (3 GB) continue real text. Every contestant is a process of its
own in a memory cgroup of the same size, all alternate on the same tokens, and the floors are
computed from the best bandwidths of the run: measured between rounds, or reached by our own reads.
The last line is JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import contest, rows, show

CELLS = "fine:ram,fine:50,fine:33,fine:25,coarse:ram,coarse:50,coarse:33,coarse:25"
SMOKE = {"cells": "fine:33,coarse:50", "repeats": 2, "prompt_tokens": 64, "new_tokens": 17}

if __name__ == "__main__":
    sys.exit(
        contest.main(
            __doc__, CELLS, SMOKE, rows.decode_rows, show.DECODE_COLUMNS, show.decode_ratios
        )
    )
