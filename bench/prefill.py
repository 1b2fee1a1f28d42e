"""How long until the first token of a 512-token prompt, and is every byte read only once?

    python bench/prefill.py [--cells fine:33,coarse:ram] [--contestants understudy,llama.cpp]
                            [--repeats 5] [--smoke] [--json]

Cells, contestants and turns are those of ``decode.py``. "once": the experts that the prompt
touches, each read one time; experts still resident from the round before make it less than one
pass. The last line is JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import contest, rows, show

CELLS = "fine:ram,fine:33,coarse:ram,coarse:33"
SMOKE = {"cells": "fine:33,coarse:ram", "repeats": 2, "prompt_tokens": 256}

if __name__ == "__main__":
    sys.exit(
        contest.main(
            __doc__,
            CELLS,
            SMOKE,
            rows.prefill_rows,
            show.PREFILL_COLUMNS,
            show.prefill_ratios,
            new_tokens=1,
        )
    )
