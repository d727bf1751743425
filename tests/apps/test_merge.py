"""``lightning-ft merge``: what it writes is a model of its own, and predicts what the run does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from commands import LABELS, TEXTS, call, predicted, probabilities, python, succeed
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from lightning_ft.apps import runs
from lightning_ft.injection import Injected
from lightning_ft.methods.lora import LoRALayer

SERVE = """
import json, sys
from transformers import pipeline
classify = pipeline("text-classification", sys.argv[1], top_k=None, truncation=True)
print(json.dumps([{one["label"]: one["score"] for one in all} for all in classify(json.loads(sys.argv[2]))]))
assert not [name for name in sys.modules if name.startswith("lightning")]
"""


def test_a_merged_run_is_served_without_lightning_ft(lora_run: Path, tmp_path: Path) -> None:
    succeed("merge", f"run={lora_run}", "out=merged")
    answer = python("-c", SERVE, tmp_path / "merged", json.dumps(TEXTS), cwd=tmp_path, PYTHONPATH="")
    assert answer.returncode == 0, answer.stderr
    rows = [[row[label] for label in LABELS] for row in json.loads(answer.stdout.splitlines()[-1])]
    torch.testing.assert_close(torch.tensor(rows), predicted(lora_run), atol=1e-5, rtol=0)


def test_every_method_is_merged_or_says_why_not(each_run: Path, tmp_path: Path) -> None:
    answer = call("merge", f"run={each_run}", "out=merged")
    if answer.status == 1:
        assert "can't be merged" in answer.message
        assert f"lightning-ft export run={each_run} out=merged" in answer.message
        assert not list(tmp_path.iterdir())
        return
    assert answer.status == 0, answer.err
    model = AutoModelForSequenceClassification.from_pretrained("merged")
    assert not any(isinstance(module, Injected) for module in model.modules())
    torch.testing.assert_close(probabilities(model, Path("merged")), predicted(each_run), atol=1e-5, rtol=0)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {label: i for i, label in enumerate(LABELS)}


def test_what_is_printed_is_what_was_compared(lora_run: Path) -> None:
    rows = json.loads((lora_run / runs.RESULTS).read_text())["rows"]["test"]
    out = succeed("merge", f"run={lora_run}", "out=merged")
    found = re.search(rf"on {rows} test rows no probability differs by more than ([\d.e-]+)\.\n", out)
    assert found, out
    assert float(found[1]) < 1e-5
    assert f"{lora_run} is merged in merged: BertForSequenceClassification, " in out
    assert "on 32 test rows" not in succeed("merge", f"run={lora_run}", "out=again", "batches=0")


def test_its_card_is_of_a_model(lora_run: Path) -> None:
    succeed("merge", f"run={lora_run}", "out=merged")
    card = ModelCard.load(Path("merged/README.md"))
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-classification")
    assert "load_adapter" not in card.text


# --------------------------------------------------------------------------------------- what is refused


def refused(run: Path, *arguments: str) -> str:
    """The message; nothing was written, and the run is as it was."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    message = call("merge", f"run={run}", "out=merged", *arguments).message
    assert not list(Path.cwd().iterdir())
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    return message


def test_a_method_that_cannot_be_merged_is_to_be_exported(lora_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoRALayer, "acts_on", "inputs")
    message = refused(lora_run)
    assert "LORA can't be merged: it changes the inputs of 'model.bert." in message
    assert f"lightning-ft export run={lora_run} out=merged" in message


def test_a_merge_that_would_change_predictions_is_refused(lora_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(layer: LoRALayer, weight: Tensor) -> dict[str, Tensor]:
        """As if everything had been rounded away."""
        return {"weight": weight}

    monkeypatch.setattr(LoRALayer, "folded", forget)
    message = refused(lora_run)
    assert "a probability would change by 0." in message
    assert "float32" in message
    succeed("merge", f"run={lora_run}", "out=merged", "tolerance=1")
    assert Path("merged/model.safetensors").is_file()


def test_without_the_test_data_it_says_how_to_do_without(lora_run: Path) -> None:
    data = Path(runs.load_config(lora_run).data.path)
    data.rename(data.with_suffix(".moved"))
    try:
        message = refused(lora_run)
        assert f"no file '{data}'" in message
        assert "batches=0" in message
        assert "not compared with the run" in succeed("merge", f"run={lora_run}", "out=merged", "batches=0")
    finally:
        data.with_suffix(".moved").rename(data)


def test_the_run_and_its_base_are_never_overwritten(lora_run: Path, tiny_bert_dir: str) -> None:
    for needed in (lora_run, lora_run / runs.ADAPTER, lora_run.parent, tiny_bert_dir):
        message = call("merge", f"run={lora_run}", f"out={needed}", "overwrite=true").message
        assert "is or holds the run, its base" in message
    assert runs.find_run(str(lora_run)) == lora_run


def test_another_folder_is_overwritten_only_when_asked(lora_run: Path) -> None:
    succeed("export", f"run={lora_run}", "out=served")
    assert "overwrite=true" in call("merge", f"run={lora_run}", "out=served").message
    assert not Path("served/config.json").exists()
    succeed("merge", f"run={lora_run}", "out=served", "overwrite=true")
    assert Path("served/config.json").is_file()
    assert not Path("served/adapter_config.json").exists(), "transformers would load it on top"
