"""Prompts in the released forms: the token ids of the authors' loaders, in stand-in words."""

import json

import pytest
import torch

from crab_min.answers import TEXT, Answer
from crab_min.backbones.composed import CRAB_TOKENS, load_base, load_tokenizer
from crab_min.backbones.load import load_model
from crab_min.backbones.tiny_random import byte_level_qwen
from crab_min.beats import fbank
from crab_min.config import BackboneConfig
from crab_min.encoders import MediaFeatures
from crab_min.errors import DataError, ModelError
from crab_min.evaluation.metrics import score
from crab_min.interface import audio_windows, build_prompt
from crab_min.tasks import TASKS
from crab_min.tools.released.layouts import RELEASED, released_form
from crab_min.tools.released.wording import Wording, missing_words, read_wording

ROW = {
    **{f"{name}_path": f"{name}.mp4" for name in ("video", "video1", "video2")},
    **{f"{name}_path": f"{name}.wav" for name in ("audio", "audio1", "audio2")},
    "image_path": "clip/frames/3.jpg",
    "frame_idx": 3,
    "question": 'Is the "CELLO" (left) louder',
    "question_text": "Who barks?",
    "multi_choice": ["a dog", "it's rain", "none", "both", "wind"],
    "description": "The RED drum",
    "situation": "I stand at the door",
    "dialogue": "",
    "turns": [("Who?", "A man."), ("Where?", "At home."), ("Why?", "")],
}
SYSTEM = "A stand-in for the system text."


def words_of(task: str) -> str:
    """Return stand-in words for the instruction of a task, with its placeholders."""
    slots = " ".join(f"{{{name}}}" for name in TASKS[task].slots)
    return f"Stand-in words of {task}, {slots}, please."


def standins(paper: str) -> Wording:
    form = RELEASED[paper]
    kinds = {"crab": ["video", "audio", "image"], "crab_plus": form.tasks}.get(paper, ())
    leads = {name: f"Here is a stand-in for {name}:\n" for name in kinds}
    return Wording(SYSTEM, leads, {task: words_of(task) for task in form.tasks})


def prompt_of(model, paper: str, task: str, lengths: dict[str, int]) -> list[int]:
    """Return the ids of a task's prompt as a released run asks it.

    Args:
        lengths: number of features of each medium, by kind.
    """
    form, wording = RELEASED[paper], standins(paper)
    layout = wording.put_into(form.layout)
    model.use_layout(layout)
    prompts = form.prompts | wording.prompts
    parts = build_prompt(layout.adapt(TASKS[task]), ROW, "", prompts, layout)
    media = [MediaFeatures(p.kind, torch.zeros(lengths[p.kind], 1, 1)) for p in parts if p.path]
    if paper in ("pave", "crema"):  # no sound in the prompt
        pairs = [(p, m) for p, m in zip([p for p in parts if p.path], media) if p.kind != "audio"]
        parts = [p for p in parts if p.kind != "audio"]
        media = [m for _, m in pairs]
    return model.prompt_ids(*model.arrange(parts, media))


# --- Crab+: the chat template of its processor --------------------------------------------------
# a stand-in for the hub's file: the same marks and order
TEMPLATE = """\
{%- for m in messages -%}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content -%}
{%- if c.type == 'text' %}{{ c.text }}
{%- elif c.type == 'audio' %}<|audio_bos|><|audio|><|audio_eos|>
{%- else %}<|vision_bos|><|{{ c.type }}|><|vision_eos|>{% endif -%}
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CRAB_PLUS_SLOTS = {
    "question": ROW["question"],
    "choices": str(ROW["multi_choice"]),
    "description": ROW["description"].lower(),
}


@pytest.fixture(scope="module")
def omni():
    return load_model(BackboneConfig(backbone="omni", weights="tiny-random"))


@pytest.mark.parametrize("task", RELEASED["crab_plus"].tasks)
def test_crab_plus_is_asked_as_by_its_processor(omni, task):
    """A conversation of lead-in, media and instruction, and two media of a kind run together."""
    kinds = [medium.kind for medium in TASKS[task].media]
    slots = {**CRAB_PLUS_SLOTS, "question": ROW[TASKS[task].slots.get("question", ["question"])[0]]}
    wording = standins("crab_plus")
    content = [{"type": "text", "text": wording.leads[task]}, *({"type": k} for k in kinds)]
    content.append({"type": "text", "text": wording.prompts[task].format(**slots)})
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    processor = omni.processor
    text = processor.apply_chat_template(
        messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    lengths = {"video": 5 * 256, "image": 256, "audio": 1000}
    counts = {"video": 320, "image": 64, "audio": 250}
    for kind, mark in (("video", "vision"), ("image", "vision"), ("audio", "audio")):
        block = f"<|{mark}_bos|><|{kind}|><|{mark}_eos|>"
        tokens = kinds.count(kind) * counts[kind]
        text = text.replace(block, "", max(0, kinds.count(kind) - 1))
        text = text.replace(f"<|{kind}|>", f"<|{kind}|>" * tokens)
    expected = processor.tokenizer.encode(text, add_special_tokens=False)
    assert prompt_of(omni, "crab_plus", task, lengths) == expected


def test_crab_plus_says_two_seconds_of_every_pair_of_frames(omni):
    video = MediaFeatures("video", torch.zeros(5 * 256, 1176), seconds=60)
    parts = build_prompt(TASKS["scanqa"], ROW, layout=RELEASED["crab_plus"].layout)
    for paper, seconds in (("crab_plus", 2.0), ("pave", 12.0)):
        omni.use_layout(RELEASED[paper].layout)
        inputs = omni.extra_lm_inputs(omni.collate([parts], [[video]]))
        assert inputs["video_second_per_grid"].tolist() == [seconds]


# --- Crab: Llama 2's template, tokens around media ----------------------------------------------
@pytest.mark.parametrize("task", RELEASED["crab"].tasks)
def test_crab_is_asked_as_by_its_loader(task):
    model = load_base("random")
    asks_clip = task in RELEASED["crab"].layout.clip_frames
    kind = "image" if task == "arig" else "video"
    slots = {**CRAB_PLUS_SLOTS, "question": ROW["question"]}
    wording = standins("crab")
    content = ""
    for k in (kind, "audio"):
        content += f"{wording.leads[k]}<{k}_start><{k}><{k}_end>\n"
    content += wording.prompts[task].format(**slots)
    text = f"<s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{content.strip()} [/INST]"

    lengths = {"video": 10, "image": 1, "audio": 10}
    ids = prompt_of(model, "crab", task, lengths)
    queries = model.visual_qformer.config.queries
    sounds = model.audio_qformer.config.queries
    for k, count in (("video", 10 * queries), ("image", queries), ("audio", 10 * sounds)):
        text = text.replace(f"<{k}>", f"<{k}>" * count)
    assert ids == model.tokenizer.encode(text, add_special_tokens=False)
    assert model.tokenizer.convert_tokens_to_ids(list(CRAB_TOKENS))[1] < len(
        model.llm.get_input_embeddings().weight
    )
    # a mask is asked of one frame of a clip, whose picture is no part of the text
    parts = build_prompt(RELEASED["crab"].layout.adapt(TASKS[task]), ROW)
    assert [p.path for p in parts if p.side] == ([f"{task}/clip/frames/3.jpg"] if asks_clip else [])
    if asks_clip:
        assert parts[1].path == f"{task}/clip/frames" and parts[1].kind == "video"
        alone = build_prompt(
            RELEASED["crab"].layout.adapt(TASKS[task]), {**ROW, "image_path": "3.jpg"}
        )
        assert [p.kind for p in alone if p.path] == ["image", "audio"]


def test_crab_tokenizes_its_template_with_the_texts_beside_it(monkeypatch):
    """Llama's tokenizer makes other tokens of the pieces than of the whole."""
    model = load_base("random")
    encode, texts = model.encode_text, []

    def noted(text: str) -> list[int]:
        texts.append(text)
        return encode(text)

    monkeypatch.setattr(model, "encode_text", noted)
    prompt_of(model, "crab", "ave", {"video": 10, "audio": 10})
    leads = standins("crab").leads
    before = f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n"
    end = f"\n{words_of('ave')} [/INST]"
    assert texts == [before + leads["video"], "\n" + leads["audio"], end]


def test_crab_adds_its_tokens_to_a_tokenizer_in_their_order(tmp_path):
    """The rows of released embeddings are in this order."""
    byte_level_qwen({}).save_pretrained(tmp_path)
    words = len(byte_level_qwen({}))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.convert_tokens_to_ids([*CRAB_TOKENS, "<mask_start>"])
    assert ids == [*range(words, words + 11), words + 9]


def test_crab_names_the_second_of_a_frame():
    prompts = {"s4": "Show it at the {second} second."}
    parts = build_prompt(TASKS["s4"], ROW, "", prompts)
    assert parts[-1].text == "\nShow it at the fourth second."
    row = {name: value for name, value in ROW.items() if name != "frame_idx"}
    parts = build_prompt(RELEASED["crab"].layout.adapt(TASKS["s4"]), row, "", prompts)
    assert parts[-1].text.endswith("Show it at the fourth second.")
    assert [(p.kind, p.frames, p.window) for p in parts if p.kind == "video"] == [
        ("video", 5, "tenths")
    ]
    assert [p.window for p in parts if p.kind == "audio"] == ["fifths"]

    # AVSS is trained on the sound of all frames; its own rows name that of one
    avss = RELEASED["crab"].layout.adapt(TASKS["avss"])
    for image, window in ((ROW["image_path"], "tenths"), ("3.jpg", "tenth")):
        parts = build_prompt(avss, {**ROW, "image_path": image, "window": "tenth"})
        assert [p.window for p in parts if p.kind == "audio"] == [window]


# --- PAVE: Qwen's chat, a dialogue is a conversation --------------------------------------------
@pytest.mark.parametrize("task", ["avqa", "avqa_thu", "scanqa", "sqa3d", "avsd", "egoexo"])
def test_pave_is_asked_as_by_its_evaluation(task):
    model = load_model(BackboneConfig(backbone="llava_onevision", weights="tiny-random"))
    lettered = "".join(f"{a}.{o}\n" for a, o in zip("ABCDE", ROW["multi_choice"]))
    questions = {
        "avqa": [ROW["question"]],
        "scanqa": [ROW["question"]],
        "sqa3d": [f"{ROW['situation']} {ROW['question']}"],
        "avqa_thu": [words_of("avqa_thu").format(question=ROW["question"], choices=lettered)],
        "avsd": ["Who?", "Where?", "Why?"],
        "egoexo": [words_of("egoexo")],
    }[task]
    chat = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    for index, question in enumerate(questions):
        chat += f"<|im_start|>user\n{'' if index else '<image>'}\n{question}<|im_end|>\n"
        chat = chat.replace("user\n\n", "user\n")
        answer = ROW["turns"][index][1] if task == "avsd" else ""
        chat += "<|im_start|>assistant\n" + (f"{answer}<|im_end|>\n" if answer else "")
    # two frames of 2 x 2 tokens, each row with a newline
    video = "<video>" * (2 * model.grid_side * (model.grid_side + 1))
    expected = model.tokenizer.encode(chat.replace("<image>", video), add_special_tokens=False)
    lengths = {"video": 2, "image": 1, "audio": 1}
    assert prompt_of(model, "pave", task, lengths) == expected


# --- CREMA: frames, then a question of 77 tokens at most ----------------------------------------
@pytest.mark.parametrize("task", RELEASED["crema"].tasks)
def test_crema_is_asked_as_by_its_data_sets(task):
    model = load_model(BackboneConfig(backbone="blip2", weights="tiny-random"))
    encode = model.tokenizer.encode
    is_plain = task != "nextqa"
    question = "is the cello left louder" if is_plain else ROW["question"]
    lettered = " ".join(f"Option {a}: {o}" for a, o in zip("ABCDE", ROW["multi_choice"]))
    situation = ROW["situation"].lower()
    text = words_of(task).format(question=question, choices=lettered, situation=situation)
    expected = []
    for frame in (1, 2):
        expected += encode(f"Frame {frame}: ") + [model.media_tokens["video"].placeholder] * 4
    # the end of the text counts among the 77 tokens
    expected += [*encode(text)[:76], model.eos_id]
    assert prompt_of(model, "crema", task, {"video": 2, "image": 1, "audio": 1}) == expected
    assert len(encode(text)) > 76 or task == "avqa"


def test_crema_hears_two_pieces_of_512_mel_frames():
    layout = RELEASED["crema"].layout
    parts = build_prompt(layout.adapt(TASKS["avqa"]), ROW, layout=layout)
    assert [part.window for part in parts if part.kind == "audio"] == ["opening"]
    windows = audio_windows("opening", 60)
    assert [start for start, _ in windows] == [0, 5.12]
    for start, end in windows:
        samples = round(16000 * (end - start))
        assert fbank(torch.randn(1, samples)).shape == (1, 512, 128)


# --- bare answers -------------------------------------------------------------------------------
BARE = {
    "avqa": (["two", " Two.", "2", "<answer> two</answer>"], Answer(choice="two")),
    "avqa_thu": (
        ["B", "(B)", "B. rain", "(b) rain", "rain", "Option B", "option b."],
        Answer(choice="rain", choices=("dog", "rain")),
    ),
    "nextqa": (["Option A", "dog"], Answer(choice="dog", choices=("dog", "rain"))),
    "ks": (["playing violin", "Playing_Violin"], Answer(choice="playing violin")),
    "a2v": (["one", "1"], Answer(choice="one")),
    "ave": (["dog, (0 3)"], Answer(events=[("dog", [(0, 3)])])),
    "ref_avs": (
        ["True. [1,2,30,40]", "true [1,2,30,40]"],
        Answer(exists=True, boxes=[(1, 2, 30, 40)]),
    ),
    "sqa3d": (["a cat"], Answer(text="cat", choices=("cat",))),
}


@pytest.mark.parametrize("task", BARE)
def test_a_bare_answer_counts_where_the_layout_says_so(task):
    texts, gold = BARE[task]
    bare = RELEASED["pave"].layout.adapt(TASKS[task])
    for text in texts:
        result = score(bare, [bare.parse(text)], [gold])
        assert result["metric"] == 1, text
        if text == texts[0]:  # released scorers take the words as they are
            assert all(result["all"].get(name, 1) == 1 for name in LENIENT)
        if TASKS[task].form is not TEXT and "<" not in text:
            assert score(TASKS[task], [TASKS[task].parse(text)], [gold])["parsed"] == 0


# --- answers with reasoning, in the form in which the released models learned them --------------
WRITTEN = {
    "avqa": (
        "A saxophone plays. So the answer is <answer> saxophone </answer>.",
        Answer(choice="saxophone"),
    ),
    "ave": (
        "A man speaks. So it is <event> Male speech, man speaking </event>, and the time range is "
        "<range> 0,8 </range>.",
        Answer(events=[("male speech, man speaking", [(0, 8)])]),
    ),
    "avvp": (
        "They are <visual_event>Chainsaw,(0 10)</visual_event> and "
        "<audio_event>Chainsaw,(2 10)</audio_event>",
        Answer(visual_events=[("chainsaw", [(0, 10)])], audio_events=[("chainsaw", [(2, 10)])]),
    ),
    "arig": (
        "It is a dog. Its coordinate of top left corner is (1,2) and coordinate of bottom right "
        "corner is (30,40)",
        Answer(boxes=[(1, 2, 30, 40)]),
    ),
    "s4": ("A dog. [1,2,30,40] [5,6],[7,8],[9,10]", Answer(boxes=[(1, 2, 30, 40)])),
}


@pytest.mark.parametrize("task", WRITTEN)
def test_answers_of_crab_and_crab_plus_are_read(task):
    text, gold = WRITTEN[task]
    assert score(TASKS[task], [TASKS[task].parse(text)], [gold])["metric"] == 1
    written = "It is a dog. Its coordinates are <obj>(1,2)(30,40)</obj>."  # in rows of Crab+'s test
    assert TASKS["arig"].parse(written).boxes == [(1, 2, 30, 40)]


LENIENT = ("substring_released", "part_of_gold", "refined", "substring_of_gold")


def test_a_wrong_letter_is_wrong_and_options_are_named_as_their_authors_do():
    gold = Answer(choice="rain", choices=("dog", "rain"))
    bare = RELEASED["pave"].layout.adapt(TASKS["avqa_thu"])
    for text in ("A", "(A) rain", "C", "dog"):
        assert score(bare, [bare.parse(text)], [gold])["metric"] == 0
    assert bare.format_option(["dog", "rain"], 1) == "B"
    crema = RELEASED["crema"].layout.adapt(TASKS["nextqa"])
    assert crema.format_option(["dog", "rain"], 0) == "Option A"
    assert TASKS["nextqa"].format_option(["dog", "rain"], 0) == "<answer> dog</answer>"


# --- the authors' words -------------------------------------------------------------------------
SOURCES = {
    "crab_plus": (
        "dataset/qwen2_5_omni/omni_dataset.py",
        '''
class Loader:
    def add_ref_avs_samples(self):
        for sample in samples:
            description = sample["description"]
            text = f"""Look for <des>{description.lower()}</des>. Say "true" or "false"."""
            parts = []
            parts.append({"type": "text", "text": "An image and a sound:"})
            parts.append({"type": "image", "image": path})
            parts.append({"type": "text", "text": text})
            conv = [{"role": "system", "content": "Be a stand-in."},
                    {"role": "user", "content": parts}]
    def add_avqa_thu_samples(self):
        q = f"Answer: {question_text}, options:{multi_choice}"
        parts = [{"type": "text", "text": "A video:"}, {"type": "text", "text": q}]
''',
        {
            "ref_avs": 'Look for <des>{description}</des>. Say "true" or "false".',
            "avqa_thu": "Answer: {question}, options:{choices}",
        },
    ),
    "crab": (
        "dataset/unified_dataset.py",
        r"""
class Loader:
    def add_s4_task_samples(self):
        self.samples.append({
            "instruction": f"A film:\n<video_start><video><video_end>\nIts sound:\n<audio_start>"
            f"<audio><audio_end>\nShow it at the first second.",
        })
    def add_avqa_task_samples(self):
        instruction = f"A film:\n<video_start><video><video_end>\nAnswer, {question}"
        self.samples.append({"instruction": instruction})
class TestLoader:
    def add_s4_task_samples(self):
        self.samples.append({
            "instruction": f"A test:\n<video_start><video><video_end>\nShow it at the {th} second.",
        })
    def add_avqa_task_samples(self):
        self.samples.append({"instruction": f"Answer in a test, {question}"})
""",
        {"s4": "Show it at the {second} second.", "avqa": "Answer, {question}"},
    ),
    "pave": (
        "eval_pave_avqa.py",
        """
def load(path):
    log = "a line of " + path

class Data:
    def __init__(self):
        self.start_prompt = 'Choose the best of these.\\n'
        self.end_prompt = 'Write its letter alone.'
""",
        {"avqa_thu": "Choose the best of these.\n{question}\n{choices}Write its letter alone."},
    ),
    "crema": (
        "lavis/datasets/datasets/threedvqa_datasets.py",
        """
class Data:
    def __getitem__(self, index):
        if True:
            qa_input = self.text(ann['situation']) + '. Asked: ' + self.text(ann["question"]) + ' ?'
        else:
            qa_input = 'Asked in pretraining: ' + self.text(ann["question"])
""",
        {"sqa3d": "{situation}. Asked: {question} ?"},
    ),
}


@pytest.mark.parametrize("paper", SOURCES)
def test_the_words_are_read_from_the_authors_repository(paper, tmp_path):
    name, source, prompts = SOURCES[paper]
    with pytest.raises(
        DataError, match=f"git clone https://github.com/{RELEASED[paper].repository}"
    ):
        read_wording(paper, str(tmp_path))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(source)
    wording = read_wording(paper, str(tmp_path))
    assert wording.prompts == prompts
    if paper == "crab_plus":
        assert wording.system == "Be a stand-in."
        assert wording.leads == {"ref_avs": "An image and a sound:", "avqa_thu": "A video:"}
    if paper == "crab":
        assert wording.leads == {"video": "A film:\n", "audio": "Its sound:\n"}


def test_words_come_from_a_file_too_and_missing_ones_are_named(tmp_path):
    file = tmp_path / "words.json"
    file.write_text(json.dumps({"prompts": {"avqa": "Q: {question}"}}))
    assert read_wording("crema", str(file)).prompts == {"avqa": "Q: {question}"}
    assert "our own for sqa3d, nextqa" in missing_words("crema", {"avqa": "Q: {question}"})
    assert missing_words("pave", dict.fromkeys(RELEASED["pave"].tasks, "...")) == ""
    file.write_text('{"prompt": {}}')
    with pytest.raises(DataError, match="not a file of wording"):
        read_wording("crema", str(file))
    with pytest.raises(ModelError, match="layout of 'video_llama': none is known"):
        released_form("video_llama")
