"""The one place that knows MLflow.

sink.py      a queue and a thread: sends a run, and costs training nothing
run.py       which MLflow run a training run is: found again or made, and described
server.py    MLflow's addresses, and how it is made quiet
"""

from mcf.track.mlflow.sink import MLflowSink

__all__ = ["MLflowSink"]
