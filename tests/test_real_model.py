"""On a real pretrained language model, where the workplace has one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lightning_ft
from lightning_ft import LoRA
from lightning_ft.injection import injected_modules


def test_a_language_model_tells_the_same_story_injected_and_merged(shared_data: Path) -> None:
    name = shared_data / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(name)
    prompt = AutoTokenizer.from_pretrained(name)("Once upon a time", return_tensors="pt").input_ids

    def story() -> list[int]:
        return model.generate(prompt, max_new_tokens=30, do_sample=False, pad_token_id=0)[0].tolist()

    pretrained = story()
    assert {path.rpartition(".")[2] for path in LoRA(r=4).inject(model)} == {"q_proj", "v_proj"}
    assert story() == pretrained
    for _, layer in injected_modules(model):
        nn.init.normal_(layer.lora_B, std=0.5)
    adapted = story()
    assert adapted != pretrained
    with torch.no_grad():
        unmerged = model(prompt).logits
        lightning_ft.merge(model)
        torch.testing.assert_close(model(prompt).logits, unmerged, atol=1e-4, rtol=1e-4)
    assert story() == adapted
