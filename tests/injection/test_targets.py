from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny
import transformers
from foreign import BertInInit, TrunkInSetup, make
from torch import Tensor, nn

from lightning_ft import LoRA
from lightning_ft.injection import InjectionError, find_base, freeze_base, injected_names, is_conv1d, resolve_targets


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


class Parts(nn.Module):
    """A module with these children, as a user would write it."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class OwnAttention(nn.Module):
    """An attention block that nobody has heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(4, 4), nn.Linear(4, 4)


def trunk_in_a_module() -> nn.Module:
    module = make(TrunkInSetup)
    module.setup("fit")
    return module


def supported(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d(module)


def targets(
    model: nn.Module,
    wanted: str | Sequence[str] | None,
    backbone: str | None = None,
    excluded: Sequence[str] = (),
) -> list[str]:
    backbone = "body" if backbone is None and hasattr(model, "body") else backbone
    return resolve_targets(find_base(model, backbone), wanted, supported, excluded)


def kinds(names: Sequence[str]) -> set[str]:
    """The names without the numbers of their layers and what stands before."""
    return {re.sub(r"^(.*\.)?\d+\.", "", name) for name in names}


# ------------------------------------------------------------------------------------------- base and head


@pytest.mark.parametrize(
    ("build", "backbone", "root_name", "frozen"),
    [
        (trunk_in_a_module, None, "trunk", ("",)),
        (tiny.bert, None, "", ("",)),
        (tiny.bert_classifier, None, "", ("bert",)),
        (lambda: make(BertInInit), None, "model", ("bert",)),
        (lambda: make(BertInInit), "model.bert", "model.bert", ("",)),
        (lambda: make(BertInInit), ".", "", ("",)),
        (tiny.gpt2, None, "", ("",)),
        (tiny.t5, None, "", ("",)),
        (lambda: Parts(fc=nn.Linear(4, 4)), "fc", "", ("fc",)),
        (lambda: Parts(enc=mlp(), head=nn.Linear(4, 2)), "enc", "enc", ("",)),
        (lambda: Parts(enc=mlp(), head=nn.Linear(4, 2)), "enc.2", "enc", ("2",)),
        (lambda: Parts(enc=mlp(), head=nn.Linear(4, 2)), ".", "", ("",)),
        (lambda: Parts(outer=Parts(lm=tiny.bert()), head=nn.Linear(16, 2)), None, "outer.lm", ("",)),
    ],
)
def test_the_base_is_found(
    build: Callable[[], nn.Module], backbone: str | None, root_name: str, frozen: tuple[str, ...]
) -> None:
    model = build()
    base = find_base(model, backbone)
    assert (base.root_name, base.frozen) == (root_name, frozen)
    assert base.root is model.get_submodule(root_name)


def test_what_is_new_trains_and_what_was_pretrained_does_not() -> None:
    for build, head in [
        (trunk_in_a_module, {"head"}),
        (tiny.bert_classifier, {"classifier"}),
        (tiny.distilbert_classifier, {"pre_classifier", "classifier"}),
        (tiny.gpt2, set()),
        (lambda: tiny.gpt2(tie_word_embeddings=False), set()),
        (tiny.t5, set()),
        (lambda: Parts(lm=tiny.bert(), pool=nn.Linear(16, 16), head=nn.Linear(16, 2)), {"pool", "head"}),
    ]:
        model = build()
        freeze_base(find_base(model), "X")
        assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == head


def test_an_unclear_base_is_an_error_that_lists_what_there_is() -> None:
    for build, backbone, says in [
        (lambda: Parts(net=mlp()), None, ["could be net.", 'backbone="net"']),  # whose last layer may be a new head
        (lambda: Parts(enc=mlp(), dec=mlp()), None, ["enc, dec", 'backbone="enc"', 'backbone="."']),
        (lambda: Parts(a=tiny.bert(), b=tiny.gpt2(), c=mlp()), None, ["Parts", "could be a, b.", 'backbone="a"']),
        (lambda: Parts(encoder=mlp(), head=mlp()), "encodr", ["encodr", "Near names: encoder"]),
        (lambda: Parts(act=nn.ReLU()), None, ["Parts", "nothing to fine-tune", "configure_model()"]),
    ]:
        with pytest.raises(InjectionError) as error:
            find_base(build(), backbone)
        assert all(part in str(error.value) for part in says), str(error.value)


def test_parameters_beside_an_only_child_make_the_base_unclear() -> None:
    model = Parts(body=mlp())
    model.scale = nn.Parameter(Tensor([1.0]))
    with pytest.raises(InjectionError, match='backbone="body"'):
        find_base(model)
    assert find_base(model, "body").root is model.body


# ------------------------------------------------------------------------------------------------- targets


def test_names_and_ends_of_names_match_whole_parts_of_a_path() -> None:
    model = tiny.bert_classifier()
    assert kinds(targets(model, ["query"])) == {"attention.self.query"}
    assert len(targets(model, ["query"])) == 2
    assert kinds(targets(model, ["output.dense"])) == {"output.dense", "attention.output.dense"}
    assert kinds(targets(model, ["attention.output.dense"])) == {"attention.output.dense"}
    first = "bert.encoder.layer.0.attention.self.value"
    assert targets(model, [first, "pooler.dense"]) == [first, "bert.pooler.dense"]
    with pytest.raises(InjectionError, match="'uery' matches no module"):
        targets(model, ["uery"])


def test_names_come_once_and_in_the_models_order() -> None:
    both = targets(tiny.bert(), ["value", "query", "self.query"])
    assert [name.rpartition(".")[2] for name in both] == ["query", "value"] * 2


def test_a_regular_expression_must_match_the_whole_path() -> None:
    model = tiny.bert()
    assert targets(model, r"encoder\.layer\.1\..*\.(query|key)") == [
        "encoder.layer.1.attention.self.query",
        "encoder.layer.1.attention.self.key",
    ]
    with pytest.raises(InjectionError, match=r"matches no module.*Near names:.*query"):
        targets(model, "query")
    with pytest.raises(InjectionError, match=r"'\(query' isn't a valid regular expression"):
        targets(model, "(query")


def test_heads_are_no_targets() -> None:
    with pytest.raises(InjectionError, match="classifier"):
        targets(tiny.bert_classifier(), ["classifier"])
    assert "classifier" not in targets(tiny.bert_classifier(), "all-linear")
    assert "lm_head" in targets(tiny.gpt2(tie_word_embeddings=False), ["lm_head"])


LAYER = {"attention.self.query", "attention.self.key", "attention.self.value"}
LAYER |= {"attention.output.dense", "intermediate.dense", "output.dense"}


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (tiny.bert, LAYER),  # its pooler is read by nobody
        (tiny.bert_classifier, LAYER | {"bert.pooler.dense"}),
        (tiny.gpt2, {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        (
            tiny.t5,
            {
                *(f"{kind}Attention.{x}" for kind in ("Self", "EncDec") for x in "qkvo"),
                "DenseReluDense.wi",
                "DenseReluDense.wo",
            },
        ),
        (lambda: Parts(body=mlp()), {"0", "2"}),
        (lambda: Parts(body=nn.TransformerEncoderLayer(4, 2, 8)), {"linear1", "linear2"}),
    ],
)
def test_all_linear_is_every_linear_layer_whose_output_is_read(build: Callable[[], nn.Module], found: set[str]) -> None:
    assert kinds(targets(build(), "all-linear")) == found


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (tiny.bert_classifier, {n for n in LAYER if n.startswith("attention")}),
        (tiny.gpt2, {"attn.c_attn", "attn.c_proj"}),
        (tiny.llama, {f"self_attn.{x}_proj" for x in "qkvo"}),
        (tiny.t5, {f"{kind}Attention.{x}" for kind in ("Self", "EncDec") for x in "qkvo"}),
        (lambda: Parts(body=nn.ModuleList([OwnAttention(), mlp()])), {"query", "value"}),
    ],
)
def test_attention_is_the_linear_layers_of_attention_blocks(build: Callable[[], nn.Module], found: set[str]) -> None:
    assert kinds(targets(build(), "attention")) == found


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (tiny.bert, {"attention.self.query", "attention.self.value"}),
        (tiny.distilbert_classifier, {"attention.q_lin", "attention.v_lin"}),
        (tiny.gpt2, {"attn.c_attn"}),
        (tiny.llama, {"self_attn.q_proj", "self_attn.v_proj"}),
        (tiny.t5, {f"{kind}Attention.{x}" for kind in ("Self", "EncDec") for x in "qv"}),
        (lambda: Parts(body=nn.ModuleList([OwnAttention(), mlp()])), {"query", "value"}),
        (lambda: Parts(body=mlp()), {"0", "2"}),
        # Its attention can't be adapted, so that there is no usual choice.
        (lambda: Parts(body=nn.TransformerEncoderLayer(4, 2, 8)), {"linear1", "linear2"}),
    ],
)
def test_the_default_is_what_is_usual_for_the_architecture(build: Callable[[], nn.Module], found: set[str]) -> None:
    assert kinds(targets(build(), None)) == found


def test_what_matches_nothing_is_an_error_with_near_names() -> None:
    for wanted, says in [
        (["queri"], "'queri' matches no module. Near names: query"),
        (["xyzxyz"], "Its modules are named: embeddings, word_embeddings"),
        (r".*\.quer", "matches no module of BertModel. Near names: query"),
    ]:
        with pytest.raises(InjectionError) as error:
            targets(tiny.bert(), wanted)
        assert says in str(error.value)


def test_an_end_that_matches_nothing_beside_others_is_warned_of_with_near_names() -> None:
    model = tiny.bert()
    with pytest.warns(UserWarning, match="'valeu' matches no module. Near names: value"):
        assert targets(model, ["query", "valeu"]) == targets(model, ["query"])


def test_a_kind_that_is_not_supported_is_named() -> None:
    for wanted, kind in [(["LayerNorm"], "LayerNorm"), (r"encoder\.layer\.0", "BertLayer")]:
        with pytest.raises(InjectionError, match=rf"can't adapt \({kind}\).*Name the layers inside"):
            targets(tiny.bert(), wanted)


def test_what_trains_whole_is_no_target() -> None:
    model = tiny.bert_classifier()
    everything = targets(model, "all-linear")
    layer = "bert.encoder.layer.1"
    without = targets(model, "all-linear", excluded=[layer])
    assert without == [name for name in everything if not name.startswith(f"{layer}.")]
    with pytest.raises(InjectionError, match=r"pooler\.dense"):
        targets(model, ["pooler.dense"], excluded=["bert.pooler"])
    # a path that only begins like the excluded one
    body = Parts(body=Parts(fc=nn.Linear(4, 4), fc2=nn.Linear(4, 4)))
    assert targets(body, "all-linear", excluded=["fc"]) == ["fc2"]


SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
IN_THE_WILD: dict[str, tuple[dict[str, Any], set[str]]] = {
    "T5ForQuestionAnswering": (
        {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 9},
        {"qa_outputs"},
    ),
    "ElectraForMaskedLM": ({**SMALL, "embedding_size": 8}, set()),
    "ViTForImageClassification": ({**SMALL, "image_size": 8, "patch_size": 4}, {"classifier"}),
    "BartForSequenceClassification": (
        {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 9,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "eos_token_id": 1},
        {"classification_head"},
    ),
    "DebertaV2ForSequenceClassification": (SMALL, {"pooler", "classifier"}),
    "LlamaForSequenceClassification": (SMALL, {"score"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", IN_THE_WILD)
def test_in_the_wild_the_default_targets_exist_and_the_new_head_alone_trains(kind: str) -> None:
    config, head = IN_THE_WILD[kind]
    model = getattr(transformers, kind)(getattr(transformers, kind).config_class(**config))
    assert LoRA(r=2).inject(model)
    added = injected_names(model)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad and n not in added} == head
