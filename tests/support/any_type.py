"""The tiny models of scripts/tiny.py, which coverage is measured with."""

import importlib.util
from pathlib import Path

_FILE = Path(__file__).parents[2] / "scripts" / "tiny.py"
_SPEC = importlib.util.spec_from_file_location("tiny_models_of_any_type", _FILE)
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
tiny, batch_of, types, TOKENS = _MODULE.tiny, _MODULE.batch_of, _MODULE.types, _MODULE.TOKENS
