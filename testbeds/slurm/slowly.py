"""`python -m gmp_atl` with each update of a training stage taking three seconds longer."""

import runpy
import time

from gmp_atl.training import Trainer

update = Trainer._update


def slowly(trainer: Trainer) -> float:
    time.sleep(3)
    return update(trainer)


Trainer._update = slowly  # type: ignore[method-assign, assignment]
runpy.run_module("gmp_atl", run_name="__main__", alter_sys=True)
