from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from foreign import CNN, GPT2, MODULES, BertInInit, Classifier, ManualTwoOptimizers, make, trainer, vector_data
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from matplotlib.image import imread
from reference import adalora as paper
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset
from transformers.pytorch_utils import Conv1D

import lightning_ft
from lightning_ft import AdaLoRA, InjectionError
from lightning_ft.callbacks.best import BestCheckpoint
from lightning_ft.injection import injected_modules
from lightning_ft.methods.adalora import AdaLoRALayer, RankAllocator, Schedule, orthogonality, prune

R, ALPHA, IN, OUT = 4, 6.0, 5, 7
KEYS = ("lora_A", "lora_B", "lora_E")


def conv1d() -> nn.Module:
    layer = Conv1D(OUT, IN)
    nn.init.normal_(layer.bias)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(IN, OUT),
    "Linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "Conv1D": conv1d,
}
each_layer = pytest.mark.parametrize("kind", LAYERS)


def adapted(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Any]:
    """A model of one layer with AdaLoRA, random in all its parts, and that layer."""
    torch.manual_seed(4)
    model = nn.Sequential(LAYERS[kind]()).to(dtype)
    AdaLoRA(R, 2, ALPHA, backbone=".", target_modules=["0"]).inject(model)
    with torch.no_grad():
        for key in KEYS:
            parameter = model[0].get_parameter(key)
            parameter.data = torch.randn_like(parameter, dtype=torch.promote_types(dtype, torch.float32))
    return model, model[0]


def layers_of(model: nn.Module) -> dict[str, Any]:
    return {path: layer for path, layer in injected_modules(model) if isinstance(layer, AdaLoRALayer)}


def ranks(model: nn.Module) -> list[int]:
    return [len(layer.lora_E) for layer in layers_of(model).values()]


def outputs(module: Any) -> Tensor:
    module.eval()
    with torch.no_grad():
        out = module.outputs(module.example())
    module.train()
    return out


# ----------------------------------------------------------------------------------------------- the maths


@each_layer
@pytest.mark.parametrize("rank", [R, 0])
def test_outputs_gradients_and_merge_are_the_papers_at_every_rank(kind: str, rank: int) -> None:
    model, layer = adapted(kind)
    prune(layer, torch.arange(R) < rank)
    x = torch.randn(6, IN, dtype=torch.float64, requires_grad=True)
    q, p, lam = (layer.get_parameter(key).detach().clone().requires_grad_() for key in KEYS)
    weight = layer.weight.T if kind == "Conv1D" else layer.weight
    expected = paper.adapted_linear(x, weight, layer.bias, p, lam[:, 0], q, R + 1e-5, ALPHA)  # as PEFT has it
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * cotangent).sum(), [q, p, lam, x])

    out = model(x)
    found = torch.autograd.grad((out * cotangent).sum(), [*map(layer.get_parameter, KEYS), x])
    for ours, theirs in zip((out, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    assert lightning_ft.merge(model) == ["0"]
    torch.testing.assert_close(model(x), out, atol=1e-12, rtol=1e-12)


class OneDevice(TorchDispatchMode):
    """Refuses what CUDA refuses: an index on another device than what it selects from."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.index_select.default:
            assert args[0].device == args[2].device
        return function(*args, **(kwargs or {}))


def test_pruning_goes_where_the_layer_is() -> None:
    """When a fit ends, Lightning has moved the module off the GPU, and what is to stay was told there."""
    model, layer = adapted("Linear")
    model.to("meta")
    with OneDevice():
        prune(layer, torch.arange(R) < 3)
    assert [tuple(layer.get_parameter(key).shape) for key in KEYS] == [(3, IN), (OUT, 3), (3, 1)]
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}


def test_it_starts_with_small_random_vectors_and_no_singular_values() -> None:
    model = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 300))
    AdaLoRA(20, backbone=".").inject(model)
    first, second = model
    assert [tuple(first.get_parameter(key).shape) for key in KEYS] == [(20, 400), (300, 20), (20, 1)]
    for vectors in (first.lora_A, first.lora_B):
        assert vectors.std().item() == pytest.approx(0.02, rel=0.03)
        assert abs(vectors.mean()) < 1e-3
    assert not first.lora_E.any()
    assert not torch.equal(first.lora_B, second.lora_B)


def test_the_penalty_and_its_gradient_are_those_of_equation_4() -> None:
    p, q = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((OUT, R), (R, IN)))
    expected = paper.r_of([p], [q])
    expected.backward()
    (norm_p, gradient_p), (norm_q, gradient_q) = orthogonality(p.detach().T), orthogonality(q.detach())
    torch.testing.assert_close((norm_p + norm_q) / 2, expected.detach())
    torch.testing.assert_close(gradient_p.T / 2, p.grad)
    torch.testing.assert_close(gradient_q / 2, q.grad)
    for orthonormal in (torch.eye(R, IN), torch.empty(0, IN)):
        norm, gradient = orthogonality(orthonormal)
        assert norm == 0
        assert not gradient.any()


@pytest.mark.parametrize(("tinit", "tfinal", "total"), [(0, 0, 1), (0, 0, 9), (3, 4, 20), (5, 0, 6)])
def test_the_budget_falls_as_in_equation_12(tinit: int, tfinal: int, total: int) -> None:
    schedule = Schedule(tinit, tfinal, 3, total)
    for step in range(1, total + 1):
        assert schedule.budget(step, 100, 30) == int(paper.b_of(step, 100, 30, tinit, tfinal, total)), step
        assert schedule.is_due(step) == (step == total - tfinal or (tinit < step < total - tfinal and step % 3 == 0))


def test_the_triplets_that_stay_are_those_of_equations_6_to_11() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, 3)).double()
    AdaLoRA(R, 2, backbone=".", target_modules=["0", "1"]).inject(model)
    layers = layers_of(model)
    beta1, beta2 = 0.8, 0.7
    averages: dict[str, tuple[list[float], list[float]]] = {}
    allocator = RankAllocator(Schedule(0, 0, 1, 100))
    for layer in layers.values():
        for key in KEYS:
            layer.get_parameter(key).data = torch.randn(layer.get_parameter(key).shape, dtype=torch.float64)
    allocator.prepare(layers)
    for _ in range(5):
        parameters = {f"{path}.{key}": layer.get_parameter(key) for path, layer in layers.items() for key in KEYS}
        for name, parameter in parameters.items():
            parameter.grad = torch.randn_like(parameter)
            before = averages.get(name, ([0.0] * parameter.numel(), [0.0] * parameter.numel()))
            numbers = zip(*before, parameter.flatten().tolist(), parameter.grad.flatten().tolist(), strict=True)
            new = [
                (bar := paper.i_bar(i, now := paper.i_of(w, g), beta1), paper.u_bar(u, now, bar, beta2))
                for i, u, w, g in numbers
            ]
            averages[name] = [bar for bar, _ in new], [u for _, u in new]
        allocator.observe(parameters, beta1, beta2)

    scores, values = [], []
    for path, layer in layers.items():
        a, b, e = (
            torch.tensor([paper.s_of(*pair) for pair in zip(*averages[f"{path}.{key}"], strict=True)]).view(
                layer.get_parameter(key).shape
            )
            for key in KEYS
        )
        scores += [paper.importance_of_triplet(e[i].item(), b[:, i].tolist(), a[i].tolist()) for i in range(R)]
        values += layer.lora_E.flatten().tolist()
    for budget in (8, 5, 1):
        allocator.allocate(layers, budget)
        allocator.mask(layers)
        found = torch.cat([layer.lora_E.flatten() for layer in layers.values()]).tolist()
        assert found == paper.t_of(values, scores, budget)


# ------------------------------------------------------------------------------------ agreement with PEFT


class Labelled(BertInInit):
    """Its loss is the model's own, as with stock PEFT, which adds its penalty there."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[1]).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


class Language(Labelled):
    """The same on Conv1D layers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny.gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss


class Watch(Callback):
    """What the allocator says after each optimizer step."""

    def __init__(self, method: AdaLoRA) -> None:
        self.method = method
        self.masks: dict[int, dict[str, list[bool]]] = {}
        self.last: dict[str, Tensor] = {}

    def on_train_batch_end(self, run: Any, module: Any, *_: Any) -> None:
        allocator = self.method._allocator
        assert allocator is not None
        self.masks[allocator.step] = {path: mask.tolist() for path, mask in allocator.masks.items()}

    def on_train_end(self, run: Any, module: Any) -> None:
        self.last = {key: value.clone() for key, value in module.state_dict().items()}

    def left(self) -> dict[int, int]:
        return {step: sum(sum(mask) for mask in masks.values()) for step, masks in self.masks.items()}


def repeated(module: Classifier, batches: int) -> DataLoader[Any]:
    """That many batches, in order, of the module's data over and over."""
    rows = [row for _ in range(batches) for row in module.data()]
    return DataLoader(rows[: 8 * batches], batch_size=8)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "targets"), [(Labelled, ["query", "value", "dense"]), (Language, ["c_attn", "mlp.c_proj"])]
)
def test_ten_steps_are_those_of_stock_peft(kind: type[Labelled], targets: list[str]) -> None:
    module, stock = make(kind), make(kind)
    schedule = {"tinit": 2, "tfinal": 3, "deltaT": 2, "beta1": 0.8, "beta2": 0.9, "orth_reg_weight": 0.3}
    sizes: dict[str, Any] = {"init_r": 4, "target_r": 2}
    exclude = ["pooler.dense"] if kind is Labelled else None
    method = AdaLoRA(**sizes, alpha=8, target_modules=targets, exclude_modules=exclude, **schedule)
    method.inject(module)
    config = peft.AdaLoraConfig(
        **sizes, lora_alpha=8, target_modules=targets, exclude_modules=exclude, total_step=10, **schedule,
        task_type="SEQ_CLS" if kind is Labelled else "CAUSAL_LM", fan_in_fan_out=kind is Language,
    )  # fmt: skip
    theirs = peft.get_peft_model(stock.model, config)
    inner = theirs.base_model.model
    inner.load_state_dict(
        {
            f"{path}.{key}.default": value.detach().clone()
            for path, layer in layers_of(module.model).items()
            for key in KEYS
            for value in [layer.get_parameter(key)]
        },
        strict=False,
    )
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=5e-3)
    patterns = {}
    for step, (tokens, labels) in enumerate(repeated(module, 10), start=1):
        theirs(input_ids=tokens, labels=labels if kind is Labelled else tokens).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        found = theirs.peft_config["default"].rank_pattern or {}
        patterns[step] = {f"model.{name.removesuffix('.lora_E.default')}": kept for name, kept in found.items()}

    watch = Watch(method)
    trainer(method, watch, max_steps=10, max_epochs=-1, limit_val_batches=0).fit(module, repeated(module, 10))
    assert watch.masks == patterns
    assert set(ranks(module)) != {2}, "the ranks differ"
    assert sum(ranks(module)) == 2 * len(ranks(module))
    for path, layer in layers_of(module.model).items():
        kept = torch.tensor(patterns[10][f"model.{path}"])
        for key in KEYS:
            value = inner.get_submodule(path).get_parameter(f"{key}.default")
            torch.testing.assert_close(watch.last[f"model.{path}.{key}"], value, atol=1e-5, rtol=1e-5)
            rest = value[:, kept] if key == "lora_B" else value[kept]
            torch.testing.assert_close(layer.get_parameter(key), rest, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tiny.logits(module.model), tiny.logits(theirs), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------- in the Trainer


def small(**settings: Any) -> AdaLoRA:
    return AdaLoRA(**{"init_r": 4, "target_r": 2, "target_modules": "all-linear", **settings})


@pytest.mark.parametrize("kind", [CNN, GPT2, ManualTwoOptimizers])
def test_one_line_turns_any_module_into_an_adalora_fine_tune(kind: type[Classifier], tmp_path: Path) -> None:
    module, method = make(kind), small(**MODULES[kind])
    run = trainer(method, max_epochs=3)
    run.fit(module)
    layers = layers_of(module)
    assert sum(ranks(module)) == 2 * len(layers)
    assert all(layer.lora_E.all() and layer.lora_E.isfinite().all() for layer in layers.values())
    run.save_checkpoint(tmp_path / "x.ckpt")
    expected = outputs(module)
    run.test(module, verbose=False)
    fresh = make(kind)
    predicted = trainer(small(**MODULES[kind])).predict(fresh, ckpt_path=tmp_path / "x.ckpt")
    torch.testing.assert_close(torch.cat(predicted)[:5], expected)
    before = {path: layer.lora_A.clone() for path, layer in layers.items()}
    trainer(small(**MODULES[kind]), max_epochs=1).fit(module)  # goes on with the ranks that there are
    assert all(not torch.equal(layers[path].lora_A, old) or not len(old) for path, old in before.items())


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_target_is_reached_at_the_scheduled_optimizer_step(accumulate: int) -> None:
    module, method = make(BertInInit), small(tinit=2, tfinal=4, deltaT=2)
    watch = Watch(method)
    run = trainer(method, watch, max_epochs=2, accumulate_grad_batches=accumulate)
    run.fit(module, repeated(module, 8 * accumulate))
    assert run.global_step == 16
    first, last = 4 * len(ranks(module)), 2 * len(ranks(module))
    assert list(watch.left()) == list(range(accumulate == 1, 17)), "an optimizer step is one step"
    for step, left in watch.left().items():
        allocated = min(step // 2 * 2, 12)
        assert left == (int(paper.b_of(allocated, first, last, 2, 4, 16)) if allocated > 2 else 0), step
    assert sum(ranks(module)) == last


@pytest.mark.parametrize(
    ("epoch", "accumulate"), [(0, 1), (1, 1), (1, 4), (2, 1)], ids=["before", "while", "while accumulating", "after"]
)
def test_interrupted_and_resumed_is_uninterrupted_to_the_bit(epoch: int, accumulate: int, tmp_path: Path) -> None:
    def fit(**more: Any) -> BertInInit:
        module, method = make(BertInInit), small(tinit=3, tfinal=4, deltaT=1)
        each = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        run = trainer(method, each, max_epochs=4, enable_checkpointing=True, accumulate_grad_batches=accumulate)
        run.fit(module, repeated(module, 3 * accumulate), **more)
        return module

    whole = fit()
    torch.manual_seed(99)
    resumed = fit(ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert ranks(resumed) == ranks(whole)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())
    files = (f"epoch={epoch + 1}.ckpt", f"epoch={epoch + 1}-v1.ckpt")
    mine, theirs = (torch.load(tmp_path / file)["callbacks"]["AdaLoRA{'backbone': None}"] for file in files)
    assert mine["step"] == 3 * (epoch + 2)
    assert (len(mine["sensitivity"]) > 0) == (mine["step"] < 8)
    for key in ("schedule", "step", "kept"):
        assert mine[key] == theirs[key]
    for key in ("sensitivity", "uncertainty", "masks"):
        assert set(mine[key]) == set(theirs[key])
        assert all(torch.equal(value, theirs[key][name]) for name, value in mine[key].items())


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adafactor])
def test_what_is_saved_after_the_end_is_small_and_goes_on(optimizer: Any, tmp_path: Path) -> None:
    class Module(BertInInit):
        def configure_optimizers(self) -> Any:
            return optimizer(self.parameters(), lr=1e-2)

    small = partial(AdaLoRA, 4, 3, target_modules=["query", "value"])  # Adafactor can't step on empty parameters
    module, run = make(Module), trainer(small(), max_epochs=2)
    run.fit(module)
    run.save_checkpoint(tmp_path / "x.ckpt")
    resumed = make(Module)
    trainer(small(), max_epochs=4).fit(resumed, ckpt_path=tmp_path / "x.ckpt")
    assert ranks(resumed) == ranks(module)
    assert not torch.equal(outputs(resumed), outputs(module))


def test_a_checkpoint_of_any_time_gives_the_model_of_that_time_back(tmp_path: Path) -> None:
    class Losses(Callback):
        def on_validation_end(self, run: Any, module: Any) -> None:
            if not run.sanity_checking:
                seen.append(outputs(module))

    seen: list[Tensor] = []
    module = make(BertInInit)
    each = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    run = trainer(small(tfinal=3), Losses(), each, max_epochs=4, enable_checkpointing=True)
    run.fit(module)
    pruned = ranks(module)
    for epoch, expected in enumerate(seen):
        run.test(module, ckpt_path=str(tmp_path / f"epoch={epoch}.ckpt"), verbose=False)
        assert set(ranks(module)) == {4}
        torch.testing.assert_close(outputs(module), expected)
        lightning_ft.save_adapter(module, tmp_path / str(epoch))
    saved = load_file(tmp_path / "3" / "adapter_model.safetensors")
    assert sum(len(value) for key, value in saved.items() if key.endswith("lora_E")) == sum(pruned)


def test_the_best_checkpoint_is_one_whose_ranks_are_final(tmp_path: Path) -> None:
    class Worse(Callback):
        def on_validation_epoch_end(self, run: Any, module: Any) -> None:
            module.log("score", -float(run.current_epoch))

    module, method = make(BertInInit), small(tinit=3, tfinal=4)
    best = BestCheckpoint(dirpath=tmp_path, monitor="score", mode="max", save_last=True)
    run = trainer(method, Worse(), best, max_epochs=4, enable_checkpointing=True)
    run.fit(module, repeated(module, 3))
    checkpoint = torch.load(best.best_model_path)
    assert checkpoint["epoch"] == 2, "the first after step 8"
    run.test(module, ckpt_path=best.best_model_path, verbose=False)
    expected = outputs(module)
    method.finish(module)
    torch.testing.assert_close(outputs(module), expected)
    assert sum(ranks(module)) == method.target_r * len(ranks(module))
    assert (tmp_path / "last.ckpt").is_file()


def test_a_fit_that_has_nothing_left_to_do_changes_nothing(tmp_path: Path) -> None:
    def fit(module: BertInInit, **more: Any) -> dict[str, Tensor]:
        each = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer(small(), each, max_epochs=2, enable_checkpointing=True).fit(module, **more)
        return module.state_dict()

    fit(make(BertInInit))
    again = fit(make(BertInInit), ckpt_path=tmp_path / "epoch=1.ckpt")
    saved = torch.load(tmp_path / "epoch=1.ckpt")["state_dict"]
    assert all(torch.equal(again[key], value) for key, value in saved.items())


def test_training_that_ends_early_ends_at_the_target_and_says_so() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, run: Any, *_: Any) -> None:
            run.should_stop = run.global_step == 5

    module = make(BertInInit)
    with pytest.warns(UserWarning, match=r"ended after 5 optimizer steps.* final after 17 of 24.*mean of 2 now"):
        trainer(small(), Stop(), max_epochs=8).fit(module)
    assert sum(ranks(module)) == 2 * len(ranks(module))
    assert all(layer.lora_E.all() for layer in layers_of(module).values())


def test_weight_averaging_is_pruned_too() -> None:
    module = make(BertInInit)
    trainer(small(), EMAWeightAveraging(decay=0.5), max_epochs=3).fit(module)
    assert sum(ranks(module)) == 2 * len(ranks(module))
    assert outputs(module).isfinite().all()


def test_a_fit_that_took_nothing_out_resumes_from_after_its_end(tmp_path: Path) -> None:
    module, run = make(BertInInit), trainer(small(target_r=4), max_epochs=1)
    run.fit(module)
    run.save_checkpoint(tmp_path / "x.ckpt")
    resumed = make(BertInInit)
    trainer(small(target_r=4), max_epochs=2).fit(resumed, ckpt_path=tmp_path / "x.ckpt")
    assert set(ranks(resumed)) == {4}
    assert not torch.equal(outputs(resumed), outputs(module))


@pytest.mark.gpu
def test_a_fit_on_a_gpu_is_pruned_and_goes_on(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    module, run = make(BertInInit), trainer(small(), max_epochs=2, accelerator="gpu")
    run.fit(module)
    assert sum(ranks(module)) == 2 * len(ranks(module))
    run.save_checkpoint(tmp_path / "x.ckpt")
    resumed = make(BertInInit)
    trainer(small(), max_epochs=3, accelerator="gpu").fit(resumed, ckpt_path=tmp_path / "x.ckpt")
    assert ranks(resumed) == ranks(module)


def test_a_callback_can_be_used_for_another_module() -> None:
    method = small()
    for _ in range(2):
        module = make(BertInInit)
        trainer(method, max_epochs=2).fit(module)
        assert sum(ranks(module)) == 2 * len(ranks(module))


# ------------------------------------------------------------------------------- the penalty, in every loop


class Quadratic(ManualTwoOptimizers):
    """A loss that asks nothing of the adapter, so that the penalty alone moves it; steps by plain SGD."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        return 0 * self.outputs(batch[0]).sum()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:  # type: ignore[override]
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Automatic(Quadratic):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:  # type: ignore[override]
        return self.loss(batch)


class Fused(Automatic):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)


class Manual(Quadratic):
    lightnings = True

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:  # type: ignore[override]
        optimizer: Any = self.optimizers(use_pl_optimizer=self.lightnings)
        self.manual_backward(self.loss(batch))
        optimizer.step()
        optimizer.zero_grad()


class ManualRaw(Manual):
    lightnings = False


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (Automatic, {}),
        (Automatic, {"accumulate_grad_batches": 3}),
        (Automatic, {"precision": "bf16-mixed"}),
        (Automatic, {"plugins": lambda: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 1024.0))}),
        (Fused, {"plugins": lambda: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 1024.0))}),
        (Manual, {}),
        (ManualRaw, {}),
    ],
    ids=["automatic", "accumulated", "bf16", "scaled", "scaled and fused", "manual", "manual by torch's optimizer"],
)
def test_the_penalty_acts_once_a_step_whatever_the_loop(kind: type[Quadratic], more: dict[str, Any]) -> None:
    module = make(kind)
    method = AdaLoRA(3, 2, backbone="encoder", target_modules=["0", "2"], tinit=2, total_step=9, orth_reg_weight=0.7)
    method.inject(module)
    layers = layers_of(module)
    p, q = ([layer.get_parameter(key).detach().clone() for layer in layers.values()] for key in ("lora_B", "lora_A"))
    for _ in range(2):
        for matrix in (*p, *q):
            matrix.requires_grad_().grad = None
        (0.7 * paper.r_of(p, q)).backward()
        with torch.no_grad():
            for matrix in (*p, *q):
                matrix -= 0.1 * matrix.grad
    steps = 2 * more.get("accumulate_grad_batches", 1)
    more = {key: value() if callable(value) else value for key, value in more.items()}

    class Stop(Callback):
        def on_train_end(self, *_: Any) -> None:
            for matrix, found in zip(q, layers.values(), strict=True):
                torch.testing.assert_close(found.lora_A, matrix, atol=1e-6, rtol=1e-4)
            for matrix, found in zip(p, layers.values(), strict=True):
                torch.testing.assert_close(found.lora_B, matrix, atol=1e-6, rtol=1e-4)

    with pytest.warns(UserWarning, match="ended after 2 optimizer steps"):
        trainer(method, Stop(), max_epochs=1, limit_train_batches=steps, **more).fit(module, repeated(module, steps))


# ------------------------------------------------------------------------------------------- what it reports


def test_ranks_are_logged_tabled_and_drawn(tmp_path: Path) -> None:
    module, logger = make(BertInInit), CSVLogger(tmp_path)
    trainer(small(), max_epochs=3, logger=logger, log_every_n_steps=1).fit(module)
    folder = Path(logger.log_dir)
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["adalora/budget"]]
    budgets = [float(row["adalora/budget"]) for row in rows]
    assert len(budgets) == 9
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[-1] == sum(ranks(module))
    assert float(rows[-1]["adalora/mean_rank"]) == 2
    assert float(rows[-1]["adalora/orthogonality"]) < float(rows[0]["adalora/orthogonality"])
    with (folder / "adalora_ranks.csv").open() as file:
        assert [int(row["rank"]) for row in csv.DictReader(file)] == ranks(module)
    assert imread(folder / "adalora_ranks.png").ndim == 3


# --------------------------------------------------------------------------------------------------- files

CASES: dict[str, tuple[Callable[[], Any], str, list[str]]] = {
    "bert classifier": (tiny.bert_classifier, "SEQ_CLS", ["query", "output.dense"]),
    "gpt2": (tiny.gpt2, "CAUSAL_LM", ["c_attn", "mlp.c_proj"]),
    "t5": (tiny.t5, "SEQ_2_SEQ_LM", ["q", "wo"]),
}
each_case = pytest.mark.parametrize(
    ("case", "pruned"), [("bert classifier", False), ("bert classifier", True), ("gpt2", True), ("t5", True)]
)
peft_files = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # PEFT's own words to its own files: at rank 0, and on every rank_pattern of AdaLoRA.
    "ignore:Initializing zero-element tensors is a no-op:UserWarning",
    "ignore:.*LoRA tensor\\(s\\) have invalid shape",
    "ignore:The following rank_pattern keys did not match:RuntimeWarning",
)


def predictions(model: Any) -> Tensor:
    decoded = {"decoder_input_ids": tiny.TOKENS} if model.config.is_encoder_decoder else {}
    model.eval()
    with torch.no_grad():
        return model(input_ids=tiny.TOKENS, **decoded)[0]


@torch.no_grad()
def shaken(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def masked(values: list[Tensor]) -> None:
    """One rank 0, the others different."""
    for i, value in enumerate(values):
        value[i % 4 :] = 0


@peft_files
@each_case
def test_stock_peft_loads_ours(case: str, pruned: bool, tmp_path: Path) -> None:
    build, _, targets = CASES[case]
    model = build()
    AdaLoRA(3, 2, 6, target_modules=targets).inject(model)
    shaken(model)
    masked([layer.lora_E for layer in layers_of(model).values()])
    if pruned:
        for layer in layers_of(model).values():
            prune(layer, layer.lora_E[:, 0] != 0)
        assert 0 in ranks(model)
    lightning_ft.save_adapter(model, tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path / "a")
    torch.testing.assert_close(predictions(loaded), predictions(model), atol=1e-5, rtol=1e-5)

    fresh = build()
    lightning_ft.load_adapter(fresh, tmp_path / "a")
    torch.testing.assert_close(predictions(fresh), predictions(model))
    lightning_ft.save_adapter(fresh, tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if pruned or name.endswith("safetensors"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@peft_files
@each_case
def test_ours_loads_stock_pefts_and_writes_the_same(case: str, pruned: bool, tmp_path: Path) -> None:
    build, task, targets = CASES[case]
    config = peft.AdaLoraConfig(
        task_type=task, init_r=3, target_r=2, lora_alpha=6, tinit=1, tfinal=2, deltaT=3, total_step=9,
        target_modules=targets, fan_in_fan_out=case == "gpt2",
    )  # fmt: skip
    model = shaken(peft.get_peft_model(build(), config))
    if pruned:
        singular = {n: p for n, p in model.base_model.model.named_parameters() if n.endswith("lora_E.default")}
        masked(list(singular.values()))
        model.peft_config["default"].rank_pattern = {n: (p[:, 0] != 0).tolist() for n, p in singular.items()}
    expected = predictions(model)
    model.save_pretrained(tmp_path / "theirs")
    loaded = build()
    lightning_ft.load_adapter(loaded, tmp_path / "theirs")
    torch.testing.assert_close(predictions(loaded), expected, atol=1e-5, rtol=1e-5)
    lightning_ft.save_adapter(loaded, tmp_path / "ours")
    mine, stock = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("ours", "theirs"))
    assert set(mine) == set(stock)
    assert all(torch.equal(value, mine[key]) for key, value in stock.items())
    configs = [json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in ("ours", "theirs")]
    for key in ("init_r", "target_r", "lora_alpha", "tinit", "tfinal", "deltaT", "total_step", "beta1", "peft_type"):
        assert configs[0][key] == configs[1][key], key
    if pruned:
        assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"]


def test_a_loaded_adapter_trains_on_at_its_ranks(tmp_path: Path) -> None:
    module = make(BertInInit)
    trainer(small(), max_epochs=2).fit(module)
    lightning_ft.save_adapter(module, tmp_path)
    fresh = make(BertInInit)
    lightning_ft.load_adapter(fresh, tmp_path)
    trainer(small(), max_epochs=1).fit(fresh)
    assert ranks(fresh) == ranks(module)
    assert not torch.equal(outputs(fresh), outputs(module))


# ------------------------------------------------------------------------------------------- what is refused


def test_a_bad_argument_is_an_error_with_its_value() -> None:
    for argument, value in [
        ("init_r", 0),
        ("target_r", 1.5),
        ("deltaT", "8"),
        ("total_step", 0),
        ("tinit", -1),
        ("tfinal", 0.1),
        ("beta1", 1),
        ("beta2", math.nan),
        ("alpha", "16"),
        ("dropout", 1),
        ("orth_reg_weight", math.inf),
    ]:
        with pytest.raises(ValueError, match=rf"AdaLoRA: {argument} must be .*, not {value!r}\."):
            AdaLoRA(**{argument: value})


def test_a_target_above_the_start_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"target_r=8 is above init_r=4"):
        AdaLoRA(init_r=4)


def test_a_schedule_that_leaves_no_step_is_an_error_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"tinit=4 and tfinal=2 leave none of the 6 optimizer steps"):
        trainer(small(tinit=4, tfinal=2), max_epochs=2).fit(make(BertInInit))


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield from vector_data(8)


@pytest.mark.filterwarnings("ignore:.*`max_epochs` was not set.*")
def test_training_of_unknown_length_needs_its_number_of_steps() -> None:
    def fit(method: AdaLoRA, **more: Any) -> Automatic:
        module = make(Automatic)
        trainer(method, max_epochs=-1, **more).fit(module, DataLoader(Endless(), batch_size=8))
        return module

    method = {"backbone": "encoder", "target_modules": ["0", "2"]}
    with pytest.raises(ValueError, match=r"can't tell how many optimizer steps.*max_steps.*total_step"):
        fit(small(**method))
    assert sum(ranks(fit(small(**method), max_steps=6))) == 4


def test_sharded_parameters_are_refused() -> None:
    run = trainer(small())
    type(run.strategy).restore_checkpoint_after_setup = True  # type: ignore[assignment]
    try:
        with pytest.raises(InjectionError, match="strategy='ddp'"):
            run.fit(make(BertInInit))
    finally:
        del type(run.strategy).restore_checkpoint_after_setup


def test_an_adapter_of_rank_0_is_not_trained_silently(tmp_path: Path) -> None:
    model = make(BertInInit)
    small().inject(model)
    lightning_ft.save_adapter(model, tmp_path)
    fresh = make(BertInInit)
    lightning_ft.load_adapter(fresh, tmp_path)
    with pytest.raises(InjectionError, match="rank 0 everywhere"):
        trainer(small()).fit(fresh)
