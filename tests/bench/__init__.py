"""Benchmarks against TRL's GRPOTrainer, and the study of GRPO and NPO. Run a module: `python -m tests.bench.NAME`."""

import os

# A trainer of TRL reports its use over the network when it is made; benchmarks need no network. Before its import.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
