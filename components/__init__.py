"""KFP components, one a file: thin, kfp at the top, the package inside the body."""

import os

# Fixed when a component is compiled; the images of `make build-images` are given through these.
BASE_IMAGE = os.environ.get("DYNAMIC_TRANSFORMERS_IMAGE", "dynamic-transformers:0.1.0")
