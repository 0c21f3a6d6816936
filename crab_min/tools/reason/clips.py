"""The clip of a row as parts of the OpenAI protocol, for a model that sees and hears."""

import base64
import io
import wave

import numpy as np
from PIL import Image

from crab_min.answers import GRID
from crab_min.data import SAMPLE_RATE, Sample, load_media
from crab_min.interface import PromptPart

FRAMES = 5  # of a video, spread over its length


def clip_parts(sample: Sample) -> list[dict]:
    """Return the media of a row as parts of a message, each after its marker.

    Raises:
        MediaError: a file cannot be read.
    """
    parts = []
    for medium, part in zip(sample.task.media, sample.media):
        parts.append({"type": "text", "text": f"{medium.marker}:"})
        parts += medium_parts(part)
    return parts


def medium_parts(part: PromptPart) -> list[dict]:
    """Return frames as JPEG, or the sound that the task uses as WAV."""
    arrays, _ = load_media(part, GRID)
    if part.kind == "audio":
        sound = {"data": encode_wav(np.concatenate(arrays)), "format": "wav"}
        return [{"type": "input_audio", "input_audio": sound}]
    chosen = np.linspace(0, len(arrays) - 1, min(FRAMES, len(arrays))).round().astype(int)
    urls = [f"data:image/jpeg;base64,{encode_jpeg(arrays[index])}" for index in chosen]
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


def encode_jpeg(frame: np.ndarray) -> str:
    """Encode a frame (H, W, 3) uint8 in base64."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def encode_wav(samples: np.ndarray) -> str:
    """Encode a wave (N,) float32 at 16 kHz in base64."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(SAMPLE_RATE)
        sound.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return base64.b64encode(file.getvalue()).decode()
