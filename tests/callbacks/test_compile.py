"""torch.compile: as a callback, and where users call it themselves. Without inductor where its code doesn't matter."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import CNN, BertInInit, make, trainer
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from test_contract import METHODS
from torch import Tensor, nn

import lightning_ft
from lightning_ft import AdaLoRA, Adapter, BitFit, Compile, GradientCheckpointing, InjectionError, LoRA, PromptTuning
from lightning_ft.errors import UserError
from lightning_ft.injection import find_base, injected_names, match_names, plain


class Counting:
    """A backend that counts the graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        return graph.forward


def fit(module: Any, *callbacks: Callback, **more: Any) -> Any:
    trainer(*callbacks, **{"max_epochs": 1, **more}).fit(module)
    return module


@pytest.mark.slow
def test_a_fit_is_the_same_compiled_in_one_graph_and_leaves_no_trace() -> None:
    torch._dynamo.reset()
    method, backend = LoRA(r=2, target_modules="all-linear"), Counting()
    eager = fit(make(BertInInit), method)
    compiled = make(BertInInit)
    keys = []
    seen = type("Keys", (Callback,), {"on_train_end": lambda self, _, module: keys.extend(module.state_dict())})()
    fit(compiled, method, Compile(fullgraph=True, backend=backend), seen)  # type: ignore[arg-type]
    assert backend.graphs == 1, "validation isn't compiled"
    assert keys == list(eager.state_dict())
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[key], value, atol=1e-6, rtol=1e-5, msg=key)
    assert compiled.model._compiled_call_impl is None
    fit(compiled, method)
    assert backend.graphs == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dora", "adalora", "adapter", "ia3", "p_tuning", "prefix", "gradual_unfreezing"])
def test_other_methods_are_one_graph_too(name: str) -> None:
    torch._dynamo.reset()
    short, backend = {"max_epochs": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0}, Counting()
    eager = fit(make(BertInInit), copy.copy(METHODS[name]), **short)
    compiled = fit(make(BertInInit), copy.copy(METHODS[name]), Compile(fullgraph=True, backend=backend), **short)  # type: ignore[arg-type]
    assert backend.graphs == 1
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[key], value, atol=1e-5, rtol=1e-5, msg=key)


@pytest.mark.slow
def test_gradient_checkpointing_goes_with_it() -> None:
    torch._dynamo.reset()
    eager = fit(make(BertInInit), LoRA(r=2), max_steps=1)
    alone = {"max_steps": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    both = fit(make(BertInInit), LoRA(r=2), GradientCheckpointing(), Compile(backend="aot_eager"), **alone)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(both.state_dict()[key], value, atol=1e-6, rtol=1e-5, msg=key)


def test_a_model_that_the_user_compiled_is_so_afterwards() -> None:
    module = make(BertInInit)
    module.model.compile(backend="eager")
    compiled = module.model._compiled_call_impl
    with torch.compiler.set_stance("force_eager"):
        fit(module, LoRA(r=2), Compile(backend="eager"))
    assert module.model._compiled_call_impl is compiled


def test_what_would_compile_nothing_is_refused() -> None:
    class Trunk(BertInInit):
        def outputs(self, x: Tensor) -> Tensor:
            return self.model.classifier(self.model.bert(x).pooler_output)

    module = make(Trunk)
    with pytest.raises(UserError, match=r"Trunk doesn't call its BertForSequenceClassification.*backbone="):
        fit(module, LoRA(r=2), Compile(backend="eager"))
    assert module.model._compiled_call_impl is None
    with pytest.raises(InjectionError, match="Name it: backbone"):
        fit(make(CNN), Compile(backend="eager"))


# --------------------------------------------------------------------- torch.compile(module) by the user


def test_plain_is_the_name_without_wrappers() -> None:
    assert plain("net._orig_mod.encoder.query._orig_mod") == "net.encoder.query"
    assert plain("_orig_mod.encoder.weight") == "encoder.weight"
    assert plain("^bert\\._orig_mod\\.encoder") == "^bert\\.encoder"
    assert plain("net.my_orig_model.x") == "net.my_orig_model.x"
    assert match_names(["a.b"], ["a._orig_mod.b", "c"]) == match_names("a[.]b", ["a._orig_mod.b"]) == ["a._orig_mod.b"]


class Wrapped(BertInInit):
    """The user compiles the model, a part of it, and a layer of a head; nothing is run compiled here."""

    def __init__(self) -> None:
        super().__init__()
        self.model.bert.encoder.layer[0] = torch.compile(self.model.bert.encoder.layer[0], backend="eager")
        attention = self.model.bert.encoder.layer[1].attention.self
        attention.query = torch.compile(attention.query, backend="eager")
        self.model.classifier = torch.compile(self.model.classifier, backend="eager")
        self.model = torch.compile(self.model, backend="eager")

    def outputs(self, x: Tensor) -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return super().outputs(x)


KINDS = (
    LoRA(r=2, rank_pattern={"layer.1.*query": 3}),
    AdaLoRA(init_r=3, target_r=2),
    Adapter(bottleneck=2),
    BitFit(),
    PromptTuning(4),
)
EACH = pytest.mark.parametrize("method", KINDS, ids=lambda method: type(method).__name__)


def there_and_back(method: Any) -> tuple[Any, Any]:
    return fit(make(BertInInit), copy.copy(method), max_epochs=2), fit(make(Wrapped), copy.copy(method), max_epochs=2)


def out(module: Any) -> Tensor:
    with torch.no_grad():
        return module.eval().outputs(module.example())


@EACH
def test_a_compiled_model_trains_and_is_saved_like_a_plain_one(method: Any, tmp_path: Path) -> None:
    bare, wrapped = there_and_back(method)
    assert {plain(n) for n in injected_names(wrapped)} == injected_names(bare)
    assert torch.equal(out(bare), out(wrapped))
    files = {}
    for name, module in {"bare": bare, "wrapped": wrapped}.items():
        lightning_ft.save_adapter(module, tmp_path / name)
        files[name] = (tmp_path / name / "adapter_config.json").read_text()
    assert files["bare"] == files["wrapped"]
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in files]
    assert list(tensors[0]) == list(tensors[1])
    assert all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())
    for kind, folder in ((BertInInit, "wrapped"), (Wrapped, "bare")):
        fresh = make(kind)
        lightning_ft.load_adapter(fresh, tmp_path / folder)
        torch.testing.assert_close(out(fresh), out(bare), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", KINDS[:2], ids=lambda method: type(method).__name__)
def test_checkpoints_go_between_compiled_and_plain_models(method: Any, tmp_path: Path) -> None:
    kinds = {"bare": BertInInit, "wrapped": Wrapped}
    ends = {}
    for name, kind in kinds.items():
        run = trainer(copy.copy(method), max_epochs=1)
        run.fit(make(kind))
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
        saved = torch.load(tmp_path / f"{name}.ckpt")["state_dict"]
        assert not [key for key in saved if "_orig_mod" in key]
    for start in kinds:
        for name, kind in kinds.items():
            module = make(kind)
            trainer(copy.copy(method), max_epochs=2).fit(module, ckpt_path=tmp_path / f"{start}.ckpt")
            ends[start, name] = out(module)
            torch.manual_seed(7)
            loaded = lightning_ft.load_from_checkpoint(kind, tmp_path / f"{start}.ckpt")
            assert torch.isfinite(out(loaded)).all()
    assert all(torch.equal(end, ends["bare", "bare"]) for end in ends.values())


def test_a_compiled_base_of_the_users_own_is_named_as_if_it_were_not() -> None:
    class Own(CNN):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.compile(self.body, backend="eager")

    module = make(Own)
    base = find_base(module, "body")
    assert base.root is module.body._orig_mod
    assert find_base(module, "body._orig_mod") == base
    names = LoRA(r=2, backbone="body", target_modules=["5"]).inject(module)
    assert names == ["body._orig_mod.5"]
    assert isinstance(pickle.loads(pickle.dumps(module.body._orig_mod)), nn.Sequential)
    assert lightning_ft.merge(module) == names
