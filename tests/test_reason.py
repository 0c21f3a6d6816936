"""Reasoned rows from labels: what passes the checks, what a server may do, and what is written."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from crab_min.data import read_samples
from crab_min.evaluation.figures import new_figure
from crab_min.model import ASSETS
from crab_min.tasks import TASKS
from crab_min.tools import check
from crab_min.tools.reason import asking, report, writers
from crab_min.tools.reason.__main__ import main
from crab_min.tools.reason.briefs import closing_words, example_sample, load_briefs, row_facts
from crab_min.tools.reason.examples import Example
from crab_min.tools.reason.verify import Rules, clean, verify
from crab_min.tools.statistics import SplitReport, draw_rows


def sample_of(task: str, **row):
    return example_sample(TASKS[task], Example(row, ""))


# --- verification ---------------------------------------------------------------------------------
BELL = {"event": "bell", "start_time": 2, "end_time": 8}
BELL_TAG = "So <event> bell, (2 8)</event>."
WHERE = {"question_text": "Where?", "multi_choice": ["left", "right", "nowhere"], "answer": 0}
BOX = {"a_obj": "bell", "label_content": "[9,9,40,40] [20,20],[21,21],[22,22]"}
BOX_END = "It is at [9,9,40,40] [20,20],[21,21],[22,22]."
REJECTED = [
    ("ave", BELL, "", "empty"),
    ("ave", BELL, "The bell is heard from 2 to 8.", "unparsed"),
    ("ave", BELL, "The bell is heard all along. So <event> bell, (2 9)</event>.", "wrong label"),
    ("ave", BELL, "The cat is heard all along. So <event> cat, (2 8)</event>.", "wrong label"),
    ("ave", BELL, f"The bell is heard. {BELL_TAG} I hope this helps.", "not last"),
    ("ave", BELL, f"The <b>bell</b> is heard. {BELL_TAG}", "markup"),
    ("ave", BELL, f"Bell. {BELL_TAG}", "too short"),
    ("ave", BELL, "Therefore, the event is <event> bell, (2 8)</event>.", "too short"),
    ("s4", BOX, BOX_END, "too short"),
    ("ave", BELL, f"{'A bell rings. ' * 50}{BELL_TAG}", "too long"),
    ("ave", BELL, f"The bell is heard from 3 to 9. {BELL_TAG}", "time"),
    ("ave", BELL, f"The bell is heard from two to 0:09. {BELL_TAG}", "time"),
    ("ave", BELL, f"The bell is heard, last at second 14. {BELL_TAG}", "time"),
    ("ave", BELL, f"The bell is heard, 3\u20139 s. {BELL_TAG}", "time"),
    ("ave", BELL, f"The bell is heard (1 4). {BELL_TAG}", "time"),
    ("ave", BELL, f"The bell is heard between 4 s and 12 s. {BELL_TAG}", "time"),
    ("ave", BELL, f"The bell at [1,2,3,4] is heard. {BELL_TAG}", "box"),
    ("ks", {"action": "ringing"}, "It rings from 2 to 14. So <answer> ringing</answer>.", "time"),
    ("avqa_thu", WHERE, "The thing is on the right. So <answer> left</answer>.", "other option"),
    ("avqa_thu", WHERE, "The answer is right. It barks. So <answer>left</answer>", "other option"),
    ("avqa_thu", WHERE, "It is there. So <answer> B</answer>.", "wrong label"),
    ("avqa_thu", WHERE, "It is so. So <answer>left</answer><answer>right</answer>", "unparsed"),
    ("a2v", {"correct_video": 2}, "Video one shows it. So <answer> two</answer>.", "other option"),
    ("meld", {"Emotion": "sad"}, "The face looks happy. So <answer> sad</answer>.", "other option"),
    ("meld", {"Emotion": "sad"}, "The label says he is sad. So <answer> sad</answer>.", "leak"),
    ("s4", BOX, "The bell rings. It is at [9,9,40,41] [20,20],[21,21],[22,22].", "wrong label"),
    ("s4", BOX, f"The bell rings at [1,1,2,2]. {BOX_END}", "wrong label"),
    ("ref_avs", {"description": "the bell", "output": "<answer>false</answer>"},
     "The bell is there. So <answer> true</answer> [9,9,40,40].", "wrong label"),
]  # fmt: skip
ACCEPTED = [
    ("ave", BELL, f"The bell is heard from 2 to 8. {BELL_TAG}"),
    ("ave", BELL, f"The bell rings from 0:03 to 0:05, in a clip of 10 seconds. {BELL_TAG}"),
    ("ave", BELL, "A bell is heard. The event is <event>Bell</event>, <range>2,8</range>."),
    ("avqa_thu", WHERE, "It is not on the right. So <answer> left</answer>."),
    ("avqa_thu", WHERE, "The right side is empty, the left is not. So <answer> left</answer>."),
    ("a2v", {"correct_video": 2}, "Only the second video shows one. So <answer>two</answer>."),
    ("meld", {"Emotion": "sad"}, "The face does not look happy. So <answer> Sad </answer>."),
    ("s4", BOX, f"The bell rings. {BOX_END}"),
    ("ref_avs", {"description": "the bell", "output": "<answer>false</answer>"},
     "No bell is in the image. So <answer> false</answer>."),
    ("unav", {"label_content": "<event> dog, (0 3)(6 9)</event> <event> cat, (5 10)</event>"},
     "The dog barks from 0 to 3 and from 6 to 9, the cat meows from 5 to 10. "
     "So <event> cat, (5 10)</event> <event> dog, (0 3)(6 9)</event>."),
]  # fmt: skip


@pytest.mark.parametrize("task, row, text, kind", REJECTED)
def test_a_text_that_contradicts_its_label_is_rejected(task, row, text, kind):
    rules = Rules(options=("happy", "sad") if task == "meld" else ())
    rejection = verify(sample_of(task, **row), text, rules, seconds=10.0)
    assert rejection and rejection.kind == kind and rejection.reason.endswith(".")


@pytest.mark.parametrize("task, row, text", ACCEPTED)
def test_a_text_that_agrees_with_its_label_passes(task, row, text):
    rules = Rules(options=("happy", "sad") if task == "meld" else ())
    assert verify(sample_of(task, **row), text, rules, seconds=10.0) is None


def test_two_events_may_not_exchange_their_times():
    label = "<event> dog, (0 3)</event> <event> cat, (5 10)</event>"
    sample = sample_of("unav", label_content=label)
    right = f"The dog barks from 0 to 3 and the cat meows from 5 to 10. So {label}."
    swapped = f"The dog barks from 5 to 10 and the cat meows from 0 to 3. So {label}."
    assert verify(sample, right) is None
    assert verify(sample, swapped).kind == "time"


def test_evidence_about_another_event_is_rejected():
    rules = Rules(options=("bell", "trumpet", "cat"))
    sample = sample_of("ave", event="trumpet", start_time=0, end_time=8)
    end = "So <event> trumpet, (0 8)</event>."
    wrong = verify(sample, f"The bell is seen, and it is heard from 2 to 8. {end}", rules)
    assert wrong.kind == "other option"
    assert verify(sample, f"The bell is silent, the trumpet is heard. {end}", rules) is None
    assert verify(sample, f"Brass catches the light and is heard. {end}", rules) is None


def test_thoughts_fences_line_breaks_and_more_examples_are_removed():
    reply = "<think>Is it a\nbell?</think>\n```\nThe bell rings.\nSo <event>bell</event>\n```"
    assert clean(reply) == "The bell rings. So <event>bell</event>"
    assert clean("<think>without an end") == ""
    assert clean("It rings. So it is.\n\nFacts:\n- a new example") == "It rings. So it is."


@pytest.mark.parametrize("brief", load_briefs().values(), ids=lambda brief: brief.task.name)
def test_the_worked_examples_pass_their_own_check(brief):
    assert 2 <= len(brief.examples) <= 3
    for example in brief.examples:
        sample = example_sample(brief.task, example)
        assert verify(sample, clean(example.text), seconds=10.0) is None
        assert example.text.endswith(closing_words(sample))
        # another row that is told with its words is a copy
        prompt = brief.fill(row_facts(sample, 10.0), closing_words(sample))
        assert prompt.count(example.text) == 1 and "{" not in prompt


def test_instructions_and_examples_may_not_come_back():
    brief = load_briefs()["ave"]
    sample = sample_of("ave", **BELL)
    rules = Rules(instructions=brief.instructions())
    words = "Write one to three plain sentences about the evidence"
    assert verify(sample, f"{words}. {BELL_TAG}", rules).kind == "leak"
    copied = "a bell is in the picture"
    assert verify(sample, f"A bell is in the picture. {BELL_TAG}", Rules()) is None
    rules = Rules(examples=frozenset([copied]))
    assert verify(sample, f"A bell is in the picture. {BELL_TAG}", rules).kind == "leak"


# --- a server of the OpenAI protocol --------------------------------------------------------------
class Stub(BaseHTTPRequestHandler):
    """A chat model that behaves as the first word of a row's event says."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.answer(200, json.dumps({"data": [{"id": "stub"}]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.guard:
            server.under_way += 1
            server.most_at_once = max(server.most_at_once, server.under_way)
        try:
            self.behave(body)
        finally:
            with server.guard:
                server.under_way -= 1

    def behave(self, body: dict):
        prompt = text_of(body["messages"][0]["content"])
        closing = re.findall(r"Closing words: (.+)", prompt)[-1:]
        event = re.search(r"<event> (\w+) bell,", closing[0]) if closing else None
        label = event[1] if event else "row"
        if not closing:
            label = "judge"
        with self.server.guard:
            self.server.bodies.append((label, body))
            self.server.asked[label] += 1
            number = self.server.asked[label]
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            return self.answer(401, "no such key")
        if label == "judge" and self.server.judge_is_down:
            return self.answer(500, "{}")
        if label == "judge":
            no = "noisy" in prompt
            return self.reply("No, it does not." if no else "Yes: the bell is named.")
        if label == "row":  # of another folder than that of make_rows
            return self.reply(f"This is what is seen and heard here. {closing[0]}")
        right = f"The {label} bell is seen and heard from 2 to 8. {closing[0]}"
        if number > 1 and label in ("slow", "busy", "down", "drops", "broken", "hangs"):
            return self.reply(right)
        if label == "slow":
            time.sleep(1.5)
        elif label == "hangs":
            self.server.hanging.set()
            time.sleep(60)
        elif label == "busy":
            return self.answer(429, "{}", retry="0.01")
        elif label in ("down", "dead") and not self.server.healed:
            return self.answer(500, "{}")
        elif label == "drops":
            return self.connection.close()
        elif label == "broken":
            return self.answer(200, "no JSON")
        elif label == "odd":
            return self.answer(200, '{"choices": []}')
        elif label == "empty":
            return self.reply("")
        elif label == "stubborn" or (label == "wrong" and number == 1):
            return self.reply("The bell is heard all the time. So <event> bell, (1 9)</event>.")
        elif label == "other" and number == 1:
            return self.reply("Answer: the bell, 2 to 8")
        self.reply(right)

    def reply(self, text: str):
        self.answer(200, json.dumps({"choices": [{"message": {"content": text}}]}))

    def answer(self, status: int, body: str, retry: str = ""):
        try:
            self.send_response(status)
            if retry:
                self.send_header("Retry-After", retry)
            self.end_headers()
            self.wfile.write(body.encode())
        except OSError:  # the client gave up
            pass


def text_of(content) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(writers, "FIRST_PAUSE", 0.01)
    monkeypatch.delenv(writers.KEY, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.guard, server.hanging = threading.Lock(), threading.Event()
    server.asked, server.bodies = Counter(), []
    server.under_way = server.most_at_once = 0
    server.healed, server.judge_is_down, server.key = False, False, ""
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def make_rows(folder: Path, world: Path, behaviours: list[str], tests: list[str] = ()) -> Path:
    """Write an AV-UIE folder with a row of AVE per behaviour."""
    video = str(sorted((world / "ave" / "video").glob("*.mp4"))[0].absolute())
    audio = str(sorted((world / "ave" / "audio").glob("*.wav"))[0].absolute())
    (folder / "ave").mkdir(parents=True)
    for split, names in (("train", behaviours), ("test", tests)):
        rows = []
        for name in names:
            event = {"event": f"{name} bell", "start_time": 2, "end_time": 8}
            rows.append({"video_path": video, "audio_path": audio, **event})
        if rows:
            (folder / "ave" / f"{split}.json").write_text(json.dumps(rows))
    return folder


def run(data: Path, out: Path, *flags: str) -> int:
    return main(["--data", str(data), "--out", str(out), *map(str, flags)])


def counts(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())["counts"]["ave"]


PASSING = ["right", "wrong", "other", "slow", "busy", "down", "drops", "broken"]


def test_a_server_may_answer_in_any_way(tmp_path, small_world, stub):
    behaviours = [*PASSING, "stubborn", "empty", "dead", "odd"]
    data = make_rows(tmp_path / "in", small_world, behaviours, tests=["secret"])
    flags = ["--llm", stub.url, "--timeout", "0.7", "--retries", "2", "--parallel", "3"]
    out = tmp_path / "out"
    assert run(data, out, *flags) == 0

    # as designed: eight verified, two rejected three times, two without a reply
    count = counts(out)
    assert (count["rows"], count["verified"]) == (12, 8)
    assert (count["label_only"], count["unanswered"]) == (2, 2)
    assert count["rejected"] == {"wrong label": 4, "unparsed": 1, "empty": 3}
    assert stub.asked["stubborn"] == stub.asked["empty"] == 3
    assert 2 <= stub.most_at_once <= 3

    # nothing lost, and nothing in that is not verified
    read = {}
    for sample in read_samples(out, ["ave"], "train"):
        read[sample.row["event"].split()[0]] = sample
    assert list(read) == behaviours
    for name, sample in read.items():
        label = sample.task.format(sample.gold)
        if name in PASSING:
            assert verify(sample, sample.target) is None and sample.target != label
        else:
            assert sample.target == label
        assert all(os.path.exists(part.path) for part in sample.media)
    labels = read_samples(out, ["ave"], "train", target="label")
    assert [s.target for s in labels] == [s.task.format(s.gold) for s in read.values()]

    # a rejected text is sent back with the reason
    (retry,) = [b for name, b in stub.bodies if name == "wrong"][1:]
    assert "closing words are not those" in retry["messages"][2]["content"]
    # test rows are copied and never asked about
    assert "secret" not in stub.asked and "secret" not in json.dumps([b for _, b in stub.bodies])
    assert read_samples(out, ["ave"], "test")[0].row["event"] == "secret bell"

    # the same command asks about the two without a reply, and about no other
    before, stub.healed = Counter(stub.asked), True
    assert run(data, out, *flags) == 0
    assert set((stub.asked - before).keys()) == {"dead", "odd"}
    assert counts(out)["verified"] == 9
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    verdicts = {row["row"]: row["verdict"].split(":")[0] for row in rows}
    assert Counter(verdicts.values())["verified"] == 9
    assert verdicts["ave/train/8"] == "wrong label" and verdicts["ave/train/11"] == "unanswered"
    assert all(len(row["prompt"]) == 12 and row["model"] == stub.url for row in rows)


def test_a_killed_run_continues_and_asks_about_no_answered_row_again(
    tmp_path, small_world, stub, capsys
):
    behaviours = ["right", "wrong", "hangs", "other"]
    data, out = make_rows(tmp_path / "in", small_world, behaviours), tmp_path / "out"
    flags = ["--llm", stub.url, "--parallel", "1"]
    command = [sys.executable, "-m", "crab_min.tools.reason", "--data", data, "--out", out, *flags]
    killed = subprocess.Popen(list(map(str, command)), cwd=Path(__file__).parents[1])
    assert stub.hanging.wait(120)
    assert run(data, out, *flags) == 2
    assert "in use by another process" in capsys.readouterr().err
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert stub.asked == {"right": 1, "wrong": 1, "hangs": 1}
    assert not (out / "ave").exists()

    # a line that was being written when the power failed
    with open(out / "replies.jsonl", "a") as file:
        file.write('{"row": "ave/train/3", "te')
    assert run(data, out, *flags) == 0
    assert stub.asked == {"right": 1, "wrong": 2, "hangs": 2, "other": 2}
    assert counts(out)["verified"] == 4


def test_a_sample_is_part_of_the_whole(tmp_path, small_world, stub):
    data = make_rows(tmp_path / "in", small_world, ["a", "b", "c", "d"])
    out = tmp_path / "out"
    assert run(data, out, "--llm", stub.url, "--sample", "2") == 0
    assert stub.asked.total() == 2 and not (out / "ave").exists()
    assert (out / "sheet.png").exists() and len((out / "rows.jsonl").read_text().splitlines()) == 2
    assert run(data, out, "--llm", stub.url) == 0
    assert stub.asked == {"a": 1, "b": 1, "c": 1, "d": 1}
    assert counts(out)["verified"] == 4


def test_a_judge_has_a_say_and_its_verdicts_are_kept(tmp_path, small_world, stub):
    data = make_rows(tmp_path / "in", small_world, ["right", "noisy"])
    out = tmp_path / "out"
    assert run(data, out, "--llm", stub.url, "--judge", stub.url, "--tries", "2") == 0
    count = counts(out)
    assert (count["verified"], count["label_only"]) == (1, 1)
    assert (count["judged"], count["judged_yes"]) == (3, 1)
    assert count["rejected"] == {"judge": 2}
    assert (out / "replies.jsonl").read_text().count('"judge": "no"') == 2


def test_without_the_judge_s_answer_nothing_gets_in(tmp_path, small_world, stub):
    data = make_rows(tmp_path / "in", small_world, ["right"])
    out, flags = tmp_path / "out", ["--retries", "0", "--llm", stub.url, "--judge", stub.url]
    stub.judge_is_down = True
    assert run(data, out, *flags) == 0
    assert (counts(out)["verified"], counts(out)["unanswered"]) == (0, 1)
    assert read_samples(out, ["ave"], "train")[0].target == "<event> right bell, (2 8)</event>"
    stub.judge_is_down = False
    assert run(data, out, *flags) == 0
    assert stub.asked["right"] == 1 and counts(out)["verified"] == 1


def test_a_text_for_another_label_is_not_taken_from_the_log(tmp_path, small_world, stub):
    data = make_rows(tmp_path / "in", small_world, ["right", "a"])
    out = tmp_path / "out"
    assert run(data, out, "--llm", stub.url) == 0
    file = data / "ave/train.json"
    file.write_text(file.read_text().replace('"end_time": 8', '"end_time": 7', 1))
    assert run(data, out, "--llm", stub.url) == 0
    # the stub says "from 2 to 8" whatever the label: the new one is never verified
    assert stub.asked == {"right": 4, "a": 1}
    assert (counts(out)["verified"], counts(out)["label_only"]) == (1, 1)

    # nothing is left to ask, so the server need not be there
    stub.shutdown()
    stub.server_close()
    assert run(data, out, "--llm", stub.url) == 0


def test_a_server_can_be_shown_the_clip_and_notes(tmp_path, small_world, stub):
    data = make_rows(tmp_path / "in", small_world, ["right"])
    clip = Path(json.loads((data / "ave/train.json").read_text())[0]["video_path"])
    notes = tmp_path / "notes.json"
    notes.write_text(json.dumps({clip.stem: "Somebody rings for dinner."}))
    assert run(data, tmp_path / "out", "--llm", stub.url, "--show-clip", "--notes", notes) == 0
    ((_, body),) = stub.bodies
    parts = body["messages"][0]["content"]
    kinds = [part["type"] for part in parts]
    assert kinds == ["text", *["image_url"] * 5, "text", "input_audio", "text"]
    assert "Somebody rings for dinner." in parts[-1]["text"]
    assert body["model"] == "stub"


def test_the_key_of_the_environment_is_sent(tmp_path, small_world, stub, monkeypatch, capsys):
    data = make_rows(tmp_path / "in", small_world, ["right"])
    stub.key = "sesame"
    assert run(data, tmp_path / "out", "--llm", f"{stub.url}#stub") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "401" in error and f"export {writers.KEY}=" in error
    monkeypatch.setenv(writers.KEY, "sesame")
    assert run(data, tmp_path / "out", "--llm", f"{stub.url}#stub") == 0


def test_a_dead_server_stops_the_run(tmp_path, small_world, stub, monkeypatch, capsys):
    monkeypatch.setattr(writers, "MAX_FAILURES", 3)
    data = make_rows(tmp_path / "in", small_world, ["right", *["dead"] * 6])
    flags = ["--llm", f"{stub.url}#m", "--retries", "0", "--parallel", "1"]
    assert run(data, tmp_path / "out", *flags) == 2
    assert "3 requests in a row" in capsys.readouterr().err
    stub.healed = True
    assert run(data, tmp_path / "out", *flags) == 0
    assert stub.asked["right"] == 1 and counts(tmp_path / "out")["verified"] == 7


# --- a model of transformers ----------------------------------------------------------------------
CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.fixture
def chat_model(tmp_path, monkeypatch) -> Path:
    """A tiny chat model with random weights."""
    monkeypatch.setattr(writers, "MAX_TOKENS", 8)
    tokenizer = AutoTokenizer.from_pretrained(next(ASSETS.rglob("tokenizer.json")).parent)
    tokenizer.chat_template, tokenizer.eos_token = CHAT, tokenizer.convert_ids_to_tokens(0)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)
    folder = tmp_path / "chat"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_babbles_changes_no_label(tmp_path, small_world, chat_model):
    data = make_rows(tmp_path / "in", small_world, ["a", "b", "c"])
    out = tmp_path / "out"
    assert run(data, out, "--llm", chat_model, "--batch-size", "2", "--tries", "2") == 0
    count = counts(out)
    assert (count["verified"], count["label_only"], count["texts"]) == (0, 3, 6)
    for sample in read_samples(out, ["ave"], "train"):
        assert sample.target == sample.task.format(sample.gold)


# --- the template, on all tasks -------------------------------------------------------------------
@pytest.mark.parametrize("where", ["small_world", "real_media"])
def test_the_template_is_verified_on_every_row(where, tmp_path, request, monkeypatch):
    monkeypatch.setattr(report, "SHEET_ROWS", 2)
    data = request.getfixturevalue(where)
    assert run(data, tmp_path / "out", "--llm", "template", "--rewrite") == 0
    count = json.loads((tmp_path / "out/report.json").read_text())["counts"]
    captions = count["avcap"]["rows"]
    assert count["all"]["verified"] == count["all"]["rows"] - captions > 0
    assert (tmp_path / "out/sheet.png").exists()

    # the new folder is read like the old one, for both targets and for the test
    tasks = [name for name in count if name != "all"]
    for target in ("reasoning", "label"):
        old = read_samples(data, tasks, "train", target)
        new = read_samples(tmp_path / "out", tasks, "train", target)
        assert len(old) == len(new) == count["all"]["rows"]
        for before, after in zip(old, new):
            assert before.gold == after.gold
            assert [p.path for p in before.media] == [p.path for p in after.media]
    before, after = read_samples(data, tasks, "test"), read_samples(tmp_path / "out", tasks, "test")
    assert [sample.gold for sample in before] == [sample.gold for sample in after]


def test_the_template_names_what_matches(tmp_path, small_world):
    assert run(small_world, tmp_path, "--llm", "template", "--rewrite", "--tasks", "a2v,v2a") == 0
    for task, one, other in (("a2v", "audio", "video"), ("v2a", "video", "audio")):
        samples = read_samples(tmp_path, [task], "train")
        for sample in samples:
            words = f"The {sample.row[f'{one}_event']} is in {other} {sample.gold.choice}."
            assert sample.target.startswith(words)
        assert samples


def test_a_server_writes_every_folder_of_real_rows_which_the_check_counts(
    tmp_path, real_media, stub, monkeypatch, capsys
):
    monkeypatch.setattr(report, "SHEET_ROWS", 2)
    out, figure = tmp_path / "out", tmp_path / "check.png"
    assert run(real_media, out, "--llm", stub.url, "--rewrite") == 0
    count = json.loads((out / "report.json").read_text())["counts"]
    captions = count["avcap"]["rows"]
    assert count["all"]["verified"] == count["all"]["rows"] - captions == stub.asked["row"] > 0

    files = ["--out", str(tmp_path / "check.json"), "--figure", str(figure)]
    assert check.main(["--data", str(out), "--headers", "--workers", "0", *files]) == 0
    splits = json.loads((tmp_path / "check.json").read_text())["tasks"]
    reasoned = sum(split["reasoned"] for name, split in splits.items() if name.endswith("/train"))
    assert reasoned == count["all"]["verified"] and figure.exists()


def test_rows_with_reasoning_without_media_and_without_a_label_are_not_asked(
    tmp_path, small_world, capsys
):
    data = make_rows(tmp_path / "in", small_world, ["a", "b", "c", "d"])
    file = data / "ave/train.json"
    rows = json.loads(file.read_text())
    rows[0]["label_content"] = "A bell is heard. So <event> a bell, (2 8)</event>."
    rows[1]["audio_path"] = "nowhere.wav"
    rows[2]["start_time"] = "early"
    file.write_text(json.dumps(rows))
    out = tmp_path / "out"
    assert run(data, out, "--llm", "template") == 0
    assert counts(out)["kept"] == {"reasoned already": 1, "missing media": 1, "bad row": 1}
    assert counts(out)["verified"] == 1
    written = json.loads((out / "ave/train.json").read_text())
    assert written[0]["label_content"] == rows[0]["label_content"] and len(written) == 4


def test_the_check_counts_reasoned_rows_and_draws_them(tmp_path, small_world, capsys):
    data = make_rows(tmp_path / "in", small_world, ["a", "b", "c"], tests=["d"])
    file = data / "ave/train.json"
    rows = json.loads(file.read_text())
    rows[0]["label_content"] = "A bell is heard. So <event> a bell, (2 8)</event>."
    rows[1]["label_content"] = "So the event is <event> b bell, (2 8)</event>."
    file.write_text(json.dumps(rows))
    files = ["--out", str(tmp_path / "check.json"), "--figure", str(tmp_path / "check.png")]
    assert check.main(["--data", str(data), "--headers", "--workers", "0", *files]) == 0
    split = json.loads((tmp_path / "check.json").read_text())["tasks"]["ave/train"]
    assert (split["rows"], split["reasoned"], split["words"]) == (3, 1, [5, 9, 10])
    assert "localisation: 3 training rows, 0.333 of them reasoned" in capsys.readouterr().out
    assert (tmp_path / "check.png").exists()

    axes = new_figure(4, 2).subplots()
    draw_rows(axes, ["ave/train"], [SplitReport(3, 0, {}, 0, reasoned=1)])
    assert [bar.get_width() for bar in axes.patches][:2] == [1, 2]


def test_a_log_that_was_cut_inside_a_character_goes_on(tmp_path):
    log = tmp_path / "replies.jsonl"
    line = (
        json.dumps(
            {"row": "ave/train/0", "prompt": "old", "text": "é"}, ensure_ascii=False
        ).encode()
        + b"\n"
    )
    log.write_bytes(line + line[: line.index("é".encode()) + 1])
    asking.Log(log, []).close()
    assert log.read_bytes() == line


# --- one line per mistake -------------------------------------------------------------------------
def test_mistakes_are_told_in_one_line(tmp_path, small_world, monkeypatch, capsys):
    monkeypatch.setattr(writers, "FIRST_PAUSE", 0.01)
    data = make_rows(tmp_path / "in", small_world, ["a"])
    brief, used = tmp_path / "briefs.json", tmp_path / "used"
    brief.write_text(json.dumps({"ave": {"text": "Write about {facts}."}}))
    unknown = tmp_path / "unknown.json"
    unknown.write_text(json.dumps({"avae": {"text": "{facts}{examples}{label}"}}))
    assert run(data, used, "--llm", "template") == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    capsys.readouterr()
    out = tmp_path / "out"
    template = ["--llm", "template"]
    mistakes = [
        (out, ["--llm", "http://127.0.0.1:9/v1", "--retries", "1"], "no list of models"),
        (out, ["--llm", tmp_path / "no-model"], "chat model"),
        (out, ["--llm", ASSETS], "chat model"),
        (out, [*template, "--tasks", "avae"], "unknown task 'avae'"),
        (out, [*template, "--tasks", "ks"], "no train.json in any of ks"),
        (out, [*template, "--briefs", brief], "needs {examples} {facts} {label}"),
        (out, [*template, "--briefs", unknown], "unknown task 'avae'"),
        (out, [*template, "--notes", brief], 'expected {"x.mp4"'),
        (out, [*template, "--show-clip"], "--show-clip needs a server"),
        (out, [*template, "--judge", "template"], "has no opinion"),
        (tmp_path / "other", template, "is not of this command"),
        (used, [*template, "--tries", "5"], "was begun with --tries 3, now 5"),
        (data / "ave", template, "lies in --data"),
    ]
    for folder, flags, text in mistakes:
        assert run(data, folder, *flags) == 2, flags
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(lines) == 1 and text in lines[0], (flags, lines)
