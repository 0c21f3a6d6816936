"""benchmarks/transfer.py, ablation.py: counting on made numbers, and the commands at toy size."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from crab_min.answers import Answer
from crab_min.backbones.load import load_model
from crab_min.config import Settings
from crab_min.ilora import route
from crab_min.tasks import TASKS

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import ablation  # noqa: E402
import transfer  # noqa: E402


def scores(right: list[list[bool]]) -> transfer.TaskScores:
    """Answers of ks that are right or wrong: one list per arm."""
    answers = []
    for arm in right:
        answers.append([Answer(choice="drumming" if is_right else "singing") for is_right in arm])
    golds = [Answer(choice="drumming")] * len(right[0])
    return transfer.TaskScores(TASKS["ks"], golds, answers)


def test_the_difference_is_joint_minus_alone_with_an_interval_around_it():
    alone = scores([[True] * 10 + [False] * 30])
    joint = scores([[True] * 30 + [False] * 10])
    column = transfer.differences(alone, joint, resamples=300)["accuracy"]
    assert column["single"] == 0.25 and column["joint"] == 0.75
    assert column["difference"] == 0.5
    # 20 of 40 rows change: the standard error is 0.079
    assert 0.30 < column["low"] < 0.42 and 0.58 < column["high"] < 0.70
    assert column["verdict"] == "gain"


def test_the_other_way_round_it_is_a_loss_of_the_same_size():
    alone = scores([[True] * 30 + [False] * 10])
    joint = scores([[True] * 10 + [False] * 30])
    column = transfer.differences(alone, joint, resamples=300)["accuracy"]
    assert column["difference"] == -0.5
    assert column["verdict"] == "loss"


def test_equal_answers_and_small_differences_are_ties():
    same = scores([[True, False] * 20])
    assert transfer.differences(same, same, 50)["accuracy"]["verdict"] == "tie"
    other = scores([[True, False] * 19 + [True, True]])
    column = transfer.differences(same, other, 300)["accuracy"]
    assert column["difference"] == pytest.approx(1 / 40)
    assert column["verdict"] == "tie"


def test_seeds_are_averaged():
    single = scores([[True] * 4, [False] * 4])
    assert single.columns(np.arange(4))["accuracy"] == 0.5


def test_shares_are_of_all_verdicts():
    counted = transfer.shares(["gain", "gain", "loss", "tie", "gain"])
    assert counted == {"loss": 0.2, "tie": 0.2, "gain": 0.6}


@pytest.mark.slow
def test_a_study_leaves_its_tables_and_repeats_no_arm(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["transfer.py", "--quick", "--out", str(tmp_path / "study")]
    monkeypatch.setattr(sys, "argv", arguments)
    transfer.main()
    out = tmp_path / "study-quick"
    summary = json.loads((out / "transfer.json").read_text())
    assert set(summary) == {"ilora, reasoning", "ilora, label"}
    assert set(summary["ilora, label"]["tasks"]) == {"ks", "avqa", "arig"}
    assert (out / "transfer.png").stat().st_size > 10_000

    # one arm is lost: it alone is trained again
    arms = sorted(out.glob("ilora-*.json"))
    assert len(arms) == 8  # two targets, each jointly and three tasks alone
    times = {file: file.stat().st_mtime_ns for file in arms}
    arms[0].unlink()
    capsys.readouterr()
    for share in ("1/2", "2/2"):
        monkeypatch.setattr(sys, "argv", [*arguments, "--share", share])
        transfer.main()
    printed = capsys.readouterr().out
    assert "8 arms, 4 in this share, 1 of them to be trained" in printed
    assert "8 arms, 4 in this share, 0 of them to be trained" in printed
    changed = [file for file in arms if file.stat().st_mtime_ns != times[file]]
    assert changed == [arms[0]]


@pytest.mark.slow
def test_an_ablation_compares_with_the_reference(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["ablation.py", "--quick", "--out", str(tmp_path / "study")]
    monkeypatch.setattr(sys, "argv", arguments)
    ablation.main()
    summary = json.loads((tmp_path / "study-quick/ablation.json").read_text())
    assert list(summary) == [ablation.REFERENCE, ablation.UNIFORM]
    assert summary[ablation.REFERENCE]["share of tasks"] == {"loss": 0, "tie": 1, "gain": 0}
    assert set(summary[ablation.UNIFORM]["tasks"]) == {"ks", "avqa", "arig"}
    capsys.readouterr()
    ablation.main()
    assert "2 arms, 0 of them to be trained" in capsys.readouterr().out


def test_a_uniform_router_weighs_all_heads_alike():
    model = load_model(Settings().backbone)
    model.add_adapter(ablation.ADAPTERS[ablation.UNIFORM])
    model.set_trainable(["adapter"])
    ablation.fix_router(model)
    routers = [m for name, m in model.named_modules() if name.endswith("ilora_router.default")]
    assert routers
    for router in routers:
        weights = route(router(torch.randn(2, router.in_features)))
        assert torch.equal(weights, torch.full((2, 3), 1 / 3))
        assert not router.weight.requires_grad
