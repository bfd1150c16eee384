"""Refits: the regression against least squares written out, and what a refitted run must be."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import exit_code, is_one_line, records
from conftest import SOLVABLE, save_tiny, tiny_ids, tiny_model, tiny_text

from come_pl.cli.prune import prune_main
from come_pl.decoder import Decoder
from come_pl.pruning import final_norm, last_layers, regression
from come_pl.pruning.module import PruningModule
from come_pl.pruning.refit import Refit, check_family
from come_pl.pruning.regression import GRID, NormalEquations, folds_of, token_weights
from come_pl.record import Record, Step, replay
from come_pl.surgery import Kept
from come_pl.taps import boundaries, layer_run, projection_input, projection_inputs


def problem(bias: bool, noise: float = 0.1, tokens: int = 400) -> tuple[Any, ...]:
    torch.manual_seed(0)
    x, truth = torch.randn(tokens, 6), torch.randn(3, 6)
    r = x @ truth.T + noise * torch.randn(tokens, 3) + (0.7 if bias else 0.0)
    weight = torch.rand(tokens)
    weight[::7] = 0
    r[::7] = float("nan")  # padding may hold anything
    return x, r, weight, truth


def equations(x: Any, r: Any, weight: Any, bias: bool, folds: int = 4) -> NormalEquations:
    found = NormalEquations(6, 3, folds, bias)
    for fold, part in enumerate(torch.arange(len(x)).chunk(folds)):
        found.add(x[part], r[part], weight[part], fold)
    return found


def test_what_regressions_have_in_common_is_summed_once() -> None:
    x, r, weight, _ = problem(False)
    whole, features, outputs = equations(x, r, weight, False), NormalEquations(6, 0, 4, False), []
    for fold, part in enumerate(torch.arange(len(x)).chunk(4)):
        features.add(x[part], r[part, :0], weight[part], fold)
    for columns in (slice(0, 1), slice(1, 3)):
        own = NormalEquations(6, r[:, columns].shape[1], 4, False, a=features.a)
        for fold, part in enumerate(torch.arange(len(x)).chunk(4)):
            own.add(x[part], r[part, columns], weight[part], fold)
        own.summed(lambda value: value.mul_(2))
        assert own.a is features.a and torch.equal(own.a, whole.a), "summed over processes already"
        own.b /= 2
        outputs.append(own.at(0.3))
    expected = whole.at(0.3)
    assert expected is not None
    torch.testing.assert_close(torch.cat([o for o in outputs if o is not None]), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block", [1, 4, 6, 100])
def test_half_of_a_sum_of_outer_products_is_all_of_it(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "BLOCK", block)
    x, r, weight, _ = problem(True)
    found = equations(x, r, weight, True)
    rows = torch.cat([x, torch.ones(len(x), 1)], 1).double() * weight[:, None].double().sqrt()
    for fold, part in enumerate(torch.arange(len(x)).chunk(4)):
        torch.testing.assert_close(found.a[fold], rows[part].T @ rows[part], rtol=1e-5, atol=1e-5)
        assert torch.equal(found.a[fold], found.a[fold].T)
    before = found.a.clone()
    found.add(x[:5], r[:5], weight[:5], 0)  # after it was asked for
    assert torch.equal(found.a[1:], before[1:])
    torch.testing.assert_close(found.a[0], before[0] + rows[:5].T @ rows[:5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_the_fit_is_ridge_regression_written_out(bias: bool) -> None:
    x, r, weight, _ = problem(bias)
    fit = equations(x, r, weight, bias).solve()
    assert fit is not None and fit.strength in GRID
    seen = weight > 0
    x, r, root = x[seen].double(), r[seen].double(), weight[seen].double().sqrt()[:, None]
    ridge = fit.strength * (weight[seen].double()[:, None] * x.square()).sum(0).mean()
    rows = [torch.cat([x * root, ridge.sqrt() * torch.eye(6, dtype=torch.float64)])]
    if bias:
        rows.append(torch.cat([root, torch.zeros(6, 1, dtype=torch.float64)]))
    target = torch.cat([r * root, torch.zeros(6, 3, dtype=torch.float64)])
    expected = torch.linalg.lstsq(torch.cat(rows, 1), target).solution.T
    torch.testing.assert_close(fit.change.double(), expected[:, :6], rtol=1e-4, atol=1e-5)
    if bias:
        assert fit.bias is not None
        torch.testing.assert_close(fit.bias.double(), expected[:, 6], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("noise", [0.7, 1.0, 1.5, 2.5])
def test_the_strength_is_the_best_of_the_grid_on_unseen_folds(noise: float) -> None:
    """Strengths are compared on two folds; the error is that of all four."""
    x, r, weight, _ = problem(False, noise=noise, tokens=40)

    def unseen(strength: float) -> list[float]:
        found = []
        for fold in torch.arange(len(x)).chunk(4):
            rest = torch.tensor([i for i in range(len(x)) if i not in fold and weight[i] > 0])
            mine = torch.tensor([i for i in fold if weight[i] > 0])
            xs, rs, ws = x[rest].double(), r[rest].double(), weight[rest].double()[:, None]
            a = (ws * xs).T @ xs
            change = torch.linalg.solve(a + strength * a.diagonal().mean() * torch.eye(6), (ws * xs).T @ rs).T
            left = r[mine].double() - x[mine].double() @ change.T
            found.append(float((weight[mine, None] * left.square()).sum()))
        return found

    fit, errors = equations(x, r, weight, False).solve(), [unseen(strength) for strength in GRID]
    here = min(range(len(GRID)), key=lambda index: sum(errors[index][:2]))
    nothing = float((weight[:, None] * r.double().square())[weight > 0].sum())
    assert 0 < here < len(GRID) - 1 and sum(errors[here]) < nothing, "a best strength is inside of the grid"
    assert fit is not None and fit.strength == GRID[here]
    assert fit.error == pytest.approx(sum(errors[here]) / nothing, rel=1e-4)


def test_noise_alone_is_not_fitted_and_nothing_is_lost() -> None:
    torch.manual_seed(3)
    found = NormalEquations(30, 4, 4, False)
    for fold in range(4):
        found.add(torch.randn(12, 30), torch.randn(12, 4), torch.ones(12), fold)
    assert found.solve(grid=(1e-3, 1e-2, 1e-1)) is None
    broken = NormalEquations(30, 4, 4, False)
    for fold in range(4):
        broken.add(torch.full((12, 30), float("inf")), torch.randn(12, 4), torch.ones(12), fold)
    assert broken.solve() is None
    with pytest.raises(ValueError, match="folds 1"):
        NormalEquations(2, 2, 1, False)


def ready(family: str, step: Step, cache: Any = "ram", **options: Any) -> tuple[PruningModule, Record, Refit]:
    """A module after one pass over four windows and one step, not refitted yet; the final norm is left alone."""
    model, module = tiny_model(family, layers=5), PruningModule(cache=cache, monitor=1)
    record, refit = Record(5), Refit(**({"parts": "down", "final": False} | options))
    module.attach(model, record, needs=refit.needs)
    ids = tiny_ids(windows=8, seq=12)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[3, :5] = False
    for batch in range(2):
        part = slice(4 * batch, 4 * batch + 4)
        module.training_step({"input_ids": ids[part], "mask": mask[part]}, batch)
    module.do(step)
    record.append(step)
    return module, record, refit


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["x", "r"])
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("guess", [None, 0.01])
def test_what_is_not_finite_is_not_fitted_to(value: float, part: str, everywhere: bool, guess: float | None) -> None:
    """In one fold, or in all of them."""
    x, r, weight, _ = problem(False)
    assert equations(x, r, weight, False).solve(guess) is not None
    spoiled = x if part == "x" else r
    spoiled[weight.nonzero()[:, 0][:: 1 if everywhere else len(x)], 0] = value
    assert equations(x, r, weight, False).solve(guess) is None


def test_what_is_not_fitted_to_is_there_wherever_windows_fall() -> None:
    module, _, _ = ready("llama", Step("drop", [2]))
    counts = module.windows_by_fold(4)
    assert sum(counts) == 8 and all(counts) and module.unseen_fold(4) == 0
    for batch in module.batches:
        batch["folds of 4"] = [max(2, fold) for fold in folds_of(batch, 4)]
    assert module.unseen_fold(4) == 2 and module.windows_by_fold(4)[:2] == [0, 0]
    seen, unseen = last_layers._windows(module, 4, 10**6, 3)
    assert len(unseen) == module.windows_by_fold(4)[2] and len(seen) == module.windows_by_fold(4)[3]
    fitted, left_out = final_norm._positions(module, 4, 10**6)
    assert len(fitted) and len(left_out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.check_folds(4)
        for batch in module.batches:
            batch["folds of 4"] = [3] * 4
        with pytest.raises(UserWarning, match=r"windows \(8\) are all of one kind, .* give more --data.tokens"):
            module.check_folds(4)


def with_one_window(unseen: bool) -> PruningModule:
    """Such a module, left with a single window, of the fold that fits at the head do not see or of another."""
    module, _, _ = ready("llama", Step("drop", [2]))
    part = module.batches[0]
    [row, *_] = [row for row, ids in enumerate(part["input_ids"]) if (int(ids.sum()) % 4 == 0) == unseen]
    module.batches = [{name: part[name][row : row + 1] for name in ("input_ids", "mask")} | {"attention": None}]
    module._states, module._valid, module.cache = [None], [0], "none"
    return module


def merge(first: int = 1, heads: int = 2) -> Step:
    kept = [Kept((0,), tuple(range(0, 20))), Kept(tuple(range(1, heads)), tuple(range(20, 48)))]
    return Step("merge", [first, first + 1], [0.4, 0.6], kept, "mean")


@pytest.mark.parametrize("family", SOLVABLE)
@pytest.mark.parametrize("kind", ["merge", "drop"])
def test_a_refit_is_least_squares_towards_the_teacher(family: str, kind: str) -> None:
    step = merge(heads=4 if family == "opt" else 2) if kind == "merge" else Step("drop", [2])
    module, record, refit = ready(family, step)
    student, teacher = module.student, module.teacher
    path = student.family.mlp_output
    projection = student.part(student.layers[1], path)
    before = {k: v.clone() for k, v in module.teacher_model.state_dict().items()}
    old, rows = projection.weight.detach().clone().double(), []
    for batch in module.batches:
        args = (batch["input_ids"], batch["attention"])
        seen: list[torch.Tensor] = []
        with torch.no_grad(), boundaries(teacher) as dense:
            teacher.run(*args)
        with (
            torch.no_grad(),
            boundaries(student) as own,
            projection_inputs(student, 1, lambda k, n, x, seen=seen: seen.append(x) if (k, n) == ("mlp", 1) else None),
        ):
            student.run(*args)
        mask = batch["mask"]
        target, out = dense[3][mask].double(), own[2][mask].double()
        rows.append((seen[0].reshape(*mask.shape, -1)[mask].double(), target - out, 1 / target.square().mean(-1)))
    x, r, w = (torch.cat(p) for p in zip(*rows, strict=True))
    refit.after(module, step, record, last=False)
    error = step.scores["refit_error"]
    assert (
        step.weights is not None
        and error[1] is not None
        and error[1] < 1
        and [e for i, e in enumerate(error) if i != 1] == [None] * 3
    )
    strength = refit._guess[path]
    if projection.bias is not None:
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
    a, b = (w[:, None] * x).T @ x, (w[:, None] * x).T @ r
    ridge = torch.full((x.shape[1],), strength * float(a.diagonal()[: old.shape[1]].mean()), dtype=torch.float64)
    ridge[old.shape[1] :] = 1e-6 * a.diagonal()[old.shape[1] :]
    change = torch.linalg.solve(a + ridge.diag(), b).T
    new = student.part(student.layers[1], path).weight
    torch.testing.assert_close(new.double(), old + change[:, : old.shape[1]], rtol=1e-3, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in module.teacher_model.state_dict().items())
    assert set(step.weights) <= {f"1.{path}.weight", f"1.{path}.bias"}


def test_a_scaled_stream_is_compared_with_a_scaled_teacher() -> None:
    """A compensated drop scales the stream below it; a later refit down there must not undo that: the same share of
    the error is left to repair as in the same student unscaled."""
    found = []
    for scale in (None, 1.5):
        module, record, refit = ready("llama", Step("drop", [3], scale=scale))
        assert [record.scale_at(b) for b in range(6)] == [scale or 1.0] * 4 + [1.0] * 2
        module.changed_from(0)
        later = Step("drop", [1])
        module.do(later)
        record.append(later)
        equations = refit.equations(module, 0, "mlp.down_proj", 2)
        found.append(equations.c.sum())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("parts", ["down", "both"])
def test_a_sweep_repairs_every_layer_from_the_lowest_changed_one(parts: Any) -> None:
    module, record, refit = ready("llama", merge(), parts=parts, sweep=1)
    step = record.steps[0]
    refit.after(module, step, record, last=True)
    assert step.weights and {int(n.partition(".")[0]) for n in step.weights} <= {1, 2, 3}
    assert {n.rpartition(".")[0].partition(".")[2] for n in step.weights} <= {"mlp.down_proj", "self_attn.o_proj"}
    rebuilt = replay(record, module.teacher_model)
    for (name, one), other in zip(
        module.student_model.state_dict().items(), rebuilt.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_the_cache_changes_nothing() -> None:
    weights = []
    for cache in ("ram", "none"):
        module, record, refit = ready("llama", Step("drop", [2]), cache=cache, sweep=1)
        refit.after(module, record.steps[0], record, last=True)
        weights.append(record.steps[0].weights)
    assert weights[0] and weights[0].keys() == weights[1].keys()
    for name, one in weights[0].items():
        torch.testing.assert_close(one, weights[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", SOLVABLE)
def test_what_a_layer_reads_is_led_back_by_least_squares(family: str) -> None:
    """With `all`, query, key and value read x + Δ x: Δ is the ridge regression, written out, of what the dense layer's
    norm gave more on what the student's norm gives."""
    module, record, refit = ready(family, Step("drop", [1]), parts="all", when="end")
    student, teacher = module.student, module.teacher
    shape = student.family
    module.reach(0)
    refit._layer(module, record, 0, {}, [None] * 4, {})  # a layer above a repaired one
    module.advance(0)
    assert record.sources == [0, 2, 3, 4]
    seen: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    for name, decoder, index in (("student", student, 1), ("teacher", teacher, 2)):
        handle = decoder.part(decoder.layers[index], shape.key).register_forward_pre_hook(
            lambda m, args, name=name: seen[name].append(args[0])
        )
        with torch.no_grad():
            for batch in module.batches:
                decoder.run(batch["input_ids"], batch["attention"])
        handle.remove()
    masks = [batch["mask"] for batch in module.batches]
    x, wanted = (
        torch.cat([s[m].double() for s, m in zip(seen[n], masks, strict=True)]) for n in ("student", "teacher")
    )
    old = {p: student.part(student.layers[1], p).weight.detach().clone() for p in (shape.query, shape.key, shape.value)}
    fit = refit.input_equations(module, 1, 2, shape.query).solve()
    if fit is None:  # a tiny random model may have nothing to learn from
        pytest.skip("no strength does better than no change")
    ridge = fit.strength * x.square().mean(0).mean() * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    change = torch.linalg.solve(x.T @ x + ridge, x.T @ (wanted - x)).T
    torch.testing.assert_close(fit.change.double(), change, rtol=1e-3, atol=1e-5)
    weights: dict[str, torch.Tensor] = {}
    refit._reads(module, 1, 2, (shape.query, shape.key, shape.value), weights)
    assert len(weights) == 3
    for path, weight in old.items():
        new = student.part(student.layers[1], path).weight
        expected = weight.double() @ (torch.eye(x.shape[1], dtype=torch.float64) + change)
        torch.testing.assert_close(new.double(), expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(teacher.part(teacher.layers[2], path).weight, weight), "the dense model was changed"


def test_sources_follow_whole_layers() -> None:
    kept = [Kept((0, 1), tuple(range(48))), Kept((), ())]
    record = Record(6)
    for step in (Step("drop", [0]), merge(2), Step("merge", [0, 1], [0.0, 1.0], kept[::-1], "dominant")):
        record.append(step)
    assert record.sources == [2, None, 5]


@pytest.mark.parametrize("parts", ["down", "both", "all"])
def test_at_the_end_is_a_sweep_over_an_unrepaired_student(parts: Any) -> None:
    module, record, refit = ready("llama", Step("drop", [2]), parts=parts, when="end", folds=2, ahead=0)
    second = Step("drop", [2])
    refit.after(module, record.steps[0], record, last=False)
    assert record.steps[0].weights is None and "refit_error" not in record.steps[0].scores
    module.do(second)
    record.append(second)
    refit.after(module, second, record, last=True)
    paths = {"down": {"mlp.down_proj"}, "both": {"mlp.down_proj", "self_attn.o_proj"}}
    read = {f"self_attn.{p}_proj" for p in "qkv"} | {"mlp.gate_proj", "mlp.up_proj"}
    assert second.weights and {int(n.partition(".")[0]) for n in second.weights} <= {1, 2}
    found = {n.rpartition(".")[0].partition(".")[2] for n in second.weights}
    assert found <= paths.get(parts, paths["both"] | read)
    assert parts != "all" or found & read
    rebuilt = replay(record, module.teacher_model)
    for (name, one), other in zip(
        module.student_model.state_dict().items(), rebuilt.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_the_error_left_is_that_of_all_fits_of_a_layer() -> None:
    """Weighted squares towards the teacher, before the first fit and after the last, on windows that were all seen: the
    told share, of unseen windows, is near it."""
    module, record, refit = ready("llama", Step("drop", [2]), parts="both", when="end")

    def lacking() -> float:
        module.changed_from(0)
        module.reach(1)
        return float(refit.equations(module, 1, "mlp.down_proj", 3).c.sum())

    before = lacking()
    refit.after(module, record.steps[0], record, last=True)
    told = record.steps[0].scores["refit_error"][1]
    assert told is not None and lacking() / before <= told < 1


def test_a_repair_at_the_end_takes_the_student_closer_to_the_dense_model() -> None:
    module, record, refit = ready("llama", Step("drop", [2]), parts="all", when="end")

    def apart() -> float:
        with torch.no_grad():
            return sum(
                float((module.student.run(*a).float() - module.teacher.run(*a).float()).square().sum())
                for a in ((b["input_ids"], b["attention"]) for b in module.batches)
            )

    before = apart()
    refit.after(module, record.steps[0], record, last=True)
    assert apart() < before


def test_passes_over_some_windows_change_no_repair() -> None:
    """A method that looks at few windows leaves the streams of the others behind; a repair at the end runs them."""
    found = []
    for few in (None, 4):
        model, module = tiny_model("llama", layers=5), PruningModule(monitor=1)
        record, refit = Record(5), Refit("all", "end")
        module.attach(model, record, needs=frozenset({"streams"}))
        module.pass_windows = few
        ids = tiny_ids(windows=8, seq=12)
        for step in (Step("drop", [3]), Step("drop", [1])):
            for batch in range(2):
                part = ids[4 * batch : 4 * batch + 4]
                module.training_step({"input_ids": part, "mask": torch.ones_like(part, dtype=torch.bool)}, batch)
            module.do(step)
            record.append(step)
            refit.after(module, step, record, last=record.layers == 3)
        found.append(record.steps[-1].weights)
    assert found[0] and found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_token_weights_do_not_let_massive_activations_own_the_fit() -> None:
    target = torch.ones(1, 3, 4)
    target[0, 0] *= 100
    mask = torch.tensor([[True, True, False]])
    assert torch.allclose(token_weights(target, mask, "inverse"), torch.tensor([[1e-4, 1.0, 0.0]]))
    assert torch.equal(token_weights(target, mask, "uniform"), torch.tensor([[1.0, 1.0, 0.0]]))


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "opt-350m"])
def test_families_that_cannot_be_solved_for_say_so(family: str) -> None:
    with pytest.raises(ValueError, match="a norm stands between"):
        check_family(Decoder(tiny_model(family)).family)


def test_auto_is_down_for_come_where_that_can_be_solved() -> None:
    llama, gemma = Decoder(tiny_model()).family, Decoder(tiny_model("gemma3")).family
    assert Refit().resolved("come", llama).parts == "down"
    assert Refit().resolved("come", gemma).parts == "none"
    assert Refit().resolved("shortgpt", llama).parts == "none"
    assert Refit(sweep=1).resolved("shortgpt", llama).parts == "down"
    assert Refit("best").resolved("shortgpt", llama).parts == "all"
    assert Refit("best").resolved("prune_comp", gemma).parts == "none"
    assert Refit("all").resolved("shortgpt", llama).when == "end" and Refit().resolved("come", llama).when == "step"
    assert Refit("all", "step").resolved("shortgpt", llama).when == "step"
    assert Refit("both").resolved("fusegpt", llama).parts == "both"
    with pytest.raises(ValueError, match="--refit all leads .* and fusegpt has trained them; give --refit both"):
        Refit("all").resolved("fusegpt", llama)
    asked: tuple[Refit, ...] = (Refit("down"), Refit("best", sweep=1), Refit(sweep=1))
    for refit in asked:
        with pytest.raises(ValueError, match="not possible for gemma3"):
            refit.resolved("come", gemma)


def test_layer_run_gives_the_layers_own_output_and_input() -> None:
    decoder, ids = Decoder(tiny_model("qwen2-mixed")), tiny_ids()
    seen: list[torch.Tensor] = []
    with (
        torch.no_grad(),
        boundaries(decoder) as found,
        projection_inputs(decoder, 2, lambda k, n, x: seen.append(x) if (k, n) == ("mlp", 2) else None),
    ):
        decoder.run(ids)
    with torch.no_grad():
        out, x = layer_run(decoder, 2, "mlp.down_proj", ids, None, found[2])
        alone = projection_input(decoder, 2, "mlp.down_proj", ids, None, found[2])
    assert torch.equal(out, found[3]) and torch.equal(x, seen[0]) and torch.equal(alone, x)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in decoder.layers.modules())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"parts": "none", "sweep": 1}, "needs --refit"),
        ({"parts": "down", "sweep": -1}, "sweep -1"),
        ({"parts": "down", "ahead": -1}, "ahead -1"),
        ({"folds": 1}, "folds 1"),
    ],
)
def test_bad_settings(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Refit(**options)


def test_prune_with_refit_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model, text = save_tiny(tmp_path / "m", layers=6), tiny_text(tmp_path / "t.txt")
    common = ["--model.path", model, "--target_layers", 3, "--data.calibration", text, "--data.tokens", 512]
    common += ["--data.seqlen", 32, "--evaluation.data", text, "--evaluation.tokens", 64]
    repair = ["--refit", "both", "--refit_when", "step", "--sweep", "1"]
    monkeypatch.chdir(tmp_path)

    def pruned(*words: object) -> int:
        return exit_code(prune_main, "prune.py", *common, *words, monkeypatch=monkeypatch)

    assert pruned(*repair, "--output", "a") == 0
    steps = records(tmp_path / "a")
    assert all("refit_error" in s["scores"] for s in steps)
    assert any(s.get("weights") for s in steps) and list((tmp_path / "a" / "weights").iterdir())
    assert pruned(*repair, "--output", "b", "--trainer.max_steps", 1) == 0
    assert len(records(tmp_path / "b")) == 1
    assert pruned(*repair, "--output", "b") == 0
    assert records(tmp_path / "b") == steps
    from safetensors.torch import load_file

    one, other = (load_file(tmp_path / f / "model" / "model.safetensors") for f in "ab")
    assert all(torch.equal(v, other[k]) for k, v in one.items())
    capsys.readouterr()
    for words, error in (
        (("--refit", "none", "--sweep", "1", "--output", "c"), "needs --refit"),
        (("--refit_last", -1, "--output", "c"), "last -1"),
        (("--resume",), "no run to go on with"),
    ):
        assert pruned(*words) == 2 and is_one_line(capsys.readouterr().err, error)


def test_layers_below_a_long_gap_begin_what_it_was_there_for() -> None:
    record = Record(12)
    record.steps = [Step("drop", [0])]
    record.steps[0].groups = [[0], [1], [2], [3, 4, 5, 6, 7], [8], [9, 10, 11]]
    expected = {1: [(1 / 3, 4, 8)], 2: [(2 / 3, 4, 8)], 4: [(1 / 2, 10, 12)]}
    assert Refit("down", ahead=2).gaps_ahead(record) == expected
    assert Refit("down", ahead=1).gaps_ahead(record) == {2: [(1 / 2, 4, 8)], 4: [(1 / 2, 10, 12)]}
    assert Refit("down", ahead=0).gaps_ahead(record) == {}
    record.steps[0].groups = [[0, 1, 2, 3, 4], [5], [6, 7], [8, 9, 10, 11]]
    assert Refit("down").gaps_ahead(record) == {2: [(1 / 2, 9, 12)]}, "nothing is below the first layer"


@pytest.mark.parametrize("scale", [None, 1.5])
def test_the_target_of_a_layer_ahead_of_a_gap(scale: float | None) -> None:
    """What it lacks, and the weights of its tokens, written out; in units of what compensated drops scaled it by."""
    module, _, refit = ready("llama", Step("drop", [3], scale=scale), weighting="inverse")
    module.changed_from(0)
    module.reach(4)
    found = refit.equations(module, 1, "mlp.down_proj", 2, gaps=[(0.25, 3, 4)])
    below, above = scale or 1.0, 1.0
    total = 0.0
    for number, batch in enumerate(module.batches):
        dense = [module.teacher_stream(number, b).double() for b in range(6)]
        target = (below * dense[2] + 0.25 * (above * dense[4] - below * dense[3]))[batch["mask"]]
        out = module.stream(number, 2)[batch["mask"]].double()
        total += float(((target - out).square().sum(-1) / target.square().mean(-1)).sum())
    assert float(found.c.sum()) == pytest.approx(total, rel=1e-4)
    plain = refit.equations(module, 1, "mlp.down_proj", 2)
    assert float(plain.c.sum()) != pytest.approx(total, rel=1e-2)


def test_passes_at_the_end_start_below_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("come_pl.pruning.refit.ENOUGH", 1.0)  # random layers give little of what others do
    model, module = tiny_model(layers=8), PruningModule(monitor=1)
    record, refit = Record(8), Refit("down", when="end", ahead=2, final=False)
    module.attach(model, record, needs=refit.needs)
    ids = tiny_ids(windows=8, seq=12)
    module.training_step({"input_ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}, 0)
    for _ in range(4):
        step = Step("drop", [4])
        module.do(step)
        record.append(step)
    assert record.groups == [[0], [1], [2], [3, 4, 5, 6, 7]]
    refit.after(module, step, record, last=True)
    assert {int(name.partition(".")[0]) for name in step.weights or {}} == {1, 2, 3}
    errors = step.scores["refit_error"]
    assert errors[0] is None and all(e is not None and e < 1 for e in errors[1:])


@pytest.mark.parametrize(("sweep", "parts"), [(1, "down"), (2, "all")])
def test_a_layer_that_cannot_begin_a_gap_is_repaired_for_its_own_end(
    monkeypatch: pytest.MonkeyPatch, sweep: int, parts: Any
) -> None:
    """Three quarters left are too much; then it is as if nobody had asked."""

    def repaired(ahead: int, enough: float) -> tuple[PruningModule, Step]:
        monkeypatch.setattr("come_pl.pruning.refit.ENOUGH", enough)
        model, module = tiny_model(layers=8), PruningModule(monitor=1)
        record, refit = Record(8), Refit(parts, when="end", ahead=ahead, sweep=sweep, final=False)
        module.attach(model, record, needs=refit.needs)
        ids = tiny_ids(windows=16, seq=24)
        module.training_step({"input_ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}, 0)
        for _ in range(3):
            step = Step("drop", [2])
            record.append(step)
            module.do(step)
        refit.after(module, step, record, last=True)
        for name, value in replay(record, module.teacher_model).state_dict().items():
            assert torch.equal(value, module.student_model.state_dict()[name]), name
        return module, step

    (refused, step), (never, alone), (taken, _) = repaired(1, 0.0), repaired(0, 0.0), repaired(1, 10.0)
    assert refused.record.groups == [[0], [1, 2, 3, 4], [5], [6], [7]]
    first = {name: value for name, value in refused.student_model.state_dict().items() if ".layers.0." in name}
    dense = refused.teacher_model.state_dict()
    # repaired for its own end on the very stream it was made for, layer 0 has nothing to gain
    assert all(torch.equal(value, dense[name]) for name, value in first.items())
    assert not any(torch.equal(taken.student_model.state_dict()[name], dense[name]) for name in first if "down" in name)
    for name, value in never.student_model.state_dict().items():
        torch.testing.assert_close(refused.student_model.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert step.scores["refit_error"][0] is None and set(step.weights or {}) == set(alone.weights or {})
