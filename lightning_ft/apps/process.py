"""What is started as a process of its own: ``lightning-ft train`` with arguments in Hydra's grammar.

``compare`` starts each of its runs so, and Lightning the further processes of a run on several devices.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python would look here first for modules that are imported, and there's an `errors.py`, a `build.py`, ….
    here = Path(__file__).resolve().parent
    sys.path = [place for place in sys.path if place and Path(place).resolve() != here]
    from lightning_ft.apps.cli import run

    sys.exit(run("train", sys.argv[1:]))
