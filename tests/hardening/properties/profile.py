"""How many cases a property is tried on, and counting them."""

import functools
import os
import random
from collections import Counter
from collections.abc import Callable

from hypothesis import HealthCheck, Phase, given, seed, settings

FUZZ = os.environ.get("MOSLD_FUZZ") == "1"
TIMES = int(os.environ.get("MOSLD_FUZZ_TIMES", "20")) if FUZZ else 1
SEED = int(os.environ.get("MOSLD_FUZZ_SEED") or random.SystemRandom().randrange(2**32)) if FUZZ else 0

settings.register_profile(
    "same",
    derandomize=not FUZZ,
    deadline=None,  # the machine may be busy
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],  # not explain, which traces every line
    print_blob=True,
)
tried: Counter[str] = Counter()  # test -> cases


def cases(count: int, **strategies) -> Callable:
    """The decorated test is a property, tried on `count` cases drawn from `strategies`, when fuzzing on many more."""

    def decorate(test: Callable) -> Callable:
        name = f"{test.__module__.rpartition('.')[2]}::{test.__name__}"

        @functools.wraps(test)
        def counted(*args, **kwargs):
            tried[name] += 1
            return test(*args, **kwargs)

        own = settings(settings.get_profile("same"), max_examples=count * TIMES)
        decorated = own(given(**strategies)(counted))
        return seed(SEED)(decorated) if FUZZ else decorated

    return decorate
