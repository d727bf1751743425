"""Bing Liu's Pros and Cons sentences (as NLTK distributes them, CC BY 4.0) as data for a comparison.

    python benchmarks/pros_cons.py FOLDER pros_cons.jsonl
    lightning-ft compare methods=[lora,full,head] data=file data.path=pros_cons.jsonl trainer.max_epochs=2

FOLDER holds IntegratedPros.txt and IntegratedCons.txt. Writes 4,000 different sentences, half of each, by a seed.
"""

import json
import random
import re
import sys
from pathlib import Path


def main(folder: str, out: str, rows: int = 4000) -> None:
    rng = random.Random(0)
    texts = {
        label: sorted(set(re.findall(r"<\w+>\s*(.+?)\s*</\w+>", (Path(folder) / name).read_text(encoding="latin-1"))))
        for label, name in (("positive", "IntegratedPros.txt"), ("negative", "IntegratedCons.txt"))
    }
    both = set(texts["positive"]) & set(texts["negative"])
    chosen = [
        {"text": text, "label": label}
        for label, candidates in texts.items()
        for text in rng.sample([text for text in candidates if text not in both], rows // 2)
    ]
    rng.shuffle(chosen)
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
