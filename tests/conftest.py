import os

# Before torch and the hub libraries are imported: tests never reach out, and two cores are enough.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
