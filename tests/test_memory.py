"""Memory: batches that fit, what happens where they do not, and the formula of --plan."""

import importlib
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import infer
import train
from crab_min.backbones.masking import MaskingModel
from crab_min.cli import parse_train
from crab_min.errors import RunError
from crab_min.evaluation.answering import DEFAULT_LIMIT
from crab_min.evaluation.budget import TokenBudget
from crab_min.model import AVLanguageModel, Batch
from crab_min.recipes.presets import PRESETS
from crab_min.runs.folder import checkpoints_of
from crab_min.tools.measure import (
    ANSWER,
    answered_together,
    evaluation_bytes,
    fill,
    lm_dtype,
    lm_stacks,
    lm_width,
    without_values,
)
from crab_min.tools.plan import build_model, example_prompts

FULL = "CUDA out of memory. Tried to allocate 14.5 GB"

# the recipes of README, "Train the papers", and the GPU that each names, in GB
RECIPES = {
    "crab_plus-7b": 80,
    "crab_plus-7b --load-in-4bit --r 32 --alpha 64 --batch-size 1": 24,
    "crab_plus-3b --load-in-4bit": 24,
    "crab-7b --stage visual": 80,
    "crab-7b --stage unified": 80,
    "crab-7b --stage unified --load-in-4bit": 24,
    "crab-7b --stage masks": 80,
    "pave-7b --batch-size 8": 80,
    "pave-7b --load-in-4bit --batch-size 2": 24,
    "pave-0.5b --batch-size 4": 24,
    "crema-xl --modalities rgb,audio,flow": 24,
}


# --- the budget -----------------------------------------------------------------------------------


def upper(items: list[str]) -> list[str]:
    return [item.upper() for item in items]


def test_batches_are_cut_by_their_padded_tokens():
    sizes = []

    def note(items: list[str]) -> list[str]:
        sizes.append(len(items))
        return upper(items)

    # 3 x 30 and 2 x 40 tokens are within 90; what is longer than the budget goes alone
    lengths = [30, 20, 10, 40, 40, 200, 10]
    assert TokenBudget(90).run(note, list("abcdefg"), lengths) == list("ABCDEFG")
    assert sizes == [3, 2, 1, 1]
    sizes.clear()
    TokenBudget(10_000).run(note, list("abcdefg"), lengths, most=3)
    assert sizes == [3, 3, 1]


def test_out_of_memory_halves_the_batches_and_is_said_once(capsys):
    def small(items: list[str]) -> list[str]:
        if len(items) > 2:
            raise torch.OutOfMemoryError(FULL)
        return upper(items)

    budget = TokenBudget(100)
    assert budget.run(small, list("abcdefghij"), 10 * [10]) == list("ABCDEFGHIJ")
    assert budget.run(small, list("abc"), 3 * [10]) == list("ABC")
    assert budget.tokens == 20
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("out of memory") == 1


def test_one_sample_that_does_not_fit_is_an_error():
    def none(items: list[str]) -> list[str]:
        raise torch.OutOfMemoryError(FULL)

    with pytest.raises(RunError, match="one sample of 10 tokens .CUDA out of memory.*--frames"):
        TokenBudget(100).run(none, ["a", "b"], [10, 10])


# --- out of memory in the commands ----------------------------------------------------------------


def fail_above(monkeypatch, owner: type, method: str, rows: int) -> list[int]:
    """Let a method of a model raise an OutOfMemoryError for batches of more rows.

    Returns:
        the rows of the batches that it has done.
    """
    original, done = getattr(owner, method), []

    def limited(self, batch: Batch, *arguments, **options):
        if batch.rows > rows:
            raise torch.OutOfMemoryError(FULL)
        done.append(batch.rows)
        return original(self, batch, *arguments, **options)

    monkeypatch.setattr(owner, method, limited)
    return done


@pytest.mark.parametrize("mode, method", [("generate", "generate"), ("rank", "token_losses")])
def test_an_evaluation_goes_on_with_fewer_rows(
    mode, method, small_world, tmp_path, monkeypatch, capsys
):
    """A run of one step whose evaluations, before and after it, meet a small GPU."""
    done = fail_above(monkeypatch, AVLanguageModel, method, 4)
    command = f"--data {small_world} --tasks avqa,ks --test-rows 6 --steps 1 --batch-size 2"
    command += f" --eval-mode {mode} --out {tmp_path / 'run'}"
    assert train.main(command.split()) == 0
    assert max(done) <= 4
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {task: result["n"] for task, result in metrics["tasks"].items()} == {"avqa": 6, "ks": 6}
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("out of memory") == 1


def test_masks_go_on_with_fewer_rows(small_world, tmp_path, monkeypatch):
    done = fail_above(monkeypatch, MaskingModel, "predict_masks", 2)
    cached = fail_above(monkeypatch, MaskingModel, "cache_answer_states", 3)
    run = tmp_path / "run"
    command = f"crab-tiny --stage masks --data {small_world} --tasks s4 --test-rows 5 --steps 2"
    assert train.main([*command.split(), "--text-steps", "1", "--out", str(run)]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["masks"]["s4"]["n"] == 5
    assert max(done + cached) <= 3


def test_out_of_memory_in_training_keeps_the_last_checkpoint(
    small_world, tmp_path, monkeypatch, capsys
):
    forward, calls = AVLanguageModel.forward, []

    def limited(self, batch: Batch):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError(FULL)
        return forward(self, batch)

    monkeypatch.setattr(AVLanguageModel, "forward", limited)
    run = tmp_path / "run"
    command = f"--data {small_world} --tasks ks --test-rows 1 --steps 5 --save-every 1 --no-baseline"
    command = [*command.split(), "--batch-size", "2", "--out", str(run)]
    assert train.main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory" in error and "--batch-size" in error
    assert [checkpoint.name for checkpoint in checkpoints_of(run)] == ["step_3"]
    assert train.main(command) == 0


def test_out_of_memory_elsewhere_is_one_line(monkeypatch, capsys):
    def ask(given):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr("crab_min.tools.ask.ask", ask)
    assert infer.main(["clip.mp4", "--ask", "What is it?"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "out of memory" in error and "--frames" in error


# --- the formula ----------------------------------------------------------------------------------


def tracked_peak(run, *modules) -> int:
    """Return the most bytes that a call holds, of tensors without values, beside the modules."""
    tracker = MemTracker()
    tracker.track_external(*modules)
    before = tracker.get_tracker_snapshot("current")
    with tracker:
        run()
    peak = tracker.get_tracker_snapshot("peak")
    return sum(p["Total"] for p in peak.values()) - sum(p["Total"] for p in before.values())


@pytest.mark.parametrize("command", RECIPES)
def test_every_recipe_fits_its_gpu_and_the_formula_is_what_a_prefill_takes(command):
    """The tracker sees the LM read the greatest batch of prompts at the real size."""
    given, settings = parse_train(command.split())
    recipe = importlib.import_module(f"crab_min.recipes.{PRESETS[given.preset].recipe}")
    settings = recipe.run_settings(settings)
    model, sides = build_model(recipe, settings)
    prompts = example_prompts(model, recipe, settings, sides)
    longest = max(prompts.values(), key=lambda prompt: prompt.tokens)
    length = longest.tokens - ANSWER
    rows = answered_together(settings, length + DEFAULT_LIMIT)

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fill(model)
        longest.media = [without_values(medium) for medium in longest.media]
        estimate = evaluation_bytes(model, settings, longest)
        dtype = lm_dtype(model)
        x = torch.zeros(rows, length, lm_width(model), dtype=dtype)
        mask = torch.zeros(rows, 1, length, length, dtype=torch.bool)
        (stack, *_) = lm_stacks(model)

        def read() -> None:
            use_cache = len(lm_stacks(model)) == 1
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                stack(inputs_embeds=x, attention_mask=mask, use_cache=use_cache)

        peak = tracked_peak(read, stack)
    print(f"{command}: {rows} x {length} tokens, formula {estimate:,}, tracker {peak:,}")
    assert peak == pytest.approx(estimate, rel=0.2)
