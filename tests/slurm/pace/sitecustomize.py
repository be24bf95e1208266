"""Python reads this at its start, because the tests of Slurm put its folder on PYTHONPATH: it paces the trainer.

The real trainer takes milliseconds a step of a tiny model: too fast to be interrupted at a known place. Here each step
of a job's first start ends with a pause of MCF_TEST_PACE seconds, and the keys of its samples are written to
RUN/keys-RANK.jsonl. With MCF_TEST_DIES in the environment it does not even begin, with MCF_TEST_ABORTS it aborts where
it leaves the other ranks, at its end. Steps of mcf.finetune are paced alike.
"""

import os
import signal
import sys

if "mcf.train" in sys.orig_argv and "MCF_TEST_DIES" in os.environ:
    os.kill(os.getpid(), signal.SIGKILL)
elif "mcf.train" in sys.orig_argv and "MCF_TEST_PACE" in os.environ:
    import json
    import time
    from pathlib import Path

    import mcf
    from mcf import distributed
    from mcf.step import Step

    if "MCF_TEST_ABORTS" in os.environ:
        distributed.leave = os.abort

    _step = Step.__call__
    _run = Path(next(a for a in sys.orig_argv if a.startswith("run=")).removeprefix("run="))

    def _paced(self, step, batches, *rest):
        outcome = _step(self, step, batches, *rest)
        start = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        record = {"start": start, "step": step + 1, "keys": outcome.keys, "mcf": mcf.__file__}
        with (_run / f"keys-{os.environ['RANK']}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        if start == 0:
            time.sleep(float(os.environ["MCF_TEST_PACE"]))
        return outcome

    Step.__call__ = _paced
elif "mcf.finetune" in sys.orig_argv and "MCF_TEST_PACE" in os.environ:
    import time

    from mcf.engine import Engine

    _engine_step = Engine.step

    def _paced_step(self, *arguments, **more):
        time.sleep(float(os.environ["MCF_TEST_PACE"]))
        return _engine_step(self, *arguments, **more)

    Engine.step = _paced_step
