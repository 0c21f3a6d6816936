"""Chat models that write the texts: one of transformers, or one behind a server.

    writer = Server("http://127.0.0.1:8000/v1#qwen", parallel=8, timeout=120.0, retries=5)
    for job, reply in writer.replies(jobs, make_conversation): ...

A conversation is made when its turn comes, so that of 200,000 prompts only those under way are in
memory. Replies come in any order. A reply without text says why there is none; its row is asked
again when the same command is given again. What cannot get better by itself (a wrong key, an
unknown model, a server that is not there) is a ModelError.
"""

import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from crab_min.backbones.common import load_pretrained, named_weights
from crab_min.devices import choose_device
from crab_min.errors import MediaError, ModelError
from crab_min.tools.reason.rows import Job

# {"role": "user" or "assistant", "content": a text, or parts of the OpenAI protocol}
Message = dict
KEY = "OPENAI_API_KEY"  # environment variable with the key of a server
MAX_TOKENS = 400  # of a reply
MAX_FAILURES = 10  # requests in a row without a reply, after which a run stops
FIRST_PAUSE = 1.0  # seconds before a request is sent again; they double each time
LONGEST_PAUSE = 60.0  # seconds
TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)  # states of a server that pass


@dataclass(frozen=True)
class Reply:
    """A model's text, or the reason why there is none."""

    text: str = ""
    error: str = ""


class Writer(Protocol):
    """Anything that continues conversations."""

    name: str

    def replies(
        self, jobs: list[Job], make_conversation: Callable[[Job], list[Message]]
    ) -> Iterator[tuple[Job, Reply]]: ...


# --- a server -------------------------------------------------------------------------------------
class Server:
    """A chat model behind the OpenAI protocol; tried against a stub alone.

    Args:
        address: http://HOST/v1#MODEL; without #MODEL the first model that the server lists.
        parallel: requests at once.
        timeout: seconds until a request without an answer is given up.
        retries: how often a request is sent again after a passing fault.
    """

    def __init__(self, address: str, parallel: int, timeout: float, retries: int):
        self.url, _, self.model = address.rstrip("/").partition("#")
        self.parallel, self.timeout, self.retries = parallel, timeout, retries
        self.name = address
        self.stopped = threading.Event()

    def replies(
        self, jobs: list[Job], make_conversation: Callable[[Job], list[Message]]
    ) -> Iterator[tuple[Job, Reply]]:
        """Yield the jobs with their replies, as they come.

        Raises:
            ModelError: the server refuses the request itself, or does not answer at all.
        """
        if not jobs:  # the server need not even be there
            return
        self.model = self.model or self.first_model()
        waiting = iter(jobs)
        failures = 0
        pool = ThreadPoolExecutor(self.parallel)
        try:
            # a window of requests is under way; each one that is answered lets in the next
            under_way = {}
            for job in islice(waiting, self.parallel):
                under_way[pool.submit(self.ask, job, make_conversation)] = job
            while under_way:
                answered, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for done in answered:
                    job, reply = under_way.pop(done), done.result()
                    failures = failures + 1 if reply.error else 0
                    if failures >= MAX_FAILURES:
                        raise ModelError(
                            f"{self.url}: {failures} requests in a row without an answer (the "
                            f"last: {reply.error}); the same command continues when it works again"
                        )
                    yield job, reply
                for following in islice(waiting, len(answered)):
                    under_way[pool.submit(self.ask, following, make_conversation)] = following
        finally:
            self.stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            self.stopped.clear()

    def ask(self, job: Job, make_conversation: Callable[[Job], list[Message]]) -> Reply:
        """Continue one conversation."""
        try:
            body = {
                "model": self.model,
                "messages": make_conversation(job),
                "temperature": 0,
                "max_tokens": MAX_TOKENS,
            }
            answer = self.send("/chat/completions", body)
            return Reply(str(answer["choices"][0]["message"]["content"] or ""))
        except (ConnectionError, MediaError, KeyError, IndexError, TypeError) as error:
            return Reply(error=f"{type(error).__name__}: {error}")

    def first_model(self) -> str:
        """Return the first model that the server lists. Raises ModelError."""
        try:
            return self.send("/models", None)["data"][0]["id"]
        except (ConnectionError, KeyError, IndexError, TypeError) as error:
            raise ModelError(
                f"{self.url}: no list of models ({error}); is it running, and does its address end "
                "with /v1? Name the model as http://HOST/v1#MODEL"
            ) from None

    def send(self, path: str, body: dict | None) -> dict:
        """Send a request until it is answered, and return the JSON of the answer.

        Raises:
            ModelError: the server refuses it; sending it again would not help.
            ConnectionError: no answer after all retries.
        """
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        data = None if body is None else json.dumps(body).encode()
        fault = ""
        for attempt in range(self.retries + 1):
            pause = FIRST_PAUSE * 2**attempt * random.uniform(0.75, 1.25)
            try:
                request = urllib.request.Request(self.url + path, data, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                if error.code not in TRANSIENT:
                    raise ModelError(self.refusal(error)) from None
                fault = f"HTTP {error.code}"
                pause = seconds_to_wait(error) or pause
            # refused, dropped or slow connections, and answers that are no JSON
            except (OSError, http.client.HTTPException, ValueError) as error:
                fault = f"{type(error).__name__}: {error}"
            if attempt == self.retries or self.stopped.wait(min(pause, LONGEST_PAUSE)):
                break
        raise ConnectionError(fault)

    def refusal(self, error: urllib.error.HTTPError) -> str:
        """Return one line about a refused request."""
        said = error.read(300).decode("utf-8", "replace")
        cures = {
            401: f"set the key: export {KEY}=...",
            403: f"set another key: export {KEY}=...",
            404: "the address must end with /v1, and #MODEL must be a model of the server",
        }
        cure = cures.get(error.code, "see what the server says")
        return f"{self.url}: HTTP {error.code} ({said.strip() or error.reason}); {cure}"


def seconds_to_wait(error: urllib.error.HTTPError) -> float:
    """Return what the server asks for in Retry-After, in seconds; 0 without it."""
    try:
        return float(error.headers.get("Retry-After", 0))
    except ValueError:  # a date
        return 0.0


# --- a model of transformers ----------------------------------------------------------------------
class LocalModel:
    """A chat model of transformers, by path or hub id, that answers in batches.

    Args:
        batch_size: conversations at once.
        load_in_4bit: load it with bitsandbytes.
    """

    def __init__(self, name: str, batch_size: int, load_in_4bit: bool):
        self.name, self.batch_size = name, batch_size
        with named_weights("chat model", name):
            self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
            self.model = load_pretrained(AutoModelForCausalLM, name, load_in_4bit, ["lm_head"])
        if not self.tokenizer.chat_template:
            raise ModelError(f"{name}: has no chat template; name a model that was tuned to chat")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        device = choose_device()
        if not load_in_4bit:
            self.model = self.model.to(device)
        if device.type == "cpu":
            self.model = self.model.float()

    def replies(
        self, jobs: list[Job], make_conversation: Callable[[Job], list[Message]]
    ) -> Iterator[tuple[Job, Reply]]:
        """Yield the jobs with their replies, batch by batch, the likeliest token first."""
        waiting = iter(jobs)
        while batch := list(islice(waiting, self.batch_size)):
            texts = self.continue_all([make_conversation(job) for job in batch])
            for job, text in zip(batch, texts):
                yield job, Reply(text)

    def continue_all(self, conversations: list[list[Message]]) -> list[str]:
        """Return the continuation of each conversation."""
        ids = self.tokenizer.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                **ids,
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        new = output[:, ids["input_ids"].shape[1] :]  # (B, length of the longest reply)
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)
