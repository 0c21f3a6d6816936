"""Released weights in one command: fabricated files of their names, fetched, asked and scored."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HTTPError
from released import (
    PEFT,
    CrabPlusSizes,
    CrabSizes,
    crab_adapter_shapes,
    crab_connector_shapes,
    crab_plus,
    random_weights,
    revert,
    write_released,
)

import infer
from crab_min.answers import MASK_TOKENS
from crab_min.backbones.composed import load_base
from crab_min.backbones.load import load_model
from crab_min.beats import BeatsConfig
from crab_min.cli import parse_infer
from crab_min.config import (
    AdapterConfig,
    BackboneConfig,
    MaskDecoderConfig,
    ModalityConfig,
    PaveSettings,
    SideChannelConfig,
    with_values,
)
from crab_min.errors import RunError
from crab_min.runs.folder import SavedRun, load_saved_run
from crab_min.tools import fetch, loading
from crab_min.tools.loading import load_asked
from crab_min.tools.released.weights import read_checkpoint

TINY_PLUS = CrabPlusSizes(
    2, 2, 2, hidden=64, intermediate=96, key_value=32, audio=32, vision=(32, 48), r=4
)


def crab_sizes() -> CrabSizes:
    model = load_base("random")
    llm, visual, audio = model.llm.config, model.visual_qformer.config, model.audio_qformer.config
    return CrabSizes(
        layers=llm.num_hidden_layers,
        hidden=llm.hidden_size,
        intermediate=llm.intermediate_size,
        r=4,
        vision=visual.width_in,
        audio=audio.width_in,
        qformer_layers=visual.layers,
        qformer_hidden=visual.hidden,
        qformer_intermediate=visual.intermediate,
        visual_queries=visual.queries,
        audio_queries=audio.queries,
        vocabulary=50,
    )


def write_crab(folder: Path) -> None:
    """Write the five files of Crab, for the sizes of the tiny random base."""
    sizes = crab_sizes()
    connectors = random_weights(crab_connector_shapes(sizes))
    unified = random_weights(crab_adapter_shapes(sizes))
    unified |= {PEFT + name: weight for name, weight in connectors.items()}
    torch.save(unified, folder / "finetune_weights.bin")
    for kind, part in (("visual", "vl"), ("audio", "al")):
        of_kind = {name: w for name, w in connectors.items() if f".{part}_projector." in name}
        torch.save(of_kind, folder / f"{kind}_pretrain.bin")

    # the mask decoder, and rows for all tokens
    masks = MaskDecoderConfig(decoder=True, width=32, queries=8, chained=False)
    model = load_model(BackboneConfig(weights="tiny-random"), masks)
    layers = model.layers_of_tokens()
    first = model.mask_token_ids[0]
    rows = torch.randn(first - len(layers[0].weight), sizes.hidden)
    branch = model.part_state("mask_decoder")
    embed = torch.cat([layers[0].weight, rows, branch["read"]])
    head = torch.cat([layers[1].weight, rows, branch["said"]])
    state = {f"mask_decoder.{name}": w for name, w in branch.items() if "decoder." in name}
    state = {name: weight for name, weight in state.items() if ".places." not in name}
    state |= {"embeddings.weight": embed, "head.weight": head}
    for name in ("avs", "avss"):
        torch.save(revert(state, "crab"), folder / f"{name}_finetune_weights.bin")


def write_pave(folder: Path) -> None:
    """Write a patch for audio and LoRA, in a zip as PAVE's are."""
    model = load_model(BackboneConfig(backbone="llava_onevision", weights="tiny-random"))
    model.add_adapter(AdapterConfig(adapter="lora", r=4))
    patch = SideChannelConfig(width=32, shared_kv=True)
    model.add_side_channel("audio", 1024, patch)
    run = folder / "run"
    run.mkdir()
    SavedRun("pave-0.5b", "pave", with_values(PaveSettings(), side="audio")).save(run)
    model.save_trained(run)
    write_released("pave", run, folder / "all.bin")
    released = read_checkpoint(folder / "all.bin")
    shutil.rmtree(run)
    name = "pave_v5_1_3_lora_avsd_imagebind"
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as packed:
        for file, is_lora in (("adapter_model", True), ("non_lora_trainables", False)):
            part = {n: w.clone() for n, w in released.items() if ("lora" in n) == is_lora}
            torch.save(part, folder / f"{file}.bin")
            packed.write(folder / f"{file}.bin", f"{name}/{file}.bin")
            (folder / f"{file}.bin").unlink()
    (folder / "all.bin").unlink()


def write_crema(folder: Path) -> None:
    model = load_model(BackboneConfig(backbone="blip2", weights="tiny-random"))
    model.configure(ModalityConfig("rgb,audio", fusion="none", modality_rank=4))
    model.add_side_channel("audio", 128)
    model.loaded_parts.add("shared_qformer")
    (folder / "run").mkdir()
    model.save_trained(folder / "run")
    write_released("crema", folder / "run", folder / "crema_pretrained.pth")
    shutil.rmtree(folder / "run")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders of fabricated files by paper, and a small benchmark of MUSIC-AVQA."""
    root = tmp_path_factory.mktemp("hub")
    folders = {paper: root / paper for paper in ("crab", "crab_plus", "pave", "crema")}
    for folder in folders.values():
        folder.mkdir()
    torch.save(crab_plus(TINY_PLUS), folders["crab_plus"] / "finetune_weights.bin")
    write_crab(folders["crab"])
    write_pave(folders["pave"])
    write_crema(folders["crema"])
    return folders


@pytest.fixture(scope="module")
def music(small_world, tmp_path_factory):
    """A benchmark folder of MUSIC-AVQA as CREMA and PAVE read it, with PAVE's features."""
    root = tmp_path_factory.mktemp("music")
    source = root / "music-avqa"
    (source / "videos").mkdir(parents=True)
    (source / "audio_features").mkdir()
    rows = []
    clips = sorted((small_world / "ave" / "video").glob("*.mp4"))[:2]
    for number, clip in enumerate(clips):
        shutil.copy(clip, source / "videos" / f"{number}.mp4")
        torch.save(torch.randn(9, 1024), source / "audio_features" / f"{number}.pt")
        rows.append(
            {
                "video_id": str(number),
                "question_id": number,
                "type": '["Audio", "Counting"]',
                "question_content": "How many <Object> sound?",
                "templ_values": '["bells"]',
                "anser": "two",
            }
        )
    (source / "avqa-test.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def benchmarks(small_world, music, tmp_path_factory):
    """The benchmark folder of each paper; CREMA has no use for PAVE's features of sounds."""
    of_crema = tmp_path_factory.mktemp("crema")
    shutil.copytree(music, of_crema / "data")
    shutil.rmtree(of_crema / "data" / "music-avqa" / "audio_features")
    return {
        "crab": small_world,
        "crab_plus": small_world,
        "pave": music,
        "crema": of_crema / "data",
    }


def write_words(folder: Path) -> str:
    words = {"prompts": {"avqa": "Answer this: {question}"}, "system": "Be a stand-in."}
    (folder / "words.json").write_text(json.dumps(words))
    return str(folder / "words.json")


QUICK = ["--weights", "tiny-random", "--max-new-tokens", "3"]


@pytest.mark.parametrize("paper", ["crab_plus", "crab", "pave", "crema"])
def test_from_files_to_an_answer_and_a_score(paper, hub, music, benchmarks, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--from", str(hub[paper]), "--out", str(run), "--prompts-from", write_words(tmp_path)]
    assert fetch.main([paper, *flags]) == 0
    printed = capsys.readouterr().out
    assert f'python infer.py CLIP.mp4 "What happens?" --run {run}' in printed
    beats = {"crab": "AS2M_finetuned_on_AS2M_cpt2.pt: not", "crema": "AS2M.pt: not"}
    assert beats.get(paper, "python infer.py") in printed
    assert ("BEATs" in printed) == (paper in beats)
    saved = load_saved_run(run)
    assert saved.layout.paper == paper and saved.prompts["avqa"] == "Answer this: {question}"
    assert saved.settings.run.eval_mode == ("rank" if paper == "crema" else "generate")
    limits = {"crab": 500, "crab_plus": 512, "pave": 1024, "crema": 10}
    assert saved.token_limits["avqa"] == limits[paper]
    assert saved.token_limits["videomme"] == {"pave": 16, "crema": 30}.get(paper, limits[paper])

    # a clip, whose prompt is in the released form
    clip = str(music / "music-avqa" / "videos" / "0.mp4")
    side = []
    if paper == "pave":
        side = ["--side", f"audio={music}/music-avqa/audio_features/0.pt"]
    ask = [clip, "What sounds?", "--run", str(run), *QUICK, *side]
    assert infer.main([*ask, "--picture", str(tmp_path / "a.png")]) == 0
    printed = capsys.readouterr()
    assert "answer this: what sounds?" in printed.out.lower() and "audio: " not in printed.out
    assert "wording: our own for" in printed.err

    # a benchmark
    score = ["--eval", "--data", str(benchmarks[paper]), "--tasks", "avqa", "--test-rows", "2"]
    score += ["--run", str(run), *QUICK, "--out", str(tmp_path / "out"), "--compare", "paper"]
    assert infer.main(score) == 0
    compared = capsys.readouterr().out.split("published\n")[1]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())["tasks"]["avqa"]
    assert metrics["n"] == 2 and {"gold_in_answer", "part_of_gold"} <= metrics["all"].keys()
    known = {"crab": "78.94", "crab_plus": "", "pave": "82.30", "crema": "52.60"}[paper]
    assert known in compared and ("(" in compared) == (paper != "crab_plus")
    if paper in ("pave", "crema"):  # bare answers parse
        lines = (tmp_path / "out" / "predictions" / "avqa.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"].strip() for line in lines]
        assert metrics["parsed"] == sum(bool(text) for text in texts) / 2


@pytest.mark.parametrize("name", ["visual", "audio", "avs", "avss"])
def test_each_file_of_crab_becomes_the_run_it_belongs_to(name, hub, small_world, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["crab", "--files", name, "--from", str(hub["crab"]), "--out", str(run)]
    assert fetch.main(command) == 0
    printed = capsys.readouterr().out
    parts = {file.stem for file in (run / "parts").iterdir()}
    stages = load_saved_run(run).settings.stages.stage
    clip = str(next((small_world / "ave" / "video").glob("*.mp4")))
    ask = [clip, "--task", "avcap"]
    if name.startswith("avs"):
        expected = {"visual_qformer", "audio_qformer", "embeddings", "head", "mask_decoder"}
        assert parts == expected and stages == "masks"
        assert "positional encodings are not in these files" in printed
        score = ["--eval", "--data", str(small_world), "--tasks", "s4", "--test-rows", "2"]
        score += ["--run", str(run), *QUICK, "--out", str(tmp_path / "out")]
        assert infer.main(score) == 0
        assert "masks of s4: coverage" in capsys.readouterr().out
        image = next((small_world / "s4").rglob("*.jpg"))
        ask = ["--image", str(image), "--audio", clip, "--task", "s4"]
    else:
        assert parts == {f"{name}_qformer"} and stages == name
    flags = ["--run", str(run), *QUICK, "--picture", str(tmp_path / "a.png"), "--json"]
    assert infer.main([*ask, *flags]) == 0
    capsys.readouterr()


def test_the_mask_run_reads_and_writes_the_rows_of_its_file(hub, tmp_path):
    run = tmp_path / "run"
    command = ["crab", "--files", "avs", "--from", str(hub["crab"]), "--out", str(run)]
    assert fetch.main(command) == 0
    released = read_checkpoint(hub["crab"] / "avs_finetune_weights.bin")
    saved = load_saved_run(run)
    model = load_model(BackboneConfig(weights="tiny-random"), saved.settings.masks)
    model.use_layout(saved.layout)
    model.load_trained(run)
    embed = released[PEFT + "model.embed_tokens.weight"]
    assert torch.equal(model.layers_of_tokens()[0].weight, embed[:-6])
    assert torch.equal(model.mask_branch.read, embed[-6:])
    ids = torch.tensor([model.tokenizer.convert_tokens_to_ids([MASK_TOKENS[2], "<video_start>"])])
    rows = model.llm.get_input_embeddings()(ids)[0]
    video_start = model.media_tokens["video"].before[0]
    assert torch.equal(rows, torch.stack([embed[-4], embed[video_start]]))


def test_beats_beside_the_files_is_taken_and_a_run_moves(hub, music, tmp_path, capsys):
    """A path in config.json that is gone is given again on the command line."""
    beats = hub["crema"] / "BEATs_iter3_plus_AS2M.pt"
    torch.save({"cfg": vars(BeatsConfig()), "model": {}}, beats)
    run = tmp_path / "run"
    assert fetch.main(["crema", "--from", str(hub["crema"]), "--out", str(run)]) == 0
    assert load_saved_run(run).settings.backbone.audio == str(beats)
    assert "not here" not in capsys.readouterr().out
    beats.unlink()

    moved = tmp_path / "elsewhere"
    run.rename(moved)
    clip = str(music / "music-avqa" / "videos" / "0.mp4")
    flags = ["--run", str(moved), "--device", "cpu", "--json", "--max-new-tokens", "2"]
    assert infer.main([clip, "What?", *flags]) == 2
    assert "blip2-flan-t5-xl" in capsys.readouterr().err
    assert infer.main([clip, "What?", *flags, "--weights", "tiny-random"]) == 0

    # it is searched as by its authors, if nothing else is asked for
    for asked, beams in (([], 5), (["--beams", "2"], 2)):
        given = parse_infer([clip, *flags, "--weights", "tiny-random", *asked])
        load_asked(given)
        assert given.beams == beams


def test_an_unknown_layout_in_a_run_is_one_line(hub, music, tmp_path, capsys):
    run = tmp_path / "run"
    assert fetch.main(["crab_plus", "--from", str(hub["crab_plus"]), "--out", str(run)]) == 0
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace('"paper": "crab_plus"', '"paper": "crab_3"'))
    capsys.readouterr()
    clip = str(music / "music-avqa" / "videos" / "0.mp4")
    assert infer.main([clip, "What?", "--run", str(run), *QUICK]) == 2
    error = capsys.readouterr().err
    assert "layout of 'crab_3': none is known" in error and error.count("\n") == 1


def test_what_cannot_be_fetched_is_one_line(hub, tmp_path, capsys):
    half, plus = tmp_path / "half", hub["crab_plus"] / "finetune_weights.bin"
    half.mkdir()
    (half / "finetune_weights.bin").write_bytes(plus.read_bytes()[:5000])
    started = tmp_path / "started"
    started.mkdir()
    (started / "crema_pretrained.pth.incomplete").write_bytes(b"")
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    name = "pave_v5_1_3_lora_avsd_imagebind.zip"
    (zipped / name).write_bytes((hub["pave"] / name).read_bytes()[:900])
    part = tmp_path / "part"
    part.mkdir()
    with zipfile.ZipFile(hub["pave"] / name) as whole, zipfile.ZipFile(part / name, "w") as packed:
        for member in whole.namelist():
            if "adapter_model" in member:
                packed.writestr(member, whole.read(member))
    masks = part / "finetune_weights.bin"  # under the name of another file
    shutil.copy(hub["crab"] / "avs_finetune_weights.bin", masks)
    cloned = tmp_path / "cloned"  # without git-lfs
    cloned.mkdir()
    for file in (name, "finetune_weights.bin"):
        (cloned / file).write_text("version https://git-lfs.github.com/spec/v1\nsize 1740000000\n")
    cases = [
        (["pave", "--files", "pave_v5_1_2_lora.zip"], "rotary positions"),
        (["pave", "--from", str(cloned)], "a git-lfs pointer"),
        (["crab_plus", "--from", str(cloned)], "a git-lfs pointer"),
        (["pave", "--from", str(part)], "no non_lora_trainables in it"),
        (["crab", "--from", str(part)], "a mask decoder alone"),
        (["crab_plus", "--from", str(tmp_path / "half")], "half a download? Download it again"),
        (["crab", "--from", str(hub["crab_plus"])], "checkpoint of another model or stage?"),
        (["crema", "--from", str(started)], "incomplete, half a download"),
        (["pave", "--from", str(zipped)], "not a whole zip"),
        (["crab", "--from", str(tmp_path / "nowhere")], "no finetune_weights.bin there"),
        (["crab_plus"], "hf download Jayson236/Crab_Plus finetune_weights.bin --repo-type dataset"),
    ]
    for command, reason in cases:
        assert fetch.main([*command, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()


def test_without_a_network_there_is_no_traceback(monkeypatch, tmp_path, capsys):
    """What httpx raises for it is no OSError, and may have no text."""

    def no_network(*arguments, **options):
        raise HTTPError("")

    monkeypatch.setattr(fetch.HfApi, "repo_info", no_network)
    monkeypatch.setattr(loading.HfApi, "model_info", no_network)
    monkeypatch.setattr(loading, "hf_hub_download", no_network)
    assert fetch.main(["crab_plus", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "cannot be downloaded (HTTPError); where there is a network" in error
    assert error.count("\n") == 1
    loading.announce_download("no/such-model")
    assert "the hub does not say the size" in capsys.readouterr().err
    with pytest.raises(RunError, match="no such folder, and no run of that name"):
        loading.fetch_run("no/such-run")
