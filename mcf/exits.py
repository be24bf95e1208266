"""Exit statuses that mean something between a rank, the process that watches it, and the batch script around both.

Any other status than 0 is a failure that may be a machine's: under Slurm the run goes back to the queue.
"""

USER_ERROR = 2  # one line says what a user has to change: nothing gets better by trying again
UNAVAILABLE = 69  # other ranks cannot be reached: somebody may have to mend it, or the next start may (EX_UNAVAILABLE)
SAVED = 75  # told to stop, and saved: to be started again (EX_TEMPFAIL of sysexits.h)
RANK_LOST = 76  # another rank was dead or stuck (mcf.watchdog): its error line says which
INTERRUPTED = 130  # ctrl-C
