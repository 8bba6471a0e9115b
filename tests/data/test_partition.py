"""Properties of the splits: nobody shares an example, sizes and skew are as promised, a seed is a split."""

import json
import pickle

import numpy as np
import pytest

from fipa_jax.data import partition as splits

NUM_CLASSES, NUM_CLIENTS = 10, 20
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(NUM_CLASSES), 203))  # 2030: T does not divide N
RULES = sorted(set(splits.PARTITIONS) - {"file"})  # those that draw


def split(name, alpha=0.5, seed=0, labels=LABELS, num_clients=NUM_CLIENTS, **kwargs):
    kwargs = {"shards_per_client": 2, **kwargs}
    return splits.partition(name, labels, num_clients, seed, alpha=alpha, **kwargs)


def skew(name, alpha, **kwargs):
    return splits.heterogeneity(splits.class_counts(split(name, alpha, **kwargs), LABELS, NUM_CLASSES))


@pytest.mark.parametrize("alpha", [100.0, 0.5, 0.1])
@pytest.mark.parametrize("name", RULES)
def test_clients_are_disjoint_sorted_and_nonempty(name, alpha):
    clients = split(name, alpha)
    assert len(clients) == NUM_CLIENTS
    assert all(len(client) and np.all(np.diff(client) > 0) for client in clients)
    owned = np.concatenate(clients)
    assert len(np.unique(owned)) == len(owned)
    assert owned.min() >= 0 and owned.max() < len(LABELS)
    # Equal sizes cost the remainder of N / T; every other rule gives every example away.
    assert len(owned) == len(LABELS) - (len(LABELS) % NUM_CLIENTS if name == "dirichlet" else 0)


@pytest.mark.parametrize("name", RULES)
def test_the_seed_is_the_split(name):
    first, again, other = split(name, seed=3), split(name, seed=3), split(name, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("alpha", [10.0, 0.1, 1e-3])
def test_balanced_dirichlet_has_equal_sizes_however_skewed(alpha):
    assert {len(client) for client in split("dirichlet", alpha)} == {len(LABELS) // NUM_CLIENTS}


def test_balanced_dirichlet_draws_the_proportions_of_its_concentration():
    # While no class runs out, E[sum_k p_k^2] = (alpha + 1) / (alpha K + 1) for p ~ Dir(alpha 1_K). Many small clients
    # of a large set: the first half of them, in the order of their draws.
    labels = np.repeat(np.arange(NUM_CLASSES), 40_000)
    clients = split("dirichlet", 0.5, labels=labels, num_clients=2000)[:1000]
    counts = splits.class_counts(clients, labels, NUM_CLASSES)
    size = counts.sum(axis=1)
    pairs = (counts * (counts - 1)).sum(axis=1) / (size * (size - 1))  # unbiased for sum_k p_k^2
    assert abs(pairs.mean() - 1.5 / 6) < 0.02


def test_dirichlet_by_class_is_ragged():
    sizes = [len(client) for client in split("dirichlet_by_class", 0.5)]
    assert max(sizes) > 1.5 * min(sizes)
    fair = [len(client) for client in splits.dirichlet_by_class(np.random.default_rng(0), LABELS, NUM_CLIENTS, 0.5, 40)]
    assert min(fair) >= 40


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet_by_class"])
def test_smaller_alpha_is_more_heterogeneous(name):
    even, mild, harsh = (skew(name, alpha) for alpha in (100.0, 1.0, 0.1))
    assert even["label_entropy"] > mild["label_entropy"] > harsh["label_entropy"]
    assert even["total_variation"] < mild["total_variation"] < harsh["total_variation"]


@pytest.mark.parametrize("shards_per_client", [1, 2])
def test_shards_bound_the_classes_of_a_client(shards_per_client):
    labels = np.repeat(np.arange(NUM_CLASSES), 200)  # shards align with the classes: one class a shard
    clients = split("shards", labels=labels, shards_per_client=shards_per_client)
    assert all(len(np.unique(labels[client])) <= shards_per_client for client in clients)


def test_iid_is_near_the_global_distribution():
    assert {len(client) for client in split("iid")} == {101, 102}
    assert skew("iid", 1.0)["label_entropy"] > 0.9 * np.log(NUM_CLASSES)


def test_labels_need_not_be_contiguous():
    labels = np.where(LABELS > 4, 7, 2)
    assert sum(map(len, split("dirichlet_by_class", 1.0, labels=labels))) == len(labels)
    assert sum(map(len, split("dirichlet", 1.0, labels=labels))) == len(labels) - len(labels) % NUM_CLIENTS


def test_pad_keeps_indices_and_masks_the_rest():
    clients = split("dirichlet_by_class", 0.5)
    indices, num_examples = splits.pad(clients)
    assert indices.dtype == num_examples.dtype == np.int32
    assert indices.shape == (NUM_CLIENTS, max(map(len, clients)))
    for row, count, client in zip(indices, num_examples, clients, strict=True):
        assert np.array_equal(row[:count], client)
        assert np.all(row[count:] == client[0])


def test_class_counts_and_heterogeneity_on_a_case_done_by_hand():
    counts = splits.class_counts([np.array([0, 1]), np.array([2, 3])], np.array([0, 0, 1, 2]), 4)
    assert counts.tolist() == [[2, 0, 0, 0], [0, 1, 1, 0]]
    figures = splits.heterogeneity(counts)
    assert figures["label_entropy"] == pytest.approx(np.log(2) / 2)
    assert figures["total_variation"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"name": "x"},
            r"config\.partition\.name: unknown 'x'; known: dirichlet, dirichlet_by_class, file, iid, shards",
        ),
        ({"name": "iid", "num_clients": 0}, r"config\.partition\.num_clients"),
        ({"name": "iid", "num_clients": len(LABELS) + 1}, r"config\.partition\.num_clients"),
        ({"name": "dirichlet", "alpha": 0.0}, r"config\.partition\.alpha"),
        ({"name": "dirichlet", "alpha": None}, r"config\.partition\.alpha"),
        ({"name": "shards", "shards_per_client": 1000}, r"config\.partition\.shards_per_client"),
        ({"name": "dirichlet_by_class", "alpha": 1e-3}, r"config\.partition\.alpha .*config\.partition\.num_clients"),
        ({"name": "iid", "labels": LABELS[:, None]}, r"integer labels \[N\]"),
    ],
)
def test_errors_name_the_field(kwargs, message):
    with pytest.raises(ValueError, match=message):
        split(**kwargs)


def test_pad_names_clients_without_examples():
    with pytest.raises(ValueError, match=r"have none: \[1\]"):
        splits.pad([np.array([4]), np.array([], int)])
    with pytest.raises(ValueError, match="of 0 clients"):
        splits.pad([])


PUBLISHED = {0: [5, 2029, 0], 1: [7], 2: [1, 2]}


def write(path, found):
    """The same lists in each form that is known."""
    if path.suffix == ".npz":
        np.savez(path, **{str(client): np.array(indices) for client, indices in found.items()})
    elif path.suffix == ".json":
        path.write_text(json.dumps({str(client): indices for client, indices in found.items()}))
    else:
        path.write_text(str(found))
    return path


def read(path, num_clients=3):
    return splits.partition("file", LABELS, num_clients, seed=0, file=str(path))


@pytest.mark.parametrize("form", ["split.json", "dirichlet0.1_clients100.txt", "split.npz"])
def test_a_published_split_is_read_as_it_is(form, tmp_path):
    clients = read(write(tmp_path / form, dict(reversed(PUBLISHED.items()))))
    assert [client.tolist() for client in clients] == [[0, 5, 2029], [7], [1, 2]]


def test_lists_without_numbers_are_the_clients_in_turn(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(list(PUBLISHED.values())))
    np.savez(tmp_path / "b.npz", *map(np.array, PUBLISHED.values()))
    for name in ("a.json", "b.npz"):
        assert [client.tolist() for client in read(tmp_path / name)] == [[0, 5, 2029], [7], [1, 2]]


@pytest.mark.parametrize("form", ["split.json", "split.txt", "split.npz"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({1: []}, "client 1 of .* no list of examples, or an empty one"),
        ({1: [2030]}, "client 1 of .* owns the examples 2030, but the training set has 0 to 2029"),
        ({2: [-1, 4]}, "client 2 of .* owns the examples -1, "),
        ({1: [2, 7]}, "more than once the examples 2$"),
        ({1: [7, 7]}, "more than once the examples 7$"),
        ({1: [7.0]}, "client 1 of .* flat list of integers"),
        ({1: [[7]]}, "client 1 of .* flat list of integers"),
        ({1: [True]}, "client 1 of .* flat list of integers"),
        ({1: 7}, "client 1 of .* no list of examples"),
        ({3: [9]}, r"config\.partition\.num_clients: 3 needs the clients 0 to 2 in .*has 4: 0, 1, 2, 3"),
        ({-1: [9]}, r"config\.partition\.num_clients: .*has 4: -1, 0, 1, 2"),
    ],
)
def test_a_published_split_is_checked(form, changes, message, tmp_path):
    if form == "split.json" and changes == {1: [True]}:
        message = r"config\.partition\.file"  # no Python literal
    with pytest.raises(ValueError, match=message) as caught:
        read(write(tmp_path / form, {**PUBLISHED, **changes}))
    assert "config.partition" in str(caught.value) and form in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "7", "{0: [1], 0: [2]}", '{"0": [1], "00": [2]}', "{0.0: [1]}", "{'a': [1]}", "open('x')", "[" * 10_000],
)
def test_what_is_no_split_says_what_is_known(text, tmp_path):
    (tmp_path / "split.txt").write_text(text)
    with pytest.raises(ValueError, match=r"config\.partition\.file: .*split.txt is no list of indices for each client"):
        read(tmp_path / "split.txt", num_clients=1)


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "object.npz", **{"0": np.array([[1], [2, 3]], object)})
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, np.arange(3))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps([[1]]))
    (tmp_path / "pickle.json").write_bytes(pickle.dumps([[1]]))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "object.npz").read_bytes()[:-30])
    (tmp_path / "empty.npz").write_bytes(b"")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=rf"config\.partition\.file: .*{path.name} is no list"):
            read(path, num_clients=1)


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"config\.partition\.file: no split at nowhere.json"):
        read("nowhere.json")
    with pytest.raises(ValueError, match=r"config\.partition\.file: split 'file' needs the path of a split, got ''"):
        read("")
