"""Names of files beside an adapter's config and weights. Importing them loads no torch."""

MODULES_FILE = "modules.json"
POOLING_FILE = "1_Pooling/config.json"
MODEL_CONFIG_FILE = "config.json"
COMPANION_FILES = (MODULES_FILE, POOLING_FILE, MODEL_CONFIG_FILE)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def is_pickle_name(name: str) -> bool:
    return name.lower().endswith(_PICKLE_SUFFIXES)
