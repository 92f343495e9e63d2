"""KFP components, one a file: thin, kfp at the top, the package inside the body."""

import json
import os
from pathlib import Path

from dynamic_transformers import __version__

# What `make build-images` records of each image, and the pipeline names them by.
IMAGES = Path(
    os.environ.get("DYNAMIC_TRANSFORMERS_IMAGES", Path(__file__).parents[1] / "build" / "images.json")
)


def image_of(step: str) -> str:
    """The image that runs `prepare`, `train`, `export` or `evaluate`; fixed when a component is compiled.

    By digest once it has been pushed, else by tag.
    """
    if not IMAGES.is_file():
        return f"dynamic-transformers-{step}:{__version__}"
    entry = json.loads(IMAGES.read_text())[step]
    return entry["digest"] or entry["image"]
