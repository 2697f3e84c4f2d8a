"""Keep every test off the network and the CPU threads from fighting; make `import families` work everywhere."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

from hypothesis import settings

# how long an example takes says something about the machine's load, nothing about the code
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
