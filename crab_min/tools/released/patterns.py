"""Patterns of weight names, from which the tables of released names are made.

A table is a dict {released name: our name}. Both names may contain wildcards such as {n}, which
stand for the same text in both. DROPPED in place of our name says that crab_min has no use for the
weight. The first row that fits a name counts.
"""

import re

DROPPED = None

# regular expressions of what the wildcards stand for
WILDCARDS = {
    "n": r"\d+",  # number of a layer or of a module
    "i": r"\d+",  # number of a layer inside module {n}
    "head": r"\d+",  # number of an I-LoRA head; our name has no {head}, the heads become one matrix
    "modality": r"\w+",  # name of a modality, such as rgb
    "rest": r"\w+(?:\.\w+)*",  # one or more words with dots between them, such as self_attn.q_proj
    "path": r"|.+\.",  # a path with its last dot, or nothing
    "thinker": r"|thinker\.",  # this prefix, or nothing
}


def under(table: dict, released: str, ours: str) -> dict:
    """Return a table with a prefix before its released names and one before our names."""
    return {
        released + name: DROPPED if our_name is DROPPED else ours + our_name
        for name, our_name in table.items()
    }


def compile_pattern(name: str) -> re.Pattern:
    """Compile a name with wildcards; each wildcard becomes a group of that name."""
    expression = re.escape(name)
    for wildcard, meaning in WILDCARDS.items():
        placeholder = re.escape(f"{{{wildcard}}}")
        expression = expression.replace(placeholder, f"(?P<{wildcard}>{meaning})")
    return re.compile(expression)
