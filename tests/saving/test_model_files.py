"""The files of a run's models have names that any disk takes, each its own."""

import itertools

from fipa_jax.saving.model_files import LONGEST, stems

NAMES = (
    "fipa",
    "Fipa",
    "fipa:server.lr=0.5",
    "fipa:server.lr-0.5",
    "fipa server.lr=0.5",
    "fedavg/../../etc",
    "x" * 300,
    "x" * 299 + "y",
    "Größe" * 60,
    "ß=1",
)


def test_every_method_has_files_of_its_own():
    for number in (1, 2, 3, len(NAMES)):
        for names in itertools.combinations(NAMES, number):
            found = stems(names)
            assert len({stem.lower() for stem in found.values()}) == len(names)
            for stem in found.values():
                assert len(f"{stem}.msgpack".encode()) < LONGEST + 20 and "/" not in stem


def test_plain_names_stay_as_they_are():
    assert stems(["warmup", "fipa", "fedavg:server.lr=0.3"]) == {
        "warmup": "warmup",
        "fipa": "fipa",
        "fedavg:server.lr=0.3": "fedavg_server.lr-0.3",
    }
