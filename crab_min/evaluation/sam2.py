"""SAM2, the second stage of segmentation in Crab+ (2603.04128).

It turns a box and points into a mask. The LM answers with a box and three points for each object,
as text on the 224 x 224 grid. SAM2 (2408.00714) turns them into masks, zero-shot. It is the
unmodified model of transformers.

As in the released Crab+: every point is positive, SAM2 gives one mask for each object
(`multimask_output=False`), and the paper's checkpoint is SAM2.1 Hiera-L. What differs:

* Each object has its own box and points. There, one prompt of the first box and the last three
  points makes the mask; with two objects these belong to different ones.
* The image keeps its own size. There, it is resized to 224 x 224.
* Every object needs a box, and points are optional. There, S4 and MS3 need a point with the box or
  three points without one.
* An answer without an object gives an empty mask, which is scored. There, an invalid answer is left
  out of the mean.
* SAM2 runs in float32. There, under bf16 autocast.

Page of the course: docs/course/23_sam2.md.
"""

import numpy as np
import torch
from transformers import Sam2Model, Sam2Processor

from crab_min.answers import GRID, Answer
from crab_min.backbones.common import named_weights


def box_mask(answer: Answer, height: int, width: int) -> np.ndarray:
    """Return the filled boxes of an answer as a mask (height, width) bool.

    SAM2 is compared with it.
    """
    mask = np.zeros((height, width), bool)
    for x1, y1, x2, y2 in answer.boxes:
        # Every pixel that the box touches: the start is rounded down, the end up
        rows = slice(y1 * height // GRID, -(-y2 * height // GRID))
        columns = slice(x1 * width // GRID, -(-x2 * width // GRID))
        mask[rows, columns] = True
    return mask


class Sam2:
    """SAM2 with prompts on the 224 x 224 grid.

    Args:
        name: path or hub id of a SAM2 checkpoint.
        device: where it runs.

    Raises:
        ModelError: the checkpoint cannot be loaded.
    """

    DEFAULT = "facebook/sam2.1-hiera-large"

    def __init__(self, name: str = DEFAULT, device: torch.device | str = "cpu"):
        with named_weights("SAM2", name):
            self.processor = Sam2Processor.from_pretrained(name)
            self.model = Sam2Model.from_pretrained(name).eval().to(device)

    @torch.no_grad()
    def masks(self, image: np.ndarray, objects: list[tuple]) -> np.ndarray:
        """Return the mask of each object.

        Args:
            image: (H, W, 3) uint8, of any size.
            objects: (box, points) on the 224 x 224 grid, as `Answer.objects` gives them.

        Returns:
            (number of objects, H, W) bool.
        """
        height, width = image.shape[:2]
        masks = np.zeros((len(objects), height, width), bool)
        if not objects:
            return masks

        # The image is encoded once
        inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
        embeddings = self.model.get_image_embeddings(inputs["pixel_values"])
        sizes = inputs["original_sizes"]

        # From the grid to the pixels of the image; the outer lists are over images and objects
        scale = np.array([width / GRID, height / GRID])
        for i, (box, points) in enumerate(objects):
            corners = np.reshape(box, (2, 2)) * scale
            prompts: dict[str, list] = {"input_boxes": [[corners.flatten().tolist()]]}
            if points:
                positive = 1
                prompts["input_points"] = [[(np.array(points) * scale).tolist()]]
                prompts["input_labels"] = [[[positive] * len(points)]]
            inputs = self.processor(original_sizes=sizes, **prompts, return_tensors="pt")
            del inputs["original_sizes"]

            inputs = inputs.to(self.model.device)
            out = self.model(image_embeddings=embeddings, multimask_output=False, **inputs)
            [resized] = self.processor.post_process_masks(out.pred_masks, sizes)  # (1, 1, H, W)
            masks[i] = resized[0, 0].cpu().numpy()
        return masks
