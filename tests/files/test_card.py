"""Model cards: what the hub reads of them is what was meant, whatever is in it, and what they tell to run runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from foreign import TrunkInSetup, make
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from torch import nn

from lightning_ft import HeadOnly, LoRA, PromptTuning, save_adapter
from lightning_ft.files.card import Facts, model_card
from lightning_ft.files.peft import CARD

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CONFIG = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "someone/model", "r": 8}
FACTS: Facts = {
    "base": "someone/model",
    "method": "LoRA",
    "settings": {"r": 8, "dropout": 0.1, "target_modules": None},
    "parameters": 1000,
    "trained": 25,
    "data": "someone/data",
    "data_on_hub": True,
    "rows": {"train": 1200, "test": 400},
    "labels": ["bad", "good"],
    "scores": [{"type": "f1", "name": "macro F1", "before": 0.5, "after": 0.87654}, {"type": "accuracy", "after": 0.9}],
    "training": {"learning rate": 1e-3, "epochs": 3, "warmup": None},
    "versions": {"torch": "2.0"},
}
ODD = [
    "a: b", "- item", "---", "\n---\n", "# title\n## Method", "'", '"', "```", "`` ` ``", "| cell |", "{{ jinja }}",
    "*&!%@", "no", "null", "1.0", "1e3", "2024-01-01", "", " ", "<script>", "[link](x)", "很好 🙂", "\u2028x\x85y\x0c",
    "\\", "a\tb", "x" * 200, "two words " * 30,
]  # fmt: skip


def front_matter(text: str) -> dict[str, Any]:
    """As the hub takes it out of a card."""
    found = REGEX_YAML_BLOCK.search(text)
    assert found
    return yaml.safe_load(found[2])


def outline(text: str) -> list[str]:
    """The titles of the sections."""
    return re.findall(r"^## .*$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), flags=re.MULTILINE)


def code(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def test_the_hub_reads_what_is_known() -> None:
    data = ModelCard(model_card(CONFIG, 25, "peft", FACTS)).data
    assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", "someone/model", "text-classification")
    assert (data.tags, data.datasets, data.metrics) == (["lightning_ft", "lora"], ["someone/data"], ["f1", "accuracy"])
    assert data.license is None, "that is for the user to name"
    results = {result.metric_name: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {"macro F1": 0.8765, "accuracy": 0.9}
    for result in results.values():
        assert (result.task_type, result.dataset_type, result.dataset_split) == (
            "text-classification", "someone/data", "test",
        )  # fmt: skip


def test_people_read_what_is_known() -> None:
    text = model_card(CONFIG, 25, "peft", FACTS)
    assert outline(text) == ["## Loading", "## Method", "## Data", "## Training", "## Versions", "## Licence"]
    for told in (
        "# LoRA over `someone/model`\n", "25 parameters; training changed 25 of 1,000 (2.50%).", "- dropout: 0.1\n",
        "| `macro F1` | 0.5000 | 0.8765 |\n| `accuracy` |  | 0.9000 |\n", "- rows: `1,200 train`, `400 test`\n",
        "- labels: `bad`, `good`\n", "- learning rate: 0.001\n- epochs: 3\n\n", "- torch: `2.0`\n- file format: `PEFT",
    ):  # fmt: skip
        assert told in text, told
    assert "None" not in text.replace("None is named", "")


def test_what_is_not_known_is_left_out() -> None:
    text = model_card({"peft_type": "LORA"}, 25, "peft")
    assert front_matter(text) == {"library_name": "peft", "tags": ["lightning_ft", "lora"]}
    assert outline(text) == ["## Loading", "## Method", "## Versions", "## Licence"]
    assert "None" not in text.replace("None is named", "")


def test_each_of_several_methods_is_told() -> None:
    methods = [{"peft_type": "LORA", "r": 4}, {"peft_type": "IA3", "target_modules": ["k"]}]
    text = model_card({"peft_type": "COMBINED", "methods": methods}, 25, "lightning_ft")
    assert front_matter(text) == {"library_name": "lightning_ft", "tags": ["lightning_ft", "lora", "ia3"]}
    for told in (
        "# LORA and IA3 over ",
        "- LORA r: 4\n",
        "- IA3 target_modules: `k`\n",
        "Stock PEFT can't load it whole",
    ):
        assert told in text, told


def test_no_text_breaks_the_card() -> None:
    for odd in ODD:
        facts: Facts = {
            **FACTS, "base": odd, "method": odd, "data": odd, "data_on_hub": False, "labels": ["bad", odd],
            "settings": {"target_modules": odd}, "scores": [{"type": "f1", "name": odd, "after": 0.5}],
            "training": {"note": odd, odd: 1}, "rows": {odd: 3},
        }  # fmt: skip
        text = model_card(CONFIG, 25, "peft", facts)
        assert outline(text) == outline(model_card(CONFIG, 25, "peft", FACTS))
        data = ModelCard(text).data
        assert (data.library_name, data.tags) == ("peft", ["lightning_ft", "lora"])
        assert data.to_dict() == front_matter(text)
        for result in data.eval_results or ():
            assert (result.metric_name, result.dataset_name) == (odd, re.split(r"[\\/]", odd.rstrip("\\/"))[-1])
        for block in code(text):
            ast.parse(block)
        labels = re.search(r"^labels = (.*)$", text, flags=re.MULTILINE)
        assert labels
        assert ast.literal_eval(labels[1]) == ["bad", odd]


def test_of_a_folder_only_its_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "secret" / "bert").mkdir(parents=True)  # where "secret/bert" could be a name on the hub
    for path in ("/home/me/secret/bert", "../secret/bert/", "C:\\secret\\bert", "~/secret/bert", "secret/bert"):
        text = model_card({**CONFIG, "base_model_name_or_path": path}, 25, "peft", {"data": path})
        assert "secret" not in text
        assert "base_model" not in front_matter(text)
        assert "# LORA over `bert`" in text


def test_a_fact_that_it_has_no_place_for_is_refused_and_nothing_written(tmp_path: Path) -> None:
    model = tiny.bert_classifier()
    LoRA(r=2).inject(model)
    wrong: Any = {"lables": ["bad"]}
    with pytest.raises(ValueError, match=r"no place for lables; it takes base, .*labels"):
        save_adapter(model, tmp_path / "adapter", card=wrong)
    assert not (tmp_path / "adapter").exists()


# ----------------------------------------------------------------------------------------------- loading


def saved(model: nn.Module, folder: Path, **facts: Any) -> str:
    return (save_adapter(model, folder, card=Facts(**facts)) / CARD).read_text(encoding="utf-8")


def test_its_code_loads_the_adapter(tmp_path: Path) -> None:
    tiny.bert().save_pretrained(tmp_path / "base")
    names: dict[str, Any] = {}
    labels = ["bad", "good", "a 'mixed' \"one\""]
    model = tiny.bert_classifier()
    model.config.name_or_path = str(tmp_path / "base")
    LoRA(r=2).inject(model)
    nn.init.normal_(model.classifier.weight)
    blocks = code(saved(model, tmp_path / "adapter", labels=labels))
    assert len(blocks) == 3
    for way in blocks[1:]:
        for block in (blocks[0], way):
            here = block.replace("path/of/this/folder", str(tmp_path / "adapter"))
            exec(here.replace("path/of/base", str(tmp_path / "base")), names)
        torch.testing.assert_close(tiny.logits(names["model"]), tiny.logits(model))
        assert list(names["model"].config.id2label.values()) == labels


def test_stock_peft_is_named_only_where_it_does_as_well(tmp_path: Path) -> None:
    outside = make(TrunkInSetup)
    outside.setup("fit")
    LoRA(r=2).inject(outside)
    head = tiny.bert_classifier()
    HeadOnly().inject(head)
    prompt = tiny.bert_classifier()  # loads, but predicts otherwise
    PromptTuning(2).inject(prompt)
    for name, model in (("outside", outside), ("head", head), ("prompt", prompt)):
        text = saved(model, tmp_path / name)
        assert "load_adapter(" in text
        assert "PeftModel" not in text
        assert front_matter(text)["library_name"] == "lightning_ft"


def test_without_facts_a_card_tells_method_base_parameters_and_versions(tmp_path: Path) -> None:
    model = tiny.bert_classifier()
    model.config.name_or_path = "someone/model"
    LoRA(r=2, alpha=6).inject(model)
    text = saved(model, tmp_path)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for told in (
        "# LORA over `someone/model`\n", f"{parameters:,} parameters", "- r: 2\n", "- lora_alpha: 6\n",
        f"- torch: `{torch.__version__}`", "- lightning_ft: `", "- transformers: `", "- lightning: `", "license: ...",
    ):  # fmt: skip
        assert told in text, told
