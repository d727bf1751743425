"""GSM8K's questions and worked answers (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168) as data for a comparison.

    python benchmarks/gsm8k.py FOLDER gsm8k.jsonl
    lightning-ft compare methods=[lora,full] task=causal_lm model=hub model.name=LANGUAGE_MODEL data=file \\
        data.path=gsm8k.jsonl data.text=question data.label=answer trainer.max_epochs=2 test_before=true

FOLDER holds train.jsonl. Writes 1,200 rows, by a seed; the marks of a calculator, <<48/2=24>>, are left out.
"""

import json
import random
import re
import sys
from pathlib import Path


def main(folder: str, out: str, rows: int = 1200) -> None:
    lines = (Path(folder) / "train.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = [json.loads(line) for line in random.Random(0).sample(lines, rows)]
    texts = ({key: re.sub(r"<<.*?>>", "", row[key]) for key in ("question", "answer")} for row in chosen)
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
