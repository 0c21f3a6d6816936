"""The command line: flags of a preset, old and wrong flags, help; answered before torch loads."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import infer
import train
from crab_min.cli import BASIC, REMOVED, flags_of, parse_train
from crab_min.config import RECIPES, RENAMED, groups_of, setting_names, settings_from_old
from crab_min.recipes.presets import PRESETS

ROOT = Path(__file__).parents[1]

# The flags that another name has taken over, as a user of the first version knows them.
OLD_FLAGS = [
    ("--accumulate 2", "--grad-accum"),
    ("--answers options", "--eval-mode"),
    ("--checkpointing", "--gradient-checkpointing"),
    ("--clip 1", "--max-grad-norm"),
    ("--group", "--group-by-length"),
    ("--no-half", "--bf16"),
    ("--keep 3", "--keep-checkpoints"),
    ("--mix 1", "--task-sampling-exponent"),
    ("--quantize 4bit", "--load-in-4bit"),
    ("--start runs/a", "--init-from"),
    ("--train adapter+connectors", "--trainable"),
    ("pave-tiny --no-arms", "--compare-lora"),
    ("crema-tiny --join add", "--fusion"),
    ("crema-tiny --sequential", "--modality-sequential"),
    ("crema-tiny --temperature 1.8", "--exit-threshold"),
]


def error_of(main, command: str, capsys) -> str:
    """Return the one line with which a command must end, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert printed.out == ""
    return printed.err


def help_of(command: str, capsys) -> str:
    """Return what a command prints that ends with exit code 0 before anything runs."""
    with pytest.raises(SystemExit) as stop:
        train.main(command.split())
    assert stop.value.code == 0
    return capsys.readouterr().out


def flags_in(text: str) -> set[str]:
    """Return the flags that a help text explains."""
    return set(re.findall(r"^  (?:-h, )?--([a-z0-9-]+)", text, re.MULTILINE))


def test_an_old_flag_names_the_new_one(capsys):
    for command, new in OLD_FLAGS:
        assert f"is now {new};" in error_of(train.main, command, capsys)
    assert len(OLD_FLAGS) == len(RENAMED)
    assert "--limit is now --max-new-tokens" in error_of(infer.main, "--limit 8", capsys)
    assert "--without is now --ablate" in error_of(infer.main, "--eval --without sound", capsys)


def test_a_flag_that_is_gone_says_what_does_its_work(capsys):
    for name, instead in REMOVED.items():
        assert f"--{name} is gone: {instead}" in error_of(train.main, f"--{name} 3", capsys)


def test_a_flag_of_another_preset_says_whose_it_is(capsys):
    error = error_of(train.main, "--modalities rgb,audio", capsys)
    assert "crab_plus-tiny has no --modalities; crema-tiny has" in error
    assert "crema-xl has no --stage; crab-tiny has" in error_of(
        train.main, "crema-xl --stage masks", capsys
    )
    assert "tiny-base has no --tasks;" in error_of(train.main, "tiny-base --tasks ave", capsys)


def test_a_misspelt_flag_is_suggested(capsys):
    error = error_of(train.main, "--stepz 3", capsys)
    assert "unknown flag --stepz, did you mean --steps?" in error
    assert "did you mean --task?" in error_of(infer.main, "clip.mp4 --tusk ave", capsys)
    assert "unknown flag --zzzz;" in error_of(train.main, "--zzzz", capsys)


def test_a_wrong_value_or_preset_is_one_line(capsys):
    assert "--steps" in error_of(train.main, "--steps many", capsys)
    assert "generate" in error_of(train.main, "--eval-mode guess", capsys)
    assert "'crab-huge'; choose from crab_plus-tiny," in error_of(train.main, "crab-huge", capsys)
    assert "--grad-accum: 0, expected" in error_of(train.main, "--grad-accum 0", capsys)
    assert "rgb, the video, first" in error_of(
        train.main, "crema-tiny --modalities audio,rgb", capsys
    )


@pytest.mark.parametrize(
    "command",
    [
        "crab-tiny --stage masks --steps 9 --no-bf16",
        "--stage masks crab-tiny --steps 9 --no-bf16",
        "--no-bf16 --stage masks --steps 9 crab-tiny",
        "--no-bf16 --steps=9 crab-tiny --stage=masks",
    ],
)
def test_the_preset_may_stand_anywhere(command):
    given, settings = parse_train(command.split())
    assert given.preset == "crab-tiny"
    assert settings.stages.stage == "masks" and settings.training.steps == 9
    assert not settings.training.bf16
    assert settings.masks.width == 64  # a value of that stage of the preset, which is no flag


def test_no_preset_is_crab_plus_on_the_tiny_base():
    given, settings = parse_train([])
    assert given.preset == "crab_plus-tiny"
    assert settings.adapter.r == 16 and settings.adapter.adapter == "ilora"


def test_help_shows_the_basic_flags_of_a_preset_and_help_all_the_rest(capsys):
    basic, every = (flags_in(help_of(flag, capsys)) for flag in ("--help", "--help-all"))
    commands = {"help", "help-all", "list", "plan", "debug"}
    assert commands < basic < every
    assert len(basic - commands) <= 25
    assert {"tasks", "data", "steps", "lr", "adapter", "r", "trainable", "out"} < basic
    assert {"workers", "save-every", "bf16"} <= every - basic
    assert basic == flags_in(help_of("-h", capsys))


def test_basic_flags_and_values_of_presets_are_settings_that_exist():
    flags = [f.name for recipe in RECIPES.values() for f in flags_of(groups_of(recipe)).values()]
    assert set(BASIC) <= set(flags)
    for preset in PRESETS.values():
        for values in (preset.values, *preset.stages.values()):
            assert values.keys() <= setting_names(RECIPES[preset.recipe]).keys()


def test_help_of_a_paper_has_no_flags_of_the_others(capsys):
    pave = flags_in(help_of("pave-tiny --help-all", capsys))
    assert {"side", "compare-lora"} <= pave
    assert not {"modalities", "fusion", "exit-threshold", "stage", "text-steps"} & pave
    assert not [name for name in pave if "mask" in name or "modality" in name]
    crema = flags_in(help_of("--help crema-tiny", capsys))
    assert {"modalities", "fusion", "modality-sequential", "exit-threshold"} <= crema
    assert not {"side", "stage"} & crema


def test_help_says_the_defaults_of_the_preset(capsys):
    assert re.search(r"--r R .*\(default:\s+128\)", help_of("crab_plus-7b -h", capsys))
    masks = help_of("crab-tiny --stage masks --help-all", capsys)
    assert re.search(r"--beta2 BETA2 [^(]*\(default:\s+0.98\)", masks)


def test_list_names_every_preset(capsys):
    lines = help_of("--list", capsys).splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert all(len(line.split()) > 3 for line in lines)


WITHOUT_TORCH = """
import sys
import infer
import train
commands = [
    (train, "--help"), (train, "pave-tiny --help-all"), (train, "--list"), (train, "--half"),
    (train, "--stepz 3"), (train, "crab-huge"), (train, "--steps many"), (infer, "--help"),
    (infer, "--limit 3"), (infer, "--zzzz"),
]
for module, command in commands:
    try:
        module.main(command.split())
        assert False, command
    except SystemExit:
        pass
train.parse_train(["crema-xl", "--modalities", "rgb,flow"])
assert "torch" not in sys.modules and "transformers" not in sys.modules, "imported"
"""


def test_help_and_wrong_flags_are_answered_without_torch():
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# --- settings of runs of the first version ------------------------------------------------------

# config.json of such a run, "train": flat, with the flags of all papers
OLD_SETTINGS = {
    "data": "",
    "tasks": "all",
    "backbone": "composed",
    "quantize": "",
    "adapter": "ilora",
    "r": 16,
    "train": "adapter+connectors+words",
    "start": "",
    "answers": "text",
    "accumulate": 2,
    "half": False,
    "mix": 0.5,
    "stage": "",
    "masks": "",
    "mask_width": 256,
    "side": "",
    "about": "",
    "patch_size": 512,
    "patch_layers": 2,
    "shared_kv": False,
    "modalities": "",
    "join": "concat",
    "sequential": True,
    "temperature": 1.8,
    "max_tokens": 0,
    "feature_cache": "",
}


def test_old_settings_are_read_under_their_new_names():
    recipe, settings = settings_from_old(OLD_SETTINGS)
    assert recipe == "crab_plus"
    assert settings.training.parts == ["adapter", "connectors", "embeddings"]
    assert settings.training.grad_accum == 2 and not settings.training.bf16
    assert settings.run.eval_mode == "generate" and not settings.backbone.load_in_4bit

    old = {**OLD_SETTINGS, "backbone": "native", "quantize": "4bit", "answers": "options"}
    recipe, settings = settings_from_old(old)
    assert recipe == "crab_plus" and settings.backbone.backbone == "omni"
    assert settings.backbone.load_in_4bit and settings.run.eval_mode == "rank"


def test_old_settings_say_which_paper_they_are_of():
    masks = {"stage": "masks", "masks": "decoder", "mask_width": 64, "train": "adapter+decoder"}
    recipe, settings = settings_from_old(OLD_SETTINGS | masks)
    assert recipe == "crab" and settings.stages.stage == "masks"
    assert settings.masks.decoder and settings.masks.width == 64
    assert settings.training.parts == ["adapter", "mask_decoder"]

    pave = {"side": "audio", "patch_size": 128, "shared_kv": True, "backbone": "llava"}
    recipe, settings = settings_from_old(OLD_SETTINGS | pave)
    assert recipe == "pave" and settings.patch.channels == ["audio"]
    assert settings.patch.width == 128 and settings.patch.shared_kv
    assert settings.backbone.backbone == "llava_onevision"

    alone = {"side": "none", "about": "audio"}
    recipe, settings = settings_from_old(OLD_SETTINGS | alone)
    assert recipe == "pave" and settings.patch.channels == []
    assert settings.patch.questions == "audio"

    crema = {"modalities": "rgb,audio,flow", "join": "add", "temperature": 0.0}
    recipe, settings = settings_from_old(OLD_SETTINGS | crema | {"backbone": "crema"})
    assert recipe == "crema" and settings.crema.names == ["rgb", "audio", "flow"]
    assert settings.crema.fusion == "add" and settings.crema.exit_threshold == 0
    assert settings.backbone.backbone == "blip2" and settings.crema.modality_sequential


def test_epochs_take_the_place_of_a_presets_steps(capsys):
    _, settings = parse_train(["pave-tiny"])
    assert settings.training.steps == 400
    _, settings = parse_train(["pave-tiny", "--epochs", "2"])
    assert (settings.training.steps, settings.training.epochs) == (0, 2)
    with pytest.raises(SystemExit):
        parse_train(["pave-tiny", "--epochs", "2", "--steps", "5"])
    assert "give one of them" in capsys.readouterr().err
