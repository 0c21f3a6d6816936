"""Rows that are asked about, checked, asked again, and logged.

    log = Log(path, jobs)                what was answered before a run was stopped
    ask_all(jobs, writer, judge, log)    up to `tries` texts for each row

Every reply is appended to replies.jsonl as soon as it is there, so that a run that was killed asks
for no reply twice.
"""

import json
import os
import re
from functools import partial
from pathlib import Path

from tqdm import tqdm

from crab_min.tools.reason.clips import clip_parts
from crab_min.tools.reason.rows import Attempt, Job
from crab_min.tools.reason.verify import Rejection, clean, split_text, verify
from crab_min.tools.reason.writers import Message, Reply, Writer


# --- the log --------------------------------------------------------------------------------------
class Log:
    """replies.jsonl: one line per reply, and one per verdict of the judge.

    The jobs are given their attempts of an earlier run: texts that were written for the same
    prompt. They are checked again.
    """

    def __init__(self, path: Path, jobs: list[Job]):
        # what stands after the last line break was being written when a run was killed
        content = path.read_bytes() if path.exists() else b""
        *lines, torn = content.split(b"\n")
        if torn:
            os.truncate(path, len(content) - len(torn))
        of_row = {job.sample.id: job for job in jobs}
        for line in map(json.loads, lines):
            job = of_row.get(line["row"])
            if job is None or job.prompt_hash != line["prompt"]:
                continue
            if "text" in line:
                job.attempts.append(attempt(job, line["text"]))
            else:
                job.attempts[-1].judge = line["judge"]
        self.file = open(path, "a", encoding="utf-8")

    def reply(self, job: Job, model: str) -> None:
        """Append the last attempt of a job."""
        last = job.attempts[-1]
        rejection = last.rejection or Rejection("", "")
        fault = {"kind": rejection.kind, "reason": rejection.reason}
        self.write(job, model, {"try": len(job.attempts), **fault, "text": last.text})

    def verdict(self, job: Job, model: str) -> None:
        """Append what the judge thinks of the last attempt of a job."""
        self.write(job, model, {"judge": job.attempts[-1].judge})

    def write(self, job: Job, model: str, fields: dict) -> None:
        """Append a line about a job."""
        line = {"row": job.sample.id, "prompt": job.prompt_hash, "model": model, **fields}
        self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def attempt(job: Job, text: str) -> Attempt:
    """Check a text about a row."""
    return Attempt(text, verify(job.sample, text, job.rules, job.seconds))


# --- asking ---------------------------------------------------------------------------------------
def conversation(job: Job, with_clip: bool) -> list[Message]:
    """Return the conversation about a row: its prompt, and after a rejection why.

    Args:
        with_clip: put frames and sound before the prompt, for a model that sees and hears.
    """
    content = job.prompt
    if with_clip:
        content = [*clip_parts(job.sample), {"type": "text", "text": job.prompt}]
    messages = [{"role": "user", "content": content}]
    if job.attempts:
        last = job.attempts[-1]
        reason = last.fault.reason
        retry = f"This cannot be used. {reason} Write the whole text again, and nothing else."
        messages.append({"role": "assistant", "content": last.text or "(nothing)"})
        messages.append({"role": "user", "content": retry})
    return messages


JUDGE = """\
A question about a clip, a description of the clip, and an answer.

Question: {question}
Description: {evidence}
Answer: {label}

Does the answer follow from the description? Begin with yes or no, then say why in one sentence."""


def question_for_judge(job: Job) -> list[Message]:
    """Return the conversation that asks whether a text supports its label."""
    evidence, _ = split_text(job.sample, job.attempts[-1].text)
    text = JUDGE.format(
        question=job.sample.parts[-1].text.strip(),
        evidence=evidence,
        label=job.sample.task.format(job.sample.gold),
    )
    return [{"role": "user", "content": text}]


def ask_all(
    jobs: list[Job],
    writer: Writer,
    judge: Writer | None,
    log: Log,
    tries: int = 3,
    with_clip: bool = False,
) -> None:
    """Ask about all rows; those whose text is rejected again, with the reason.

    Args:
        tries: texts per row at most.
        with_clip: show the clip, to a model that sees and hears.

    Raises:
        ModelError: the model cannot be asked; what was answered before is in the log.
    """
    for number in range(tries):
        # the rows whose turn it is; after an interruption some are further than others
        asked = [job for job in jobs if len(job.attempts) == number and not job.passed]
        answered = writer.replies(asked, partial(conversation, with_clip=with_clip))
        for job, reply in tqdm(answered, f"texts, try {number + 1}", len(asked), unit="row"):
            record(job, reply, log, writer.name)
        if judge is not None:
            ask_judge(jobs, judge, log)


def record(job: Job, reply: Reply, log: Log, model: str) -> None:
    """Check a reply and append it to the job and to the log; without one keep the error."""
    job.error = reply.error
    if reply.error:
        return
    job.attempts.append(attempt(job, clean(reply.text)))
    log.reply(job, model)


def ask_judge(jobs: list[Job], judge: Writer, log: Log) -> None:
    """Ask for a second opinion on every text that passed the checks and has none yet."""
    unjudged = [job for job in jobs if job.passed and not job.verified]
    for job, reply in judge.replies(unjudged, question_for_judge):
        job.error = reply.error
        if not reply.error:
            opinion = re.match(r"\W*(yes|no)\b", clean(reply.text).lower())
            job.attempts[-1].judge = opinion[1] if opinion else "unclear"
            log.verdict(job, judge.name)
