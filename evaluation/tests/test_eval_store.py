"""The store: nothing is lost, nothing kept twice, nothing of another run mixed in."""

import json
import threading
from dataclasses import replace

import pytest

from qwenvl_eval import Prediction, Predictions, Run, Store

RUN = Run(
    task="conversations", options={"limit": 0}, model="models/nano", weights="a" * 64, data="test.jsonl",
    data_sha256="b" * 64, samples=3, sampling={"temperature": 0},
)  # fmt: skip


def prediction(index, answer="yes", **more):
    fields = {"id": f"q{index}", "index": index, "replicate": 0, "key": f"{index:064x}"[::-1], "prompt": []}
    fields |= {"media": [], "answer": answer, "reasoning": "", "finish_reason": "stop", "error": ""}
    fields |= {"prompt_tokens": 40, "completion_tokens": 2, "seconds": 0.5, "target": {"answer": "yes"}}
    fields |= {"cluster": f"{index}.png", "groups": {}}
    return Prediction(**(fields | more))


def test_what_is_added_can_be_read_back_in_the_order_of_the_data(tmp_path):
    path = tmp_path / "new folder" / "out.jsonl"
    kept = [prediction(2, answer="Grüße\n\u2028"), prediction(1)]
    with Store(path, RUN) as store:
        store.add(kept)
        found = Predictions(path)  # already, before it is closed
        assert (found.run, list(found)) == (RUN, kept[::-1])
    with Store(path, replace(RUN, model="moved/elsewhere", data="there/too", engine="vllm")) as store:
        assert kept[0].key in store and kept[1].key in store and len(store) == 2
        store.add([prediction(0)])
    assert [p.index for p in Predictions(path)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task", "mmmu"), ("options", {"limit": 5}), ("weights", "7" * 64), ("data_sha256", "7" * 64),
        ("samples", 7), ("replicates", 7), ("sampling", {"temperature": 1}),
    ],
)  # fmt: skip
def test_another_run_is_refused(tmp_path, name, value):
    path = tmp_path / "out.jsonl"
    with Store(path, RUN) as store:
        store.add([prediction(1)])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"out\.jsonl holds .* another run \({name} .*choose another file"):
        Store(path, replace(RUN, **{name: value}))
    assert path.read_bytes() == before


def test_a_run_that_never_answered_makes_room_for_another(tmp_path):
    path = tmp_path / "out.jsonl"
    other = replace(RUN, weights="c" * 64)
    for run in (RUN, other):
        Store(path, run).__exit__(None, None, None)
    assert (Predictions(path).run, len(Predictions(path))) == (other, 0)


def test_a_file_cut_at_any_byte_goes_on(tmp_path):
    path = tmp_path / "out.jsonl"
    kept = [prediction(1, answer="ä"), prediction(2)]
    with Store(path, RUN) as store:
        store.add(kept)
    whole = path.read_bytes()
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        with Store(path, RUN) as store:
            store.add(p for p in kept if p.key not in store)
        assert path.read_bytes() == whole, end


def test_a_long_half_line_is_dropped_too(tmp_path):
    path = tmp_path / "out.jsonl"
    with Store(path, RUN) as store:
        store.add([prediction(1)])
    whole = path.read_bytes()
    path.write_bytes(whole + b"x" * 300_000)
    Store(path, RUN).__exit__(None, None, None)
    assert path.read_bytes() == whole


def test_what_failed_is_asked_again_and_its_new_line_counts(tmp_path):
    path = tmp_path / "out.jsonl"
    failed = prediction(1, answer="", finish_reason="failed", error="no route")
    with Store(path, RUN) as store:
        store.add([failed, prediction(2, answer="", finish_reason="refused", error="too long")])
        assert failed.key not in store and prediction(2).key in store
    with Store(path, RUN) as store:
        assert failed.key not in store
        store.add([prediction(1)])
    assert [p.finish_reason for p in Predictions(path)] == ["stop", "refused"]


def test_damage_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "out.jsonl"
    with Store(path, RUN) as store:
        store.add([prediction(1), prediction(2)])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1][:20] + "\n", lines[2]]))
    with pytest.raises(ValueError, match=r"out\.jsonl, line 2: not a prediction"):
        Store(path, RUN)
    path.write_text("".join([lines[0], json.dumps({"row": 1}) + "\n"]))
    with pytest.raises(ValueError, match=r"out\.jsonl, line 2: not a prediction"):
        Predictions(path)
    path.write_text('{"row": 1}\n')
    with pytest.raises(ValueError, match=r"out\.jsonl, line 1: not the run"):
        Predictions(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no predictions in it"):
        Predictions(path)


def test_lines_of_many_threads_stay_whole(tmp_path):
    path = tmp_path / "out.jsonl"
    with Store(path, replace(RUN, samples=400)) as store:

        def work(first):
            for index in range(first, 400, 8):
                store.add([prediction(index, answer="x" * 5000)])

        threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [p.index for p in Predictions(path)] == list(range(400))
