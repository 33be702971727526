"""How the threads of an operation wait for each other. Imported before torch, which loads the OpenMP library.

GNU's OpenMP lets a thread that waits spin for milliseconds. Where another program uses a core, a spinning thread takes
the core that the thread it waits for needs: two threads beside one other training took 17 times as long, beside a busy
loop 2.5 times. Spinning 1,000 times costs nothing measurable on idle cores, and limits both to 1.8 times
(docs/benchmarks.md).
"""

import os

SPINS = "1000"

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPINS
