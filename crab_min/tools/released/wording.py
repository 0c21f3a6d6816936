"""The words in which released models were trained: the authors' own, read where they are.

    wording = read_wording("crab_plus", "Crab_Plus/")    # a clone of the authors' repository
    wording = read_wording("crab_plus", "wording.json")  # or a file

A file is {"system": TEXT, "leads": {NAME: TEXT}, "prompts": {TASK: TEXT}}; any key may be missing.
A lead-in is named after its task, or for Crab after the kind of medium that it stands before. A
prompt has the placeholders of its task, such as {question}, and of masks {second}.

A repository is read without running it: the strings are taken from the syntax tree of the loaders,
and what they format in becomes a placeholder.
"""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from crab_min.errors import DataError
from crab_min.interface import PromptLayout, check_prompts
from crab_min.tasks import TASKS
from crab_min.tools.released.layouts import released_form

# variables and fields of the authors' loaders -> our placeholders
PLACEHOLDERS = {
    "question": "question",
    "question_text": "question",
    "situation": "situation",
    "multi_choice": "choices",
    "description": "description",
    "object": "description",
    "exp": "description",
    "th": "second",
    "mapping": "second",
}


@dataclass
class Wording:
    """The words of a paper: system text, lead-ins, and instructions by task."""

    system: str = ""
    leads: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)

    def put_into(self, layout: PromptLayout) -> PromptLayout:
        """Return a layout with this system text and these lead-ins."""
        if self.system and layout.system:
            before = layout.before.replace(layout.system, self.system)
            layout = replace(layout, before=before, system=self.system)
        return replace(layout, leads={**layout.leads, **self.leads})


def read_wording(paper: str, path: str) -> Wording:
    """Read the words of a paper from a file, or from the authors' repository.

    Raises:
        DataError: neither is there, or nothing of the paper is in it.
    """
    if Path(path).is_file():
        try:
            wording = Wording(**json.loads(Path(path).read_text(encoding="utf-8")))
            check_prompts(wording.prompts)
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path}: not a file of wording ({error})") from None
        return wording

    repository = released_form(paper).repository
    read, names = REPOSITORIES[repository]
    wording = Wording()
    try:
        for name in names:
            file = Path(path, name)
            if file.is_file():
                read(ast.parse(file.read_text(encoding="utf-8")), wording)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); clone {repository} again") from None
    if not wording.prompts:
        raise DataError(
            f"--prompts-from {path}: no words of {repository} there ({', '.join(names)}); give its "
            f"clone (git clone https://github.com/{repository}), or a .json file of wording"
        )
    check_prompts(wording.prompts)
    return wording


def missing_words(paper: str, prompts: dict[str, str]) -> str:
    """Return a line that says which words are missing and where they are; "" for none.

    Raises:
        ModelError: no such paper.
    """
    form = released_form(paper)
    missing = [name for name in form.tasks if name not in prompts]
    if not missing:
        return ""
    return (
        f"wording: our own for {', '.join(missing)}, which the model has not learned; for that of "
        f"the authors git clone https://github.com/{form.repository} and give convert or fetch "
        "--prompts-from with that folder, or with a .json file"
    )


# --- strings of a syntax tree --------------------------------------------------------------------
def text_of(node: ast.AST, names: dict[str, ast.AST]) -> str | None:
    """Return the text that an expression makes, with placeholders; None if it is no text.

    Args:
        names: what the variables of the function hold.
    """
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value, names) or "" for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        texts = [text_of(side, names) for side in (node.left, node.right)]
        return None if None in texts else "".join(texts)
    variable = ast.unparse(node)
    if variable in names:
        others = {name: value for name, value in names.items() if name != variable}
        return text_of(names[variable], others)
    # what is formatted in: a variable, a field of a row, or a call around one of them
    words = re.findall(r"\w+", variable)
    slots = [PLACEHOLDERS[word] for word in words if word in PLACEHOLDERS]
    return f"{{{slots[0]}}}" if slots else None


def functions_of(tree: ast.AST) -> Iterator[tuple[str, ast.AST, dict[str, ast.AST]]]:
    """Yield the functions of a module: name, tree, and the texts that its variables hold."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names = {}
            for statement in ast.walk(node):
                if isinstance(statement, ast.Assign) and is_text(statement.value):
                    names[ast.unparse(statement.targets[0])] = statement.value
            yield node.name, node, names


def is_text(node: ast.AST) -> bool:
    """Tell whether an expression is a text with words of its own."""
    constants = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
    is_joined = isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp))
    return is_joined and any(isinstance(value, str) and " " in value for value in constants)


def entries_of(node: ast.AST) -> Iterator[dict[str, ast.AST]]:
    """Yield the dicts that are written in a function, by their keys."""
    for entry in ast.walk(node):
        if isinstance(entry, ast.Dict):
            keys = [key.value for key in entry.keys if isinstance(key, ast.Constant)]
            if len(keys) == len(entry.values):
                yield dict(zip(keys, entry.values))


# --- the repositories ----------------------------------------------------------------------------
LOADER = re.compile(r"add_(\w+?)(?:_task)?_samples")  # of Crab and Crab+, a function per task


def read_crab_plus(tree: ast.AST, wording: Wording) -> None:
    """Read Crab+'s loaders: a conversation each, whose first text is the lead-in."""
    for name, function, names in functions_of(tree):
        match = LOADER.fullmatch(name)
        if not match or match[1] not in TASKS or match[1] in wording.prompts:
            continue
        texts = []
        for entry in entries_of(function):
            if "text" in entry:
                texts.append((entry["text"].lineno, text_of(entry["text"], names)))
            elif "role" in entry and text_of(entry["role"], {}) == "system":
                wording.system = text_of(entry["content"], names) or ""
        (_, lead), *_, (_, instruction) = sorted(texts)
        wording.leads[match[1]] = lead
        wording.prompts[match[1]] = instruction


MARKED = re.compile(r"([^<>]*)<(video|image|audio)_start><\w+><\w+_end>")


def read_crab(tree: ast.AST, wording: Wording) -> None:
    """Read Crab's loaders: lead-ins between the tokens of media, then the instruction."""
    for name, function, names in functions_of(tree):
        match = LOADER.fullmatch(name)
        if not match or match[1] not in TASKS:
            continue
        written = [entry["instruction"] for entry in entries_of(function) if "instruction" in entry]
        for text in [text_of(node, names) or "" for node in written]:
            for lead, kind in MARKED.findall(text):
                wording.leads.setdefault(kind, lead.lstrip("\n"))
            instruction = MARKED.sub("", text).strip("\n")
            # The words of training, which come first. Those of S4 name the first second alone, on
            # which it is trained; those of its test have the second of each frame.
            known = wording.prompts.get(match[1], "")
            names_more = "{second}" in instruction and "{second}" not in known
            if instruction and (not known or names_more):
                wording.prompts[match[1]] = instruction


def read_pave(tree: ast.AST, wording: Wording) -> None:
    """Read PAVE's evaluation of AVQA: what stands before and after the question and options."""
    for _, _, names in functions_of(tree):
        if "self.start_prompt" in names and "self.end_prompt" in names:
            before = text_of(names["self.start_prompt"], {})
            after = text_of(names["self.end_prompt"], {})
            wording.prompts["avqa_thu"] = f"{before}{{question}}\n{{choices}}{after}"


def read_crema(tree: ast.AST, wording: Wording) -> None:
    """Read CREMA's data sets: the text that becomes qa_input."""
    inputs = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    inputs = [node for node in inputs if "qa_input" in ast.unparse(node.targets[0])]
    # the first one of a file is that of the task; those after it are of pretraining
    for node in sorted(inputs, key=lambda node: node.lineno):
        text = text_of(node.value, {}) or ""
        if "{question}" in text:
            wording.prompts["sqa3d" if "{situation}" in text else "avqa"] = text
            return


# repository -> its reader, and the files that it reads
REPOSITORIES = {
    "GeWu-Lab/Crab": (read_crab, ["dataset/unified_dataset.py"]),
    "GeWu-Lab/Crab_Plus": (read_crab_plus, ["dataset/qwen2_5_omni/omni_dataset.py"]),
    "dragonlzm/PAVE": (read_pave, ["eval_pave_avqa.py"]),
    "Yui010206/CREMA": (
        read_crema,
        [
            "lavis/datasets/datasets/music_avqa_datasets.py",
            "lavis/datasets/datasets/threedvqa_datasets.py",
        ],
    ),
}
