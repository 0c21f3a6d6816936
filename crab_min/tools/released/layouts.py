"""The forms in which released models are asked: a PromptLayout per paper, and their limits.

A row holds facts alone: order, separators, tokens around media, the form of options, seconds per
pair of frames, limits, bare answers. The words (system text, lead-ins, instructions) are their
authors': wording.py reads them from a file, or from the authors' repository on this machine.

    paper       around a medium                  before the question   answers
    crab        lead-in by kind, start and end   line break            reasoning, then a tag
    crab_plus   one lead-in before all           nothing               reasoning, then a tag
    pave        nothing                          line break            bare
    crema       "Frame t: " of each frame        nothing               bare

Read in the data sets and evaluation scripts of the four repositories that the rows name.
"""

from dataclasses import dataclass, field, replace

from crab_min.backbones.load import LLAMA_CHAT
from crab_min.backbones.omni import QWEN_CHAT
from crab_min.errors import ModelError
from crab_min.interface import PromptLayout
from crab_min.tasks import TASKS


@dataclass(frozen=True)
class ReleasedForm:
    """How the released models of a paper are asked.

    Attributes:
        repository: of the authors' code, which has the words.
        limit: answer tokens at most.
        limits: of tasks with another limit, by name.
        tasks: whose questions the authors word; the other tasks keep our words.
        prompts: instructions that are slots alone, without a word of the authors.
    """

    layout: PromptLayout
    repository: str
    limit: int
    tasks: tuple[str, ...]
    limits: dict[str, int] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)

    def token_limits(self) -> dict[str, int]:
        """Return the maximum number of answer tokens of every task."""
        return {name: self.limits.get(name, self.limit) for name in TASKS}


CRAB = ReleasedForm(
    PromptLayout(
        LLAMA_CHAT[0],
        " [/INST]",
        system=LLAMA_CHAT[4],
        paper="crab",
        medium="{lead}{medium}\n",
        instruction="{instruction}",
        marks={kind: [f"<{kind}_start>", f"<{kind}_end>"] for kind in ("image", "video", "audio")},
        clip_frames={"s4": 5, "ms3": 5, "avss": 10, "ref_avs": 10},
        lower_slots=("description",),
        joined=True,
    ),
    repository="GeWu-Lab/Crab",
    limit=500,
    limits=dict.fromkeys(("s4", "ms3", "avss", "ref_avs"), 100),
    tasks=("avqa", "ave", "avvp", "s4", "ms3", "avss", "ref_avs", "arig", "avcap"),
)
CRAB_PLUS = ReleasedForm(
    replace(
        QWEN_CHAT,
        paper="crab_plus",
        separate_media=False,
        medium="{medium}",
        instruction="{instruction}",
        # a list of Python, as its repr writes it
        options="[{options}]",
        option="{text!r}",
        between_options=", ",
        lower_slots=("description",),
        seconds_per_grid=2.0,
    ),
    repository="GeWu-Lab/Crab_Plus",
    limit=512,
    tasks=tuple(name for name, task in TASKS.items() if task.v2),
)
PAVE = ReleasedForm(
    replace(
        QWEN_CHAT,
        paper="pave",
        medium="{medium}",
        instruction="\n{instruction}",
        option="{letter}.{text}\n",
        between_options="",
        dialogue_turns=True,
        bare_answers=True,
        option_name="{letter}",
    ),
    repository="dragonlzm/PAVE",
    limit=1024,
    limits={"videomme": 16},
    tasks=("avqa_thu", "egoexo", "videomme", "mvbench", "mlvu"),
    prompts={"avqa": "{question}", "scanqa": "{question}", "sqa3d": "{situation} {question}"},
)
CREMA = ReleasedForm(
    PromptLayout(
        after="</s>",
        paper="crema",
        medium="{medium}",
        instruction="{instruction}",
        option="Option {letter}: {text}",
        between_options=" ",
        plain_tasks=("avqa", "sqa3d"),
        sound="opening",
        text_tokens=77,
        bare_answers=True,
        option_name="Option {letter}",
        beams=5,
    ),
    repository="Yui010206/CREMA",
    limit=30,
    limits={"avqa": 10, "sqa3d": 40},
    tasks=("avqa", "sqa3d", "nextqa"),
)
RELEASED = {
    "crab": CRAB,
    "crab-pretrain": CRAB,
    "crab_plus": CRAB_PLUS,
    "pave": PAVE,
    "crema": CREMA,
}


def released_form(paper: str) -> ReleasedForm:
    """Return the form of a paper. Raises ModelError: a paper without one."""
    if paper not in RELEASED:
        raise ModelError(f"layout of {paper!r}: none is known; expected {', '.join(RELEASED)}")
    return RELEASED[paper]
