"""KFP components, one a file: thin, kfp at the top, the package inside the body."""

import json
import os
from pathlib import Path


def image_of(step: str) -> str:
    """The image that runs `prepare`, `train`, `export` or `evaluate`; fixed when a component is compiled.

    What `make build-images` recorded in build/images.json (or the file that DYNAMIC_TRANSFORMERS_IMAGES
    names): by digest once it has been pushed, else by tag.
    """
    default = Path(__file__).parents[1] / "build" / "images.json"
    record = Path(os.environ.get("DYNAMIC_TRANSFORMERS_IMAGES", default))
    if not record.is_file():
        return f"dynamic-transformers-{step}:0.1.0"
    entry = json.loads(record.read_text())[step]
    return entry["digest"] or entry["image"]
