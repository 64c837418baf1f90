import time
from collections import Counter
from itertools import pairwise

import pytest

from tamzoo.latency import time_in_turns


def test_ratios_are_to_the_first_program_and_every_round_runs_all():
    calls = []
    programs = {
        "base": lambda: (calls.append("base"), time.sleep(0.002)),
        "slow": lambda: (calls.append("slow"), time.sleep(0.006)),
    }
    base, slow = time_in_turns(programs, rounds=10, warmup=2)
    assert calls.count("base") == calls.count("slow") == 12
    assert base.ratio == base.ratio_low == base.ratio_high == 1.0
    assert slow.ratio == pytest.approx(3, rel=0.5) and slow.ratio_low <= slow.ratio <= slow.ratio_high
    assert slow.median_ms >= 6 and slow.rounds == 10


def test_no_program_follows_the_same_other_one_in_most_rounds():
    calls = []
    time_in_turns({name: lambda name=name: calls.append(name) for name in "abcd"}, rounds=400)
    before = Counter(before for before, name in pairwise(calls) if name == "a")
    assert max(before[name] for name in "bcd") < 400 * 0.45, before
