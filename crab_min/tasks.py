"""TODO."""
from dataclasses import dataclass

from crab_min.answers import Answer, format_answer, gold_answer, parse_answer

VIDEO, AUDIO = ("video", ("video_path",), "video"), ("audio", ("audio_path",), "audio")       # kind, fields, subfolder


IMAGE, SOUND = ("image", ("image_path", "visual_path"), ""), ("audio", ("audio_path",), "")   # visual_path: test rows


@dataclass(frozen=True)
class Task:
    """One dataset: a folder of AV-UIE v2, or a source of v1, of PAVE (2503.19794) or of CREMA (2402.05889)."""
    name: str
    family: str                                        # one of the paper's seven tasks
    ask: str                                           # the instruction, with the placeholders of `slots`
    target: str                                        # the field that holds the text of a training row
    gold: tuple                                        # how the label of a row is read: a key of GOLDS, its fields
    gold_train: tuple = ()                             # the same for training rows, where they differ
    parser: str = "choice"                             # a key of PARSERS
    metric: str = "accuracy"                           # a key of metrics.METRICS
    sets: tuple = ()                                   # numbers of a whole set beside it: keys of metrics.SETS
    media: tuple = (VIDEO, AUDIO)                      # in the order of the prompt
    frames: int = 10                                   # of each video
    audio: str = "tenths"                              # audio window
    slots: tuple = ()                                  # (placeholder, accepted fields)
    options: tuple = ()                                # the only answers there are, in canonical form
    types: tuple = ()                                  # fields that name the type of a question, scored apart too
    splits: tuple = ("train", "test")
    v2: bool = True                                    # a folder of AV-UIE v2; else of v1, PAVE or CREMA alone

    def parse(self, text: str) -> Answer:
        return parse_answer(self, text)

    def format(self, answer: Answer) -> str:
        return format_answer(self, answer)

    def gold_answer(self, row: dict, split: str = "test") -> Answer:
        return gold_answer(self, row, split)


TWO_VIDEOS = ("video", ("video1_path",), "video"), ("video", ("video2_path",), "video")


TWO_AUDIOS = ("audio", ("audio1_path",), "audio"), ("audio", ("audio2_path",), "audio")


QUESTION = "question", ("question", "question_text")


IN_TEXT, IN_MASK = ("target", "label_content"), ("boxes", "gold_boxes")


EMOTION = "Which emotion does the person show?"


FACE = dict(frames=4, audio="first4", sets=("by_class",))


TASKS = {task.name: task for task in (
    Task("a2v", "matching", "Which video goes with the audio, one or two?", "label", ("choice", "correct_video"),
         media=(AUDIO, *TWO_VIDEOS), options=("one", "two")),
    Task("v2a", "matching", "Which audio goes with the video, one or two?", "label", ("choice", "correct_audio"),
         media=(VIDEO, *TWO_AUDIOS), options=("one", "two")),
    Task("ks", "action", "What is being done?", "label", ("choice", "action")),
    Task("ucf", "action", "Which action is shown?", "new_label", ("choice", "label")),
    Task("meld", "emotion", EMOTION, "label", ("choice", "Emotion"), **FACE),
    Task("mer24", "emotion", EMOTION, "label", ("choice", "discrete"), **FACE, splits=("train",)),
    Task("cremad", "emotion", EMOTION, "label", ("choice", "emotion"), **FACE),
    Task("mafw", "emotion", EMOTION, "label", ("choice", "emotion"), **FACE),
    Task("dfew", "emotion", EMOTION, "label", ("choice", "emotion"), **FACE),
    Task("avqa", "qa", "Question: {question}", "label", ("choice", "answer"), audio="spread", slots=(QUESTION,),
         types=("type",), sets=("substring_released", "part_of_gold")),
    Task("avqa_thu", "qa", "Question: {question} Options: {choices}", "label", ("option", "answer", "multi_choice"),
         slots=(QUESTION, ("choices", ("multi_choice",))), types=("question_relation", "question_type")),
    Task("ave", "localisation", "Which event is both seen and heard, and when?", "label_content",
         ("event", "event", "start_time", "end_time"), parser="event", metric="segments"),
    Task("unav", "localisation", "Which events happen, and when?", "label_content", IN_TEXT,
         parser="events", metric="event_f", splits=("train",)),
    Task("avvp", "localisation", "Which events are seen, which are heard, and when?", "label_content",
         ("av_events", "event"), parser="av_events", metric="av_event_f"),
    Task("s4", "segmentation", "Which thing sounds? Give its box and three points.", "label_content", IN_MASK, IN_TEXT,
         parser="boxes", metric="first_box", media=(IMAGE, SOUND), audio="fifth"),
    Task("ms3", "segmentation", "Which things sound? Give a box and three points for each.", "label_content", IN_MASK,
         IN_TEXT, parser="boxes", metric="all_boxes", media=(IMAGE, SOUND), audio="fifth"),
    Task("ref_avs", "segmentation", "Is {description} in the image? If true, give its box and three points.", "output",
         IN_MASK, ("target", "output"), parser="exists", metric="exists_box", media=(IMAGE, SOUND), audio="tenth",
         slots=(("description", ("description", "object")),), options=("true", "false")),
    Task("arig", "segmentation", "Which thing sounds? Give its box.", "label_content",
         ("corners", "top_left", "bottom_right"), IN_TEXT, parser="box", metric="first_box", media=(IMAGE, SOUND),
         audio="fifths"),
    Task("avcap", "captioning", "Say what is seen and heard.", "label_content", ("text", "label_content"),
         parser="text", metric="rouge_l", sets=("cider",), splits=("train",)),
    Task("avss", "segmentation", "Which things sound? Give a box and three points for each.", "label_content", IN_MASK,
         IN_TEXT, parser="boxes", metric="all_boxes", media=(IMAGE, SOUND), audio="tenth", v2=False),
    Task("audiocaps", "captioning", "Say what is heard.", "label_content", ("text", "label_content"), parser="text",
         metric="rouge_l", sets=("cider",), media=(SOUND,), v2=False),
    Task("lvis", "segmentation", "Where is the {name}? Give its box.", "label_content", IN_MASK, parser="box",
         metric="first_box", media=(IMAGE,), slots=(("name", ("name",)),), v2=False),
    Task("avsd", "qa", "Answer the last question of the dialogue. {dialogue}", "answer", ("text", "answer"), parser="text",
         metric="rouge_l", sets=("cider",), slots=(("dialogue", ("dialogue",)),), v2=False),
    Task("scanqa", "qa", "Answer in a few words: {question}", "answer", ("texts", "answers"), parser="text",
         metric="exact_match", sets=("refined",), media=(VIDEO,), slots=(QUESTION,), v2=False),
    Task("sqa3d", "qa", "Answer in a few words: {situation} {question}", "answer", ("texts", "answers"), parser="text",
         metric="exact_match", sets=("refined", "substring_of_gold"), media=(VIDEO,),
         slots=(("situation", ("situation",)), QUESTION), types=("type",), v2=False),
    Task("nextqa", "qa", "Question: {question} Options: {choices}", "label", ("option", "answer", "multi_choice"),
         media=(VIDEO,), slots=(QUESTION, ("choices", ("multi_choice",))), types=("type",), v2=False),
)}
