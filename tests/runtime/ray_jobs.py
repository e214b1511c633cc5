"""What the workers of test_ray_pool.py do, importable by name."""

from __future__ import annotations

import os

from tempo_fast.errors import InputError


def make(shared):
    if shared == "no model":
        raise InputError("model.path: nothing there")
    seen = []

    def work(job):
        if job < 0:
            raise InputError(f"job {job} is bad")
        if shared == "dies once" and job == 3 and not os.path.exists(os.environ["RAY_TEST_MARK"]):
            open(os.environ["RAY_TEST_MARK"], "w").close()
            os._exit(1)
        seen.append(job)
        return job**2, os.getpid(), len(seen)

    return work
