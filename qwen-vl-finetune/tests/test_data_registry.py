"""The registry: names, shares, the user's TOML file, and draws that every rank makes alike."""

import os
import subprocess
import sys

import numpy as np
import pytest

from qwenvl.data import data_dict, data_list, parse_sampling_rate
from qwenvl.data.sources import sample_rows


def test_names_carry_shares():
    assert [parse_sampling_rate(name) for name in ("a", "a%50", "a%100", "a%7", "a%250", "a50%b")] == [
        1.0, 0.5, 1.0, 0.07, 2.5, 1.0,
    ]  # fmt: skip


def test_data_dict_is_read_when_asked(monkeypatch):
    monkeypatch.setitem(data_dict, "mine", {"annotation_path": "/a.json", "data_path": "/p"})
    shared = {"dataset_name": "mine", "annotation_path": "/a.json", "data_path": "/p"}
    assert data_list(["mine%20", "", " mine"]) == [
        shared | {"sampling_rate": 0.2},
        shared | {"sampling_rate": 1.0},
    ]


def test_a_users_file_adds_to_the_registry(tmp_path, monkeypatch):
    monkeypatch.setitem(data_dict, "mine", {"annotation_path": "/a.json", "data_path": "/p"})
    path = tmp_path / "data.toml"
    path.write_text(
        '[cats]\nannotation_path = "cats/train.jsonl"\ndata_path = "cats/images"\n'
        '[dogs]\nannotation_path = "/else/dogs.json"\n'
    )
    monkeypatch.chdir("/")
    cats, dogs, mine = data_list(["cats%10", "dogs", "mine"], path)
    assert cats["annotation_path"] == str(tmp_path / "cats/train.jsonl")
    assert cats["data_path"] == str(tmp_path / "cats/images")
    assert (cats["sampling_rate"], mine["annotation_path"]) == (0.1, "/a.json")
    assert (dogs["annotation_path"], dogs["data_path"]) == ("/else/dogs.json", str(tmp_path))
    assert set(data_dict) == {"mine"}, "a file must not change the package's registry"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[cats]\n", r"data.toml: \[cats\]: needs annotation_path"),
        (
            "[cats]\nannotation_path = 3\n",
            r"\[cats\]: annotation_path = 3: only annotation_path, data_path, split",
        ),
        ('[cats]\nannotation_path = "a.json"\ntypo = "b"\n', r"\[cats\]: typo = 'b'"),
        ('["cats%5"]\nannotation_path = "a.json"\n', "must not end in %N"),
        ("[cats\n", "data.toml: not valid TOML"),
        ('[mine]\nannotation_path = "a.json"\n', r"\[mine\] is in data_dict already"),
    ],
)
def test_a_users_file_with_a_fault_is_named(tmp_path, monkeypatch, text, message):
    monkeypatch.setitem(data_dict, "mine", {"annotation_path": "/a.json", "data_path": "/p"})
    (tmp_path / "data.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        data_list(["cats"], tmp_path / "data.toml")


def test_unknown_names_and_empty_shares_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown data set 'cats'.*known: none: name a TOML file"):
        data_list(["cats"])
    with pytest.raises(ValueError, match=r"--dataset_config .*gone.toml: no such file"):
        data_list(["cats"], tmp_path / "gone.toml")
    monkeypatch.setitem(data_dict, "mine", {"annotation_path": "/a.json", "data_path": "/p"})
    with pytest.raises(ValueError, match=r"unknown data set 'mine%x'.*known: mine"):
        data_list(["mine%x"])
    with pytest.raises(ValueError, match="'mine%0' in --dataset_use takes no rows"):
        data_list(["mine%0"])


def test_shares_are_exact_and_in_file_order():
    rows = np.arange(100, 300)
    half = sample_rows(rows, 0.5, seed=0, name="a")
    assert len(half) == len(set(half)) == 100
    assert set(half) <= set(rows)
    assert (np.diff(half) > 0).all()
    assert len(sample_rows(rows, 0.29, seed=0, name="a")) == 58, "0.29 * 200 is 57.99... in floating point"
    assert (sample_rows(rows, 1.0, seed=0, name="a") == rows).all()
    twice = sample_rows(rows, 2.5, seed=0, name="a")
    assert (twice[:400] == np.concatenate([rows, rows])).all()
    assert (twice[400:] == half).all()
    with pytest.raises(ValueError, match="data set a%1 takes none of its 20 rows"):
        sample_rows(rows[:20], 0.01, seed=0, name="a")


def test_the_draw_depends_on_seed_and_name_alone():
    rows = np.arange(1000)
    draw = sample_rows(rows, 0.1, seed=1, name="a")
    assert (draw == sample_rows(rows, 0.1, seed=1, name="a")).all()
    assert (draw != sample_rows(rows, 0.1, seed=2, name="a")).any()
    assert (draw != sample_rows(rows, 0.1, seed=1, name="b")).any()


def test_two_ranks_draw_the_same():
    """In processes of their own, with hash randomisation and global random states that differ."""
    code = (
        "import random, numpy as np; random.seed({0}); np.random.seed({0})\n"
        "from qwenvl.data.sources import sample_rows\n"
        "print(sample_rows(np.arange(500), 0.1, seed=7, name='cats').tolist())"
    )
    drawn = [
        subprocess.run(
            [sys.executable, "-c", code.format(rank)],
            env=os.environ | {"PYTHONHASHSEED": str(rank + 1), "RANK": str(rank)},
            capture_output=True, text=True, check=True,
        ).stdout
        for rank in range(2)
    ]  # fmt: skip
    assert drawn[0] == drawn[1] != ""


def test_the_registry_needs_no_torch():
    code = "import sys, qwenvl.data, qwenvl.data.sources; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
