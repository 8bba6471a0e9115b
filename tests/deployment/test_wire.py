"""What travels: the same arrays come out, damage shows, and whatever bytes arrive, the worst is `Malformed`."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from fipa_jax.deployment import wire

RNG = np.random.default_rng(3)
ARRAYS = {
    "delta/Dense_0/kernel": RNG.normal(size=(3, 4)).astype(np.float32),
    "sketch/basis": RNG.normal(size=(12, 2)).astype(ml_dtypes.bfloat16),
    "sketch/eigenvalues": np.array([2.0, np.nan]),
    "sketch/report/converged": np.array(True),
    "num_examples": np.array(7, np.int32),
    "empty": np.zeros([0, 3], np.float16),
}
MESSAGE = wire.Message("upload", "ab" * 32, 5, 2, ARRAYS)
BLOB = wire.pack(MESSAGE)


def header_of(blob):
    length = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def with_header(header, data):
    """A blob with this header, and the digest that is right for it."""
    if isinstance(header, dict) and isinstance(header.get(wire.ABOUT), dict):
        header[wire.ABOUT].pop("sha256", None)
        header[wire.ABOUT]["sha256"] = wire._digest(header, [data])
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + data


def test_a_message_comes_out_as_it_went_in():
    got = wire.unpack(BLOB)
    assert got[:4] == MESSAGE[:4] and set(got.arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert got.arrays[name].dtype == array.dtype and got.arrays[name].shape == array.shape
        assert got.arrays[name].tobytes() == array.tobytes()


def test_the_bytes_do_not_depend_on_the_order_of_the_arrays_nor_on_how_they_lie_in_memory():
    turned = {name: np.array(array, order="F") for name, array in reversed(ARRAYS.items())}
    turned["sketch/eigenvalues"] = turned["sketch/eigenvalues"].astype(">f8")
    assert wire.pack(MESSAGE._replace(arrays=turned)) == BLOB


def test_arrays_lie_at_multiples_of_their_entries_and_are_not_copied():
    for array in wire.unpack(BLOB).arrays.values():
        assert (array.flags.aligned and not array.flags.writeable) or not array.size


def test_safetensors_reads_it():
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    arrays = {name: array for name, array in ARRAYS.items() if array.dtype != ml_dtypes.bfloat16}  # which it cannot
    got = safetensors.load(wire.pack(MESSAGE._replace(arrays=arrays)))
    assert {name: array.tobytes() for name, array in got.items()} == {n: a.tobytes() for n, a in arrays.items()}


def test_the_wire_needs_numpy_alone():
    code = "import sys; from fipa_jax.deployment import wire; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded and not {"jax", "flax", "ml_collections", "absl", "flwr"} & set(loaded)


def test_types_that_do_not_travel_are_refused():
    with pytest.raises(ValueError, match="complex128 do not travel"):
        wire.pack(MESSAGE._replace(arrays={"z": np.zeros(2, complex)}))


def test_a_fingerprint_tells_paths_types_shapes_and_frozen_values_apart():
    params = {"a": np.zeros([2, 3], np.float32), "b": np.zeros(3, np.float32)}
    frozen = {"c": np.ones(2, np.float32)}
    others = [
        wire.fingerprint({"a": params["a"]}),
        wire.fingerprint({"a": params["a"], "c": params["b"]}),
        wire.fingerprint(params | {"b": np.zeros(3)}),
        wire.fingerprint(params | {"a": np.zeros([3, 2], np.float32)}),
        wire.fingerprint(params, frozen),
        wire.fingerprint(params, {"c": np.array([1, 2], np.float32)}),
        wire.fingerprint(params),
    ]
    assert len(set(others)) == len(others)
    assert wire.fingerprint({name: array + 1 for name, array in reversed(params.items())}) == others[-1]


def test_another_kind_and_other_parameters_are_refused_in_words():
    assert wire.expect(BLOB, "upload", MESSAGE.fingerprint).client == 2
    with pytest.raises(wire.Malformed, match="of kind upload, needed broadcast"):
        wire.expect(BLOB, "broadcast", MESSAGE.fingerprint)
    with pytest.raises(wire.Malformed, match="other parameters"):
        wire.expect(BLOB, "upload", "cd" * 32)


def test_pairs_that_are_zero_stay_and_a_nan_travels():
    assert wire.kept_pairs(np.array([3.0, np.nan, 0.0, -1e-9, -0.0])).tolist() == [True, True, False, True, False]


def lies():
    """Headers that claim what is not so, their digests right."""
    header, data = header_of(BLOB)
    about, first = header[wire.ABOUT], "sketch/eigenvalues"

    def entry(**fields):
        return with_header(header | {first: header[first] | fields}, data)

    yield "another version", with_header(header | {wire.ABOUT: about | {"version": "0"}}, data)
    yield "another format", with_header(header | {wire.ABOUT: about | {"format": "pt"}}, data)
    yield "another kind", with_header(header | {wire.ABOUT: about | {"kind": "pickle"}}, data)
    yield "a round in words", with_header(header | {wire.ABOUT: about | {"round": "soon"}}, data)
    yield "no fingerprint", with_header(header | {wire.ABOUT: {k: about[k] for k in about if k != "fingerprint"}}, data)
    yield "numbers about", with_header(header | {wire.ABOUT: about | {"round": 5}}, data)
    yield "nothing about", with_header({name: header[name] for name in header if name != wire.ABOUT}, data)
    yield "a terabyte", entry(shape=[2**37])
    yield "more than counts", entry(shape=[2**70])
    yield "a negative length", entry(shape=[-2])
    yield "a truth value", entry(shape=[True, 2])
    yield "a fraction", entry(shape=[2.0])
    yield "many axes", entry(shape=[1] * 40 + [2])
    yield "words", entry(shape="2")
    yield "an unknown type", entry(dtype="F8_E4M3")
    yield "a type that is a list", entry(dtype=["F64"])
    yield "a place beyond the end", entry(data_offsets=[0, 10**6])
    yield "a place that overlaps", entry(data_offsets=[8, 24])
    yield "half a place", entry(data_offsets=[0])
    yield "another field", entry(more=1)
    yield "no entry", with_header(header | {first: None}, data)
    yield "a list", with_header([1, 2], data)
    yield "too much data", with_header(header, data + b"\0" * 16)
    yield "too little", with_header(header, data[:-1])
    twice = json.dumps(header).encode()[:-1] + b', "num_examples": {}}'
    yield "a name twice", len(twice).to_bytes(8, "little") + twice + data
    deep = b"[" * 100_000
    yield "a deep one", len(deep).to_bytes(8, "little") + deep
    yield "not a number", (3).to_bytes(8, "little") + b"NaN"
    yield "no text", (4).to_bytes(8, "little") + b"\xff\xfe{}"
    yield "a header that is longer than all", (2**63).to_bytes(8, "little") + data
    yield "a long number", (9000).to_bytes(8, "little") + b"9" * 9000
    yield "empty", b""


@pytest.mark.parametrize(("lie", "blob"), [pytest.param(*one, id=one[0]) for one in lies()])
def test_a_lying_header_is_malformed(lie, blob):
    with pytest.raises(wire.Malformed):
        wire.unpack(blob)


def test_20_000_damaged_messages_are_malformed_and_nothing_else():
    """Cut, prolonged, with bits turned, bytes anew, parts moved, numbers of the header changed: never read as sound."""
    rng, whole = np.random.default_rng(0), np.frombuffer(BLOB, np.uint8)
    digits = np.flatnonzero((whole >= ord("0")) & (whole <= ord("9")))
    refused = 0
    for trial in range(20_000):
        blob = whole.copy()
        at, other = rng.integers(len(blob), size=2)
        match trial % 6:
            case 0:
                blob[at] ^= 1 << rng.integers(8)
            case 1:
                blob = blob[:at]
            case 2:
                blob[at : at + 9] = rng.integers(256, size=len(blob[at : at + 9]))
            case 3:
                blob = np.concatenate([blob[:at], rng.integers(256, size=5).astype(np.uint8), blob[at:]])
            case 4:
                blob[rng.choice(digits)] = rng.integers(ord("0"), ord("9") + 1)
            case 5:
                length = min(16, len(blob) - max(at, other))
                blob[at : at + length] = whole[other : other + length]
        if blob.tobytes() == BLOB:
            refused += 1
            continue
        try:
            wire.unpack(blob.tobytes())
        except wire.Malformed:
            refused += 1
    assert refused == 20_000


def test_headers_of_random_claims_take_no_more_than_the_bytes_at_hand():
    """Their digests right, so that every claim is looked at: refused, or arrays that fill the bytes."""
    rng, (header, data) = np.random.default_rng(1), header_of(BLOB)
    names = [name for name in header if name != wire.ABOUT]
    claims = [0, 1, -1, 2, 7, 2**31, 2**62, 2**64, 1.5, True, None, "", "F32", "BF16", [], [0], [8, 0], [2**40], {}]
    read = 0
    for _ in range(3_000):
        name, field = rng.choice(names), rng.choice(["dtype", "shape", "data_offsets"])
        claim = claims[rng.integers(len(claims))]
        if rng.integers(2) and field != "dtype":
            claim = [claims[i] for i in rng.integers(len(claims), size=rng.integers(4))]
        try:
            arrays = wire.unpack(with_header(header | {name: header[name] | {field: claim}}, data)).arrays
        except wire.Malformed:
            continue
        read += 1
        assert sum(array.nbytes for array in arrays.values()) == len(data)
    assert 0 < read < 3_000  # some claims are as good as what was there
