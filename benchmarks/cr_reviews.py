"""Hu and Liu's customer reviews (five products, 2004) as data for a comparison by numbers.

    python benchmarks/cr_reviews.py FOLDER cr_reviews.jsonl
    lightning-ft compare methods=[lora,full,head] task=regression data=file data.path=cr_reviews.jsonl \\
        data.label=strength trainer.max_epochs=2

FOLDER holds Canon_G3.txt and the others. Writes each different sentence in which an opinion is marked, with the mean of
the strengths of its opinions, from -3 to 3.
"""

import json
import re
import sys
from pathlib import Path
from statistics import fmean

OPINION = re.compile(r"\[([+-])(\d)\]")


def main(folder: str, out: str) -> None:
    found: dict[str, float] = {}
    for file in sorted(Path(folder).glob("*.txt")):
        for line in file.read_text(encoding="latin-1").splitlines():
            opinions, _, sentence = line.partition("##")
            strengths = [int(sign + size) for sign, size in OPINION.findall(opinions)]
            if strengths and sentence.strip():
                found.setdefault(sentence.strip(), fmean(strengths))
    rows = [{"text": text, "strength": strength} for text, strength in found.items()]
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
