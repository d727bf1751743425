"""The commands on a language model: a tiny Llama learns to complete prompts, and each command comes back to it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import words
from commands import call, succeed, tiny_run
from huggingface_hub import ModelCard

from lightning_ft.apps import runs

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's

ANSWERS = {"what is two and one?": "three", "two and two": "is four", "where is the dog?": "in the house"}
LM = ("task=causal_lm", "data.text=prompt", "data.label=completion", "task.max_new_tokens=8")


def write_rows(path: Path, count: int = 60) -> Path:
    rows = list(ANSWERS.items()) * (count // len(ANSWERS))
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("language")


@pytest.fixture(scope="module")
def model(home: Path) -> str:
    return words.llama(home / "model")


@pytest.fixture(scope="module")
def run(home: Path, model: str) -> Path:
    """A finished run of LoRA on packed rows."""
    data = write_rows(home / "data.jsonl")
    more = [
        "method=lora",
        "optimizer.lr=0.005",
        "method.dropout=0",
        "trainer.max_epochs=30",
        "test_before=true",
        "data.batch_size=2",
    ]
    packing = "data.target.packing=true"
    said = succeed(*tiny_run(model, data, *LM, *more, packing, f"hydra.run.dir={home}/runs/lora"), cwd=home)
    assert "test perplexity" in said
    assert "test token accuracy" in said
    return home / "runs" / "lora"


def test_training_lowers_perplexity_and_leaves_what_was_generated(run: Path) -> None:
    results = runs.load_results(run)
    before, after = (results[when]["test/perplexity"] for when in ("before", "after"))
    assert after < before
    assert (results["before"]["test/token_accuracy"], results["after"]["test/token_accuracy"]) == (0.0, 1.0)
    assert (results["monitor"], results["mode"]) == ("val/perplexity", "min")
    with (run / "metrics" / "test_generations.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert all(row["generated"] == row["reference"] == ANSWERS[row["prompt"]] for row in rows)
    assert (run / "metrics" / "val_generations.csv").is_file()


def test_prompts_are_completed(run: Path) -> None:
    (run.parents[1] / "prompts.txt").write_text("\n".join(ANSWERS), encoding="utf-8")
    succeed("predict", f"run={run}", f"file={run.parents[1]}/prompts.txt", "out=out.jsonl")
    rows = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["completion"] for row in rows] == list(ANSWERS.values())
    assert "in the house" in succeed("predict", f"run={run}", "text=where is the dog?")


def test_a_run_is_scored_on_its_own_and_on_other_data(run: Path) -> None:
    said = succeed("evaluate", f"run={run}")
    assert f"perplexity {runs.load_results(run)['after']['test/perplexity']:.3f}, token accuracy 100.0%" in said
    assert "Generations" in said
    Path("wrong.jsonl").write_text(json.dumps({"prompt": "two and two", "completion": "three"}) + "\n")
    assert "token accuracy 100.0%" not in succeed("evaluate", f"run={run}", "data.path=wrong.jsonl")


def test_a_merged_run_completes_without_lightning_ft(run: Path) -> None:
    said = succeed("merge", f"run={run}", "out=merged")
    assert "no probability differs by more than" in said
    assert "LlamaForCausalLM" in said
    card = ModelCard.load("merged/README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert "- template: `{prompt} {completion}`" in card.text
    (code,) = ("\n".join(block.partition("\n```")[0] for block in card.text.split("```python\n")[1:]),)
    names: dict[str, object] = {}
    exec(code.replace("path/of/this/folder", "merged").replace("Once upon a time", "two and two"), names)
    tokenizer, generated = names["tokenizer"], names["model"].generate  # type: ignore[attr-defined]
    ids = tokenizer("two and two", return_tensors="pt").input_ids  # type: ignore[operator]
    assert tokenizer.decode(generated(ids, max_new_tokens=8)[0], skip_special_tokens=True) == "two and two is four"  # type: ignore[attr-defined]


def test_an_exported_run_is_loaded_by_stock_peft(run: Path, model: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert "PeftModel.from_pretrained loads it" in succeed("export", f"run={run}", "out=exported")
    assert json.loads(Path("exported/adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), "exported").eval()
    tokenizer = AutoTokenizer.from_pretrained("exported")
    ids = tokenizer("what is two and one?", return_tensors="pt").input_ids
    with torch.no_grad():
        said = loaded.generate(input_ids=ids, max_new_tokens=8)[0]
    assert tokenizer.decode(said, skip_special_tokens=True) == "what is two and one? three"


def test_plain_texts_and_chats_are_learned_too(home: Path, model: str) -> None:
    (home / "texts.txt").write_text("\n\n".join(words.SENTENCES * 4), encoding="utf-8")
    succeed(*tiny_run(model, home / "texts.txt", "task=text_lm", "data.target.packing=true", "hydra.run.dir=texts"))
    assert runs.load_results(Path("texts"))["rows"]["train"] < 20
    (home / "chat.jinja").write_text(words.CHATML, encoding="utf-8")
    chats = [[{"role": "user", "content": p}, {"role": "assistant", "content": c}] for p, c in ANSWERS.items()] * 7
    (home / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    template = f"data.target.chat_template={home}/chat.jinja"
    succeed(*tiny_run(model, home / "chats.jsonl", "task=chat", template, "data.max_length=200", "hydra.run.dir=chats"))
    assert "completion" in succeed("predict", "run=chats", "text=two and two")
    succeed("export", "run=chats", "out=exported")
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained("exported").chat_template == words.CHATML


def test_sources_and_targets_are_learned(home: Path) -> None:
    import tiny

    tokenizer = words.t5_like()
    model = words.save(tiny.t5(vocab_size=len(tokenizer), eos_token_id=2), tokenizer, home / "t5")
    data = write_rows(home / "pairs.jsonl")
    columns = ("data.text=prompt", "data.label=completion", "task.exact_match=true")
    fast = ("optimizer.lr=0.01", "trainer.max_epochs=12", "method=full", "hydra.run.dir=pairs")
    assert "test exact match" in succeed(*tiny_run(model, data, "task=seq2seq", *columns, *fast))
    after = runs.load_results(Path("pairs"))["after"]
    assert after["test/exact_match"] > 0.5
    assert "is four" in succeed("predict", "run=pairs", "text=two and two")
    succeed("merge", "run=pairs", "out=merged")


def test_what_does_not_go_together_is_said_before_training(home: Path, model: str) -> None:
    data = write_rows(home / "data.jsonl")
    prompt = call(*tiny_run(model, data, *LM, "method=prompt", "data.target.packing=true", "hydra.run.dir=one"))
    assert "20 virtual tokens" in prompt.message
    head = call(*tiny_run(model, data, *LM, "method=head", "hydra.run.dir=two"))
    assert "HeadOnly leaves nothing" in head.message
    template = call(*tiny_run(model, data, *LM, "data.target.template={prompt}", "hydra.run.dir=three"))
    assert "end with {completion}" in template.message
