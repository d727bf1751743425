"""``lightning-ft export``: what it writes is an adapter that others load, and predicts what the run does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from commands import LABELS, call, predicted, probabilities, succeed
from huggingface_hub import ModelCard
from omegaconf import OmegaConf
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lightning_ft
from lightning_ft.apps import runs
from lightning_ft.files.peft import CARD, CONFIG, OWN_TYPES, WEIGHTS

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Said of the rank_pattern in the AdaLoRA files of PEFT itself too.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
]

POOLED_BY_PEFT = {"PROMPT_TUNING", "P_TUNING"}
"""Stock PEFT loads them, but has a classifier's pooler read the first virtual token."""


def base_of(run: Path) -> Any:
    name = runs.load_config(run).model.name
    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(LABELS))


def exported(run: Path, *arguments: str) -> Path:
    succeed("export", f"run={run}", "out=exported", *arguments)
    return Path("exported")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def test_every_methods_export_loads_and_predicts_the_same(each_run: Path) -> None:
    said = succeed("export", f"run={each_run}", "out=exported")
    folder = Path("exported")
    wanted = predicted(each_run)
    ours = base_of(each_run)
    lightning_ft.load_adapter(ours, folder)
    torch.testing.assert_close(probabilities(ours, folder), wanted, atol=1e-5, rtol=0)
    alike = config_of(folder)["peft_type"] not in OWN_TYPES | POOLED_BY_PEFT
    assert ("; PeftModel.from_pretrained loads it over that" in said) == alike
    if alike:
        stock = peft.PeftModel.from_pretrained(base_of(each_run), folder)
        torch.testing.assert_close(probabilities(stock, folder), wanted, atol=1e-5, rtol=0)


def test_stock_peft_finds_the_base_by_itself(lora_run: Path) -> None:
    folder = exported(lora_run)
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS))
    torch.testing.assert_close(probabilities(model, folder), predicted(lora_run), atol=1e-5, rtol=0)


def test_it_is_the_runs_adapter_with_the_tokenizer(lora_run: Path, tiny_bert_dir: str) -> None:
    folder = exported(lora_run)
    assert (folder / WEIGHTS).read_bytes() == (lora_run / runs.ADAPTER / WEIGHTS).read_bytes()
    assert config_of(folder) == config_of(lora_run / runs.ADAPTER)
    assert {CARD, CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json"} == {p.name for p in folder.iterdir()}
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(tiny_bert_dir).get_vocab()


def test_the_tokenizer_cuts_where_the_run_did(lora_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(lora_run, tmp_path / "run")
    config = runs.load_config(run)
    config.data.max_length = 9
    OmegaConf.save(config, run / runs.CONFIG)
    folder = exported(run)
    model = peft.PeftModel.from_pretrained(base_of(run), folder)
    torch.testing.assert_close(probabilities(model, folder), predicted(run), atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 9


def test_the_base_has_its_name_on_the_hub(lora_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(lora_run, tmp_path / "run")
    config = runs.load_config(run)
    config.model.hub_name = "someone/tiny-bert"
    OmegaConf.save(config, run / runs.CONFIG)
    folder = exported(run)
    assert config_of(folder)["base_model_name_or_path"] == "someone/tiny-bert"
    assert ModelCard.load(folder / CARD).data.base_model == "someone/tiny-bert"


def test_the_card_tells_what_the_run_knows(lora_run: Path) -> None:
    results = json.loads((lora_run / runs.RESULTS).read_text())
    texts = [(folder / CARD).read_text(encoding="utf-8") for folder in (exported(lora_run), lora_run / runs.ADAPTER)]
    assert texts[0] == texts[1], "the run's own adapter tells it too"
    card = ModelCard(texts[0])
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {
        name: round(results["after"][f"test/{name}"], 4) for name in ("accuracy", "f1")
    }
    before, after = (results[when]["test/f1"] for when in ("before", "after"))
    for told in (
        "# lora over `tiny_bert", f"| `macro F1` | {before:.4f} | {after:.4f} |", "- r: 8\n",
        f"{results['trained']:,} of {results['parameters']:,} (", "- data: `reviews.csv`",
        "- rows: `84 train`, `12 validation`, `24 test`", "- labels: `bad`, `good`, `mixed`", "- epochs: 3\n",
        f"- steps: {results['steps']}\n", "- learning rate: 0.02\n", "- batch size: 16\n", "- precision: `32-true`",
        "- seed: 0\n", f"- torch: `{results['versions']['torch']}`", "PeftModel",
    ):  # fmt: skip
        assert told in card.text, told
    for path in (lora_run, Path(runs.load_config(lora_run).model.name), Path.home()):
        assert str(path) not in texts[0]
        assert str(path.parent) not in texts[0] or path.parent == Path("/")


def test_a_run_without_figures_is_exported_too(lora_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(lora_run, tmp_path / "run")
    (run / runs.RESULTS).unlink()
    card = ModelCard.load(exported(run) / CARD)
    assert card.data.eval_results is None
    assert "- learning rate: 0.02\n" in card.text


def test_the_newest_run_is_the_last(lora_run: Path, tmp_path: Path) -> None:
    shutil.copytree(lora_run, tmp_path / "runs" / "only")
    assert succeed("export", "run=last", "out=exported").startswith("runs/only is exported to exported: LORA over ")


def test_a_damaged_run_leaves_nothing(lora_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(lora_run, tmp_path / "run")
    (run / runs.ADAPTER / WEIGHTS).write_bytes(b"{")
    assert "is damaged or incomplete" in call("export", f"run={run}", "out=exported").message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("app", ["merge", "export"])
def test_a_folder_to_write_is_asked_for(app: str) -> None:
    assert call(app, "run=last").message.startswith("'out' has no value: give out=...")
