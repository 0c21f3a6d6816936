"""TODO."""
import numpy as np
import torch
from safetensors import SafetensorError
from transformers import Sam2Model, Sam2Processor

from crab_min.answers import GRID, Answer
from crab_min.model import missing_weights


def box_mask(answer: Answer, height: int, width: int) -> np.ndarray:
    """The boxes of an answer, filled (H, W) bool."""
    mask = np.zeros((height, width), bool)
    for x1, y1, x2, y2 in answer.boxes:
        mask[y1 * height // GRID:-(-y2 * height // GRID), x1 * width // GRID:-(-x2 * width // GRID)] = True
    return mask


class Sam2:
    """An answer's boxes and points -> a mask of the image's own size, by SAM2 (2408.00714) as transformers has it.

    name: path or hub id of any SAM2 checkpoint. Raises ModelError. As in Crab+ (papers/crab.md 2.6) points are all positive and one mask is
    taken. What differs: each object has its own box and points (there the first box and the last three points), the image comes in its own size
    (there squashed to 224 x 224), a box without points counts in all tasks, an answer without a box is an empty mask (there it is left out).
    """
    DEFAULT = "facebook/sam2.1-hiera-large"            # the paper's

    def __init__(self, name: str = DEFAULT):
        try:
            self.processor, self.model = Sam2Processor.from_pretrained(name), Sam2Model.from_pretrained(name).eval()
        except (OSError, ValueError, SafetensorError) as error:
            raise missing_weights("SAM2", name, error) from error
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.no_grad()
    def masks(self, image: np.ndarray, objects: list[tuple]) -> np.ndarray:
        """A mask (n, H, W) bool for each of the objects (box, points), on the 224 x 224 grid, of an image (H, W, 3); it is encoded once."""
        h, w = image.shape[:2]
        scale, found, embedded = np.array([w / GRID, h / GRID]), np.zeros((len(objects), h, w), bool), None
        for count in sorted({len(points) for _, points in objects}):                             # together where nothing needs padding
            which = [i for i, (_, points) in enumerate(objects) if len(points) == count]
            boxes = [(np.reshape(objects[i][0], (2, 2)) * scale).flatten().tolist() for i in which]
            points = [(np.reshape(objects[i][1], (-1, 2)) * scale).tolist() for i in which]
            said = {"input_points": [points], "input_labels": [[[1] * count for _ in which]]} if count else {}
            x = self.processor(images=image, input_boxes=[boxes], **said, return_tensors="pt").to(self.model.device)
            embedded = self.model.get_image_embeddings(x["pixel_values"]) if embedded is None else embedded
            out = self.model(image_embeddings=embedded, **{name: x[name] for name in ("input_boxes", *said)}, multimask_output=False)
            found[which] = self.processor.post_process_masks(out.pred_masks, x["original_sizes"])[0][:, 0].cpu().numpy()
        return found

    def mask(self, image: np.ndarray, answer: Answer) -> np.ndarray:
        """The mask (H, W) bool of all objects of an answer; empty where it has none."""
        return self.masks(image, answer.objects()).any(0)
