"""A process that reads batches and prints what it got: python read_all.py '{"folder": …, "rank": 0, …}'."""

import hashlib
import json
import logging
import sys
import time

from mcf.config import DataConfig
from mcf.data import reader
from mcf.data.loader import Loader
from mcf.errors import UserError

logging.basicConfig(level=logging.WARNING, format="%(message)s")
told = json.loads(sys.argv[1])
reader.PATIENCE = told.get("patience", reader.PATIENCE)
loader = Loader(
    DataConfig(path=told["folder"], streams=8, window=6, threads=1, prefetch=2, max_bad=told.get("max_bad", 0.5)),
    batch=16, micro_batch=4, seed=5, image_size=32, rank=told.get("rank", 0), world_size=told.get("world_size", 1),
    device="cpu", pauses=(0.01, 0.05),
)  # fmt: skip
began, found = time.monotonic(), []
try:
    for batch in loader:
        for position, key, image in zip(batch.positions.tolist(), batch.keys, batch.images):
            found.append((position, key, hashlib.sha256(image.numpy().tobytes()).hexdigest()[:12]))
        if len(found) >= told["samples"]:
            break
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.status)
loader.close()
bad = [[b.position, b.shard, b.key, b.reason, b.substitute] for b in loader.take_bad() if b.position <= found[-1][0]]
print(json.dumps({"found": found, "bad": bad, "seconds": time.monotonic() - began}))
