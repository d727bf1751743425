"""The emerging entities of WNUT 2017 (github.com/leondz/emerging_entities_17, CC BY 4.0) as data for a comparison.

    python benchmarks/wnut17.py FOLDER wnut17
    lightning-ft compare methods=[lora,full,head] task=tagging data=file data.path=wnut17 trainer.max_epochs=3

FOLDER holds the three files as published; they're copied under the names of their splits.
"""

import shutil
import sys
from pathlib import Path

FILES = {
    "train": "wnut17train.conll",
    "validation": "emerging.dev.conll",
    "test": "emerging.test.annotated",
}


def main(folder: str, out: str) -> None:
    Path(out).mkdir(exist_ok=True)
    for split, name in FILES.items():
        shutil.copyfile(Path(folder) / name, Path(out) / f"{split}.conll")


if __name__ == "__main__":
    main(*sys.argv[1:])
