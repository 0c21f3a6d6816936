"""A run's numbers beside the published ones: `python infer.py --eval --compare paper`.

PUBLISHED holds what is known with its source; where a paper's number was not found there is none,
and the table stays empty there. A published number stands beside the score that counts as its
authors do, which is often the lenient one (evaluation/released_metrics.py). Training data, frames
and prompts of a run may differ from the paper's, so the table compares and does not prove.
"""

from dataclasses import dataclass

from crab_min.evaluation.report import Evaluation


@dataclass(frozen=True)
class Published:
    """A published number, in percent; a CIDEr of 1.5 is published as 150.

    Attributes:
        number: our key: "metric", one of a task's further numbers, or of its masks ("masks.miou").
        model: whose number it is.
    """

    task: str
    number: str
    value: float
    model: str
    source: str


NOTES = "Crab, 2503.13068, as quoted by papernotes"
TITOK = "a re-run of the released weights, TiTok's table 2"
TABLE_1, TABLE_2 = "CREMA, 2402.05889 v1, table 1", "CREMA, 2402.05889 v1, table 2"
TABLE_3, TABLE_4 = "CREMA, 2402.05889 v1, table 3", "CREMA, 2402.05889 v1, table 4"
README = "PAVE, 2503.19794, the authors' README"
V_LYNX = "PAVE, 2503.19794, as quoted by V-LynX"

# fmt: off
PUBLISHED = {
    "crab": (
        Published("ave",   "segment_accuracy_released", 80.15, "Crab", NOTES),
        Published("avqa",  "substring_released",        78.94, "Crab", NOTES),
        Published("arig",  "iou_at_50",                 41.78, "Crab", NOTES),
        Published("arig",  "auc",                       42.0,  "Crab", NOTES),
        Published("ms3",   "masks.miou",                58.21, "Crab", NOTES),
    ),
    "crab_plus": (
        Published("unav",  "miou",     50.7, "Crab+, full videos", TITOK),
        Published("unav",  "f1_at_30", 48.4, "Crab+, full videos", TITOK),
        Published("unav",  "f1_at_50", 36.7, "Crab+, full videos", TITOK),
        Published("unav",  "f1_at_70", 27.7, "Crab+, full videos", TITOK),
    ),
    "pave": (
        Published("avqa",     "gold_in_answer",  78.8,  "0.5B", README),
        Published("avqa",     "gold_in_answer",  82.3,  "7B",   README),
        Published("avqa_thu", "metric",          90.4,  "0.5B", README),
        Published("avqa_thu", "metric",          93.8,  "7B",   README),
        Published("avsd",     "cider_own_words", 134.5, "0.5B", README),
        Published("avsd",     "cider_own_words", 152.9, "7B",   README),
        Published("scanqa",   "metric",          23.1,  "0.5B", README),
        Published("scanqa",   "refined",         40.0,  "0.5B", README),
        Published("scanqa",   "metric",          29.1,  "7B",   README),
        Published("scanqa",   "refined",         48.5,  "7B",   README),
        Published("scanqa",   "cider_own_words",        84.2,  "0.5B", README),
        Published("scanqa",   "bleu_4_own_words",       13.1,  "0.5B", README),
        Published("scanqa",   "rouge_l_coco_own_words", 42.1,  "0.5B", README),
        Published("scanqa",   "cider_own_words",        103.4, "7B",   README),
        Published("scanqa",   "bleu_4_own_words",       16.0,  "7B",   README),
        Published("scanqa",   "rouge_l_coco_own_words", 49.0,  "7B",   README),
        Published("sqa3d",    "metric",          51.1,  "0.5B", README),
        Published("sqa3d",    "refined",         52.8,  "0.5B", README),
        Published("sqa3d",    "metric",          59.0,  "7B",   README),
        Published("sqa3d",    "refined",         61.4,  "7B",   README),
        Published("videomme", "metric",          46.0,  "0.5B", README),
        Published("videomme", "metric",          59.9,  "7B",   README),
        Published("mvbench",  "metric",          46.6,  "0.5B", README),
        Published("mvbench",  "metric",          58.0,  "7B",   README),
        Published("mlvu",     "metric",          51.6,  "0.5B", V_LYNX),
        Published("mlvu",     "metric",          67.0,  "7B",   V_LYNX),
        Published("egoexo",   "metric",          32.4,  "0.5B", V_LYNX),
        Published("egoexo",   "metric",          44.2,  "7B",   V_LYNX),
    ),
    "crema": (
        Published("sqa3d",  "substring_of_gold", 47.3, "3D, fine-tuned",          TABLE_1),
        Published("sqa3d",  "substring_of_gold", 51.8, "V, fine-tuned",           TABLE_1),
        Published("sqa3d",  "substring_of_gold", 52.1, "V,3D, fine-tuned",        TABLE_1),
        Published("sqa3d",  "substring_of_gold", 53.0, "V,3D,D, fine-tuned",      TABLE_1),
        Published("sqa3d",  "substring_of_gold", 52.7, "V,3D,D fused",            TABLE_1),
        Published("sqa3d",  "substring_of_gold", 39.6, "V, zero-shot",            TABLE_4),
        Published("sqa3d",  "substring_of_gold", 40.0, "V,3D, zero-shot",         TABLE_4),
        Published("sqa3d",  "substring_of_gold", 37.3, "3D, zero-shot",           TABLE_4),
        Published("avqa",   "part_of_gold",      68.0, "A, fine-tuned",           TABLE_2),
        Published("avqa",   "part_of_gold",      78.7, "V, fine-tuned",           TABLE_2),
        Published("avqa",   "part_of_gold",      79.4, "V,A, fine-tuned",         TABLE_2),
        Published("avqa",   "part_of_gold",      80.8, "V,A,F, fine-tuned",       TABLE_2),
        Published("avqa",   "part_of_gold",      80.6, "V,A,F fused",             TABLE_2),
        Published("avqa",   "part_of_gold",      51.0, "V, zero-shot",            TABLE_4),
        Published("avqa",   "part_of_gold",      52.6, "V,A, zero-shot",          TABLE_4),
        Published("avqa",   "part_of_gold",      31.0, "A, zero-shot",            TABLE_4),
        Published("nextqa", "metric",            71.6, "V, fine-tuned",           TABLE_3),
        Published("nextqa", "metric",            72.4, "V,F, fine-tuned",         TABLE_3),
        Published("nextqa", "metric",            72.8, "V,F,D, fine-tuned",       TABLE_3),
        Published("nextqa", "metric",            73.5, "V,F,D,N, fine-tuned",     TABLE_3),
        Published("nextqa", "metric",            73.0, "V,F,D,N fused",           TABLE_3),
    ),
}
# fmt: on


def comparison(evaluation: Evaluation, recipe: str) -> str:
    """Format a run's numbers beside the published ones of the paper of its recipe.

    A task without a published number has its own number alone.
    """
    lines = ["task      number                       ours  published"]
    for task, result in evaluation.scores.items():
        rows = [row for row in PUBLISHED.get(recipe, ()) if row.task == task]
        if not rows:
            lines.append(line_of(task, "metric", 100 * result["metric"], ""))
        for row in rows:
            ours = our_number(evaluation, row)
            published = f"{row.value:>9.2f}  {row.model} ({row.source})"
            lines.append(line_of(task, row.number, ours, published))
    return "\n".join(lines)


def line_of(task: str, number: str, ours: float | None, published: str) -> str:
    """Format one line; an unknown number stays empty."""
    value = "" if ours is None else f"{ours:.2f}"
    return f"{task:<9} {number:<25} {value:>7}  {published}".rstrip()


def our_number(evaluation: Evaluation, row: Published) -> float | None:
    """Return the number of a run that a published one stands beside; None without one."""
    if row.number.startswith("masks."):
        masks = evaluation.numbers.get("masks", {}).get(row.task, {})
        value = masks.get(row.number.removeprefix("masks."))
    else:
        result = evaluation.scores[row.task]
        value = (result["all"] | {"metric": result["metric"]}).get(row.number)
    return None if value is None else 100 * value
