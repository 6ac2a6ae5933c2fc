"""evaluation/*/run_*.py and the shell scripts beside them: the flags of old, and what they start."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_eval.commands import flags
from qwenvl_eval.samples import write_sample
from qwenvl_eval.scripts import main, script_parser
from qwenvl_eval.store import Prediction, Run, Store
from qwenvl_eval.task import task_class

FOLDER = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "mmmu": FOLDER / "mmmu/run_mmmu.py",
    "mathvision": FOLDER / "MathVision/run_mathv.py",
    "realworldqa": FOLDER / "RealWorldQA/run_realworldqa.py",
    "videomme": FOLDER / "VideoMME/run_videomme.py",
    "odinw": FOLDER / "ODinW-13/run_odinw.py",
}
DATASETS = {
    "mmmu": "MMMU_DEV_VAL",
    "mathvision": "MathVision_MINI",
    "realworldqa": "RealWorldQA",
    "videomme": "Video-MME",
    "odinw": "ODinW-13",
}
COT = {"use_cot": True, "cot_prompt": "Think first."}
OPTIONS = {  # beyond those that all have
    "mmmu": COT,
    "mathvision": COT | {"num_samples": 5},
    "realworldqa": {},
    "videomme": {
        "duration": "short",
        "use_subtitle": True,
        "sys_prompt": "prompt.txt",
        "max_samples": 3,
        "fps": 2.0,
        "min_pixels": 4096,
        "max_pixels": 65536,
        "total_pixels": 1048576,
        "min_frames": 4,
        "max_frames": 16,
    },
    "odinw": {},
}
ENGINE = {
    "tensor_parallel_size": 8,
    "gpu_memory_utilization": 0.9,
    "max_model_len": 128000,
    "max_images_per_prompt": 10,
    "max_videos_per_prompt": 1,
}
SAMPLING = {
    "max_new_tokens": 32768,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "repetition_penalty": 1.0,
    "presence_penalty": 1.5,
    "seed": 3407,
}


@pytest.fixture(params=SCRIPTS)
def task(request):
    return request.param


def words(values):
    """Flags as they are typed."""
    return [
        word
        for name, value in values.items()
        for word in [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    ]


def test_infer_takes_the_flags_of_the_original_scripts(task, tmp_path):
    places = {
        "model_path": "M",
        "data_dir": tmp_path,
        "output_file": tmp_path / "out.jsonl",
        "dataset": DATASETS[task],
    }
    given = places | ENGINE | SAMPLING | OPTIONS[task]
    arguments = script_parser(task).parse_args(["infer", *words(given)])
    assert {name: getattr(arguments, name) for name in given} == given
    kind = task_class(task)
    options = vars(flags.task_from(arguments, kind))
    wanted = OPTIONS[task] | ({"dataset": DATASETS[task]} if "dataset" in options else {})
    assert {name: options[name] for name in wanted} == wanted
    sampling = vars(flags.sampling_from(arguments, kind.presets))
    assert {name: sampling[name] for name in SAMPLING} == SAMPLING


def test_eval_takes_the_flags_of_the_original_scripts(task, tmp_path):
    given = {
        "data_dir": tmp_path,
        "input_file": tmp_path / "out.jsonl",
        "output_file": tmp_path / "out.json",
        "dataset": DATASETS[task],
        "eval_model": "gpt-4o",
        "nproc": 4,
    }
    for kind in ("dash", "mit"):
        arguments = script_parser(task).parse_args(["eval", *words(given | {"api_type": kind})])
        assert {name: getattr(arguments, name) for name in given} == given
        assert arguments.api_type == kind
    with pytest.raises(SystemExit):
        script_parser(task).parse_args(["eval", *words(given | {"api_type": "other"})])


def test_a_data_set_of_another_benchmark_is_refused(capsys):
    asked = {"model_path": "M", "output_file": "out.jsonl", "dataset": "MMMU_DEV_VAL"}
    for task in ("videomme", "odinw"):
        with pytest.raises(SystemExit):
            script_parser(task).parse_args(["infer", *words(asked)])
        assert DATASETS[task] in capsys.readouterr().err


def test_a_script_runs_from_anywhere_without_loading_a_model(task, tmp_path):
    script = SCRIPTS[task]
    code = f"""
import runpy, sys
sys.argv = [{str(script)!r}, "eval", "--input-file", "gone.jsonl", "--output-file", "out.json"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 1
assert not {{"torch", "transformers", "vllm"}} & set(sys.modules)
"""
    for place in (tmp_path, script.parent):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=True, timeout=60
        )
        assert re.fullmatch(rf"{script.name}: .*No such file.*gone\.jsonl.*\n", done.stderr)


def test_a_worker_process_that_imports_a_script_starts_nothing(task):
    runpy.run_path(str(SCRIPTS[task]), run_name="__mp_main__")


# ---- eval


@pytest.fixture
def answers(tmp_path):
    """Three answers to RealWorldQA: right, wrong, and one that says nothing."""
    run = Run("realworldqa", vars(task_class("realworldqa")()), "M", "0" * 64, str(tmp_path), "1" * 64, 3, {})
    target = {"type": "multiple-choice", "answer": "A", "options": {"A": "yes", "B": "no"}}
    with Store(tmp_path / "out.jsonl", run) as store:
        store.add(
            Prediction(
                id=str(i), index=i, replicate=0, key=f"{i:064x}", prompt=[], media=[], answer=answer,
                reasoning="", finish_reason="stop", error="", prompt_tokens=1, completion_tokens=1,
                seconds=0.1, target=target, cluster=str(i), groups={"type": "multiple-choice"},
            )
            for i, answer in enumerate(["A", "B", ""])
        )  # fmt: skip
    return tmp_path / "out.jsonl"


def test_eval_prints_and_writes_every_protocol(answers, tmp_path, capsys):
    output = tmp_path / "sub/report.json"
    assert main("realworldqa", ["eval", *words({"input_file": answers, "output_file": output})]) == 0
    report = json.loads(output.read_text())
    assert report["task"] == "RealWorldQA"
    assert list(report["protocols"]) == list(task_class("realworldqa").protocols)
    assert all(one["accuracy"]["total"] == 3 for one in report["protocols"].values())
    printed = capsys.readouterr().out
    assert all(f"({name};" in printed or f"({name}," in printed for name in report["protocols"])
    assert printed.splitlines()[-1].split() == ["written", str(output)]


def test_eval_refuses_what_is_not_the_file_that_was_meant(answers, tmp_path, capsys):
    write_sample("realworldqa", tmp_path / "data")
    fine = {"input_file": answers, "output_file": tmp_path / "report.json"}
    cases = [
        ("mmmu", fine, "holds answers to realworldqa, not to mmmu"),
        ("realworldqa", fine | {"dataset": "MMMU"}, "holds answers to RealWorldQA, not to MMMU"),
        ("realworldqa", fine | {"data_dir": tmp_path / "data"}, "is not the data of this run"),
        ("realworldqa", fine | {"output_file": answers}, "would overwrite it"),
        ("realworldqa", fine | {"api_type": "dash"}, "name it with --eval-model"),
    ]
    before = answers.read_bytes()
    capsys.readouterr()
    for name, given, told in cases:
        assert main(name, ["eval", *words(given)]) == 1
        assert told in capsys.readouterr().err
    assert answers.read_bytes() == before and not fine["output_file"].exists()


# ---- the shell scripts


def shell_scripts():
    return [
        pytest.param(task, mode, preset, id=f"{task}-{mode}-{preset}")
        for task in SCRIPTS
        for mode in ("infer", "eval")
        for preset in ("instruct", "think")
    ]


@pytest.mark.parametrize(("task", "mode", "preset"), shell_scripts())
def test_a_shell_script_starts_its_python_script(task, mode, preset, tmp_path):
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin/python"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    path = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    shell = SCRIPTS[task].with_name(f"{mode}_{preset}.sh")

    def started(**variables):
        done = subprocess.run(
            ["bash", shell, "--seed", "1 2"],
            env=path | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout.splitlines(), done.stderr

    status, said, error = started(DATA_DIR="a folder", OUTPUT_DIR="my output", MODEL_PATH="my model")
    assert status == 0, error
    script, *rest = said
    assert Path(script).samefile(SCRIPTS[task])
    assert rest[-2:] == ["--seed", "1 2"]
    arguments = script_parser(task).parse_args([*rest[:-2]] if mode == "eval" else [*rest[:-1], "1"])
    answers = tmp_path / f"my output/{task}_{preset}.jsonl"
    if mode == "eval":
        assert tmp_path / arguments.input_file == answers
        assert tmp_path / arguments.output_file == answers.with_name(f"{task}_{preset}_eval.json")
        return
    assert tmp_path / arguments.output_file == answers
    assert (arguments.model_path, arguments.data_dir) == ("my model", Path("a folder"))
    assert flags.sampling_from(arguments, task_class(task).presets).temperature == (
        0.7 if preset == "instruct" else 1.0
    )
    status, said, _ = started(LMUData="elsewhere")
    assert status == 0 and said[said.index("--data-dir") + 1] == "elsewhere"
    model = said[said.index("--model-path") + 1]
    assert model.endswith("-Instruct" if preset == "instruct" else "-Thinking")
    status, said, error = started()
    assert status != 0 and not said and "DATA_DIR or LMUData" in error


def test_the_shell_scripts_pass_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [script.with_name(f"{m}_{p}.sh") for script in SCRIPTS.values() for m in ("infer", "eval")
               for p in ("instruct", "think")]  # fmt: skip
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert all(os.access(script, os.X_OK) for script in scripts)
