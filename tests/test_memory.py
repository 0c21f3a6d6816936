"""Memory: batches that fit, what happens where they do not, and what --plan says of it."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama.modeling_llama import LlamaMLP

import infer
import train
from crab_min.backbones.composed import ComposedModel, load_base
from crab_min.backbones.masking import MaskingModel
from crab_min.cli import parse_train
from crab_min.config import RunConfig, Settings, TrainingConfig
from crab_min.errors import RunError
from crab_min.evaluation.answering import DEFAULT_LIMIT
from crab_min.evaluation.budget import TokenBudget
from crab_min.features import ENCODED_TOGETHER
from crab_min.interface import PromptPart
from crab_min.model import AVLanguageModel, Batch
from crab_min.recipes.presets import PRESETS
from crab_min.runs.folder import checkpoints_of
from crab_min.tools.measure import (
    ANSWER,
    Prompt,
    cache_bytes,
    encoding_bytes,
    evaluation_bytes,
    fill,
    lm_loss,
    read_prompts,
    without_values,
)
from crab_min.tools.plan import plan, report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu  # noqa: E402
from common import peak_bytes  # noqa: E402

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
    assert budget.tokens == 25  # two rows
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


def rows_of(folder: Path) -> dict[str, int]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {task: result["n"] for task, result in metrics["tasks"].items()}


@pytest.mark.parametrize("mode, method", [("generate", "generate"), ("rank", "token_losses")])
def test_an_evaluation_goes_on_with_fewer_rows(
    mode, method, small_world, tmp_path, monkeypatch, capsys
):
    """A run of one step whose evaluations, before and after it, meet a small GPU."""
    done = fail_above(monkeypatch, AVLanguageModel, method, 3)
    if mode == "rank":
        answers = [f"<answer> {name}</answer>" for name in ("yes", "no", "two")]
        monkeypatch.setattr("crab_min.evaluation.answering.options", lambda sample: answers)
    rows = ["--data", str(small_world), "--tasks", "avqa,ks", "--test-rows", "6"]
    run = tmp_path / "run"
    command = f"--steps 1 --batch-size 2 --eval-mode {mode} --out {run}"
    assert train.main([*rows, *command.split()]) == 0
    assert max(done) <= 3 and rows_of(run) == {"avqa": 6, "ks": 4}
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("out of memory") == 1

    assert infer.main(["--eval", *rows, "--run", str(run), "--max-new-tokens", "4"]) == 0
    assert max(done) <= 3 and rows_of(run / "eval_test") == {"avqa": 6, "ks": 4}
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("out of memory") == 1


# where memory ends: a function, and the number of its rows that is too much
PLACES = {
    "encoder": (ComposedModel, "encode", lambda model, kind, media, seconds: len(media)),
    "embeddings": (AVLanguageModel, "embed", lambda model, batch: batch.rows),
    "first token": (LlamaMLP, "forward", lambda mlp, x: len(x) if x.shape[1] > 1 else 0),
    "later token": (LlamaMLP, "forward", lambda mlp, x: len(x) if x.shape[1] == 1 else 0),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_split_is_answered_wherever_memory_ends(
    place, small_world, tmp_path, monkeypatch, capsys
):
    owner, method, rows = PLACES[place]
    original, done = getattr(owner, method), []

    def limited(*arguments):
        if rows(*arguments) > 3:
            raise torch.OutOfMemoryError(FULL)
        done.append(rows(*arguments))
        return original(*arguments)

    monkeypatch.setattr(owner, method, limited)
    command = f"--eval --demo --data {small_world} --tasks avqa,ks --test-rows 6"
    out = tmp_path / "eval"
    assert infer.main([*command.split(), "--max-new-tokens", "4", "--out", str(out)]) == 0
    assert max(done) <= 3 and rows_of(out) == {"avqa": 6, "ks": 4}
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("out of memory") == 1


def test_masks_go_on_with_fewer_rows(small_world, tmp_path, monkeypatch, capsys):
    done = fail_above(monkeypatch, MaskingModel, "predict_masks", 2)
    cached = fail_above(monkeypatch, MaskingModel, "cache_answer_states", 3)
    rows = ["--data", str(small_world), "--tasks", "s4", "--test-rows", "5"]
    run = tmp_path / "run"
    command = f"crab-tiny --stage masks --steps 2 --text-steps 1 --out {run}"
    assert train.main([*command.split(), *rows]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["masks"]["s4"]["n"] == 4
    assert max(done + cached) <= 3

    capsys.readouterr()
    assert infer.main(["--eval", *rows, "--run", str(run)]) == 0
    metrics = json.loads((run / "eval_test" / "metrics.json").read_text())
    assert metrics["masks"]["s4"]["n"] == 4 and max(done) <= 2
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("out of memory") == 1


TRAINING_PLACES = {
    "collate": (AVLanguageModel, "collate"),
    "forward": (AVLanguageModel, "forward"),
    "backward": (torch.Tensor, "backward"),
    "update": (torch.optim.AdamW, "step"),
}


@pytest.mark.parametrize("place", TRAINING_PLACES)
def test_out_of_memory_in_training_keeps_the_last_checkpoint(
    place, small_world, tmp_path, monkeypatch, capsys
):
    owner, method = TRAINING_PLACES[place]
    original, calls = getattr(owner, method), []

    def limited(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError(FULL)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, method, limited)
    run = tmp_path / "run"
    command = (
        f"--data {small_world} --tasks ks --test-rows 1 --steps 5 --save-every 1 --no-baseline"
    )
    command = [*command.split(), "--batch-size", "2", "--grad-accum", "1", "--out", str(run)]
    assert train.main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory" in error and "--batch-size" in error
    assert [checkpoint.name for checkpoint in checkpoints_of(run)] == ["step_3"]
    assert train.main(command) == 0  # goes on from it


def test_out_of_memory_elsewhere_is_one_line(monkeypatch, capsys):
    def ask(given):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr("crab_min.tools.ask.ask", ask)
    assert infer.main(["clip.mp4", "--ask", "What is it?"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "out of memory" in error and "--frames" in error


# --- the plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", RECIPES)
def test_every_recipe_fits_the_gpu_that_it_names(command):
    given, settings = parse_train(command.split())
    recipe = importlib.import_module(f"crab_min.recipes.{PRESETS[given.preset].recipe}")
    result = plan(recipe, settings)
    memory = next(iter(result.memory.values()))
    assert memory.fits(RECIPES[command])
    assert memory.evaluation > memory.frozen and "evaluation, " in report(result)


@pytest.mark.parametrize("mode", ["generate", "rank"])
def test_the_plan_of_an_evaluation_is_what_the_profiler_counts(mode):
    """The profiler sees each allocation while the LM reads the same prompts: within a fifth."""
    rows, length = 20, 300
    answer_tokens = ANSWER if mode == "rank" else DEFAULT_LIMIT
    run = RunConfig(eval_mode=mode, eval_batch_tokens=rows * (length + answer_tokens))
    settings = Settings(run=run)
    model = load_base().eval()
    model.add_adapter(settings.adapter)

    def answer() -> None:
        with torch.no_grad():
            if mode == "rank":
                lm_loss(model, rows, length + ANSWER)
            else:
                read_prompts(model, rows, length)

    peak = peak_bytes(answer, "cpu")

    # the plan also knows of the answers that are to come
    if mode == "generate":
        peak += rows * DEFAULT_LIMIT * cache_bytes(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill(model)
        estimate = evaluation_bytes(model, settings, Prompt(length + ANSWER, []))
    assert estimate == pytest.approx(peak, rel=0.2)


def test_the_plan_of_the_encoders_is_what_the_profiler_counts():
    rng = np.random.default_rng(0)
    model = load_base()
    pixels = rng.integers(0, 256, (10, model.frame_size, model.frame_size, 3), np.uint8)
    together = ENCODED_TOGETHER
    videos: list = []

    def encode() -> None:
        videos.extend(model.encode("video", together * [pixels], together * [10.0]))

    peak = peak_bytes(encode, "cpu")
    settings = Settings(training=TrainingConfig(batch_size=1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill(model)
        prompt = Prompt(20_000, [without_values(videos[0])], {"video": (pixels, 10.0)})
        estimate = encoding_bytes(model, settings, prompt)
    assert estimate == pytest.approx(peak, rel=0.2)


# --- benchmarks/gpu.py ----------------------------------------------------------------------------


def test_the_benchmark_runs_the_recipes_that_are_planned_here():
    assert gpu.RECIPES == list(RECIPES)


class Linear4bit(torch.nn.Linear):
    """In the place of bitsandbytes' layer."""

    def __init__(self, *sizes, bias, compute_dtype, device, quant_type, compress_statistics):
        super().__init__(*sizes, bias=bias, device=device)
        assert (compute_dtype, quant_type, compress_statistics) == (torch.bfloat16, "nf4", True)


def params_4bit(data: torch.Tensor, requires_grad: bool, **options) -> torch.nn.Parameter:
    return torch.nn.Parameter(data, requires_grad)


def test_the_benchmark_quantizes_every_linear_of_the_lm_and_no_other(monkeypatch):
    """With layers that keep the values, the model answers as before."""
    fake = SimpleNamespace(nn=SimpleNamespace(Linear4bit=Linear4bit, Params4bit=params_4bit))
    monkeypatch.setattr(gpu, "import_bitsandbytes", lambda: fake)
    torch.manual_seed(0)
    model = load_base().eval()
    batch = model.collate([[PromptPart("text", text="Who barks?")]], [[]], ["The dog."])
    before = model.token_losses(batch)
    gpu.quantize(model)
    assert torch.equal(model.token_losses(batch), before)
    small = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    linears = {
        f"llm.model.layers.{name}"
        for name, module in model.llm.model.layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert small == linears and len(small) > 6
