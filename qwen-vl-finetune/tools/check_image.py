"""The data doctor: a dry run of a training, which reads, decodes and encodes every row and trains nothing.

    python qwen-vl-finetune/tools/check_image.py --model_name_or_path CHECKPOINT \\
        --dataset_config data.toml --dataset_use receipts,charts%50 --model_max_length 8192 --report doctor

    the flags of training -> each row as training takes it, in all cores
      -> what training would refuse (errors), what a person should look at (warnings)
      -> tokens, steps, memory of the run -> REPORT/report.json, REPORT/report.html
      -> with --fix FOLDER: the rows without errors, each once, and a datasets.toml for --dataset_config

Exit code: 0 where training will take every row, 1 where it will not, 2 where the flags do not hold. What
--fix leaves out does not change it.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from transformers import AutoModelForImageTextToText

from qwen_vl_utils.grounding import coordinates_of
from qwenvl.data import data_list
from qwenvl.data.budget import DROPPING
from qwenvl.data.data_processor import make_encoder
from qwenvl.data.doctor import Checkup, count_kinds, default_workers, examine
from qwenvl.data.doctor_page import preview, render
from qwenvl.data.packing import plan_packs
from qwenvl.data.sources import JsonRows, Pairs, mix_rows, open_annotations, sample_rows
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.model_loading import load_config, load_processor
from qwenvl.train.parameters import component_of, trained_components
from qwenvl.train.preference import PairArguments

PREVIEWS = 6


@dataclass
class DoctorArguments:
    """What the doctor does beside looking."""

    report: str = field(default="doctor", metadata={"help": "Folder of report.json and report.html."})
    fix: str = field(default="", metadata={"help": "Folder to write cleaned data sets to; must be new."})
    pairs: bool = field(default=False, metadata={"help": "Rows have two answers, for train_dpo.py."})
    processes: int = field(default=1, metadata={"help": "Processes that will train, for the steps."})
    workers: int | None = field(default=None, metadata={"help": "Processes that look; default: the cores."})


def main() -> None:
    """The command line."""
    kinds = (DoctorArguments, ModelArguments, DataArguments, TrainingArguments)
    parser = transformers.HfArgumentParser(cast(Any, kinds))
    doctor, model_args, data_args, args = parser.parse_args_into_dataclasses()
    transformers.logging.disable_progress_bar()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        errors = run(doctor, model_args, data_args, args)
    except ValueError as error:
        print(f"check_image: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(1 if errors else 0)


def run(
    doctor: DoctorArguments, model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> int:
    """Look at all data sets and write the report; the number of errors. Raises ValueError for flags."""
    entries = data_list(data_args.dataset_use.split(","), data_args.dataset_config)
    if not entries:
        raise ValueError("--dataset_use names no data set; give names of the registry, comma separated")
    if doctor.fix and Path(doctor.fix).exists():
        raise ValueError(f"--fix {doctor.fix}: it is there already; name a new folder")
    if doctor.pairs:  # Refuses what train_dpo.py refuses.
        data_args = PairArguments(**asdict(data_args))
    config, processor = load_config(model_args, args), load_processor(model_args, data_args, args)
    encode = make_encoder(processor, data_args, model_config=config, model_max_length=args.model_max_length)
    opened = {
        entry["dataset_name"]: open_annotations(entry["annotation_path"], entry.get("split"))
        for entry in entries
    }
    for name, rows in opened.items():
        if doctor.fix and not isinstance(rows, JsonRows):
            raise ValueError(f"--fix: {name} is no JSON file; leave its bad rows out by report.json")
    seen = {name: Pairs(rows) if doctor.pairs else rows for name, rows in opened.items()}
    checkups = {
        entry["dataset_name"]: examine(
            entry["dataset_name"], seen[entry["dataset_name"]], entry["data_path"], encode,
            coordinates_of(config.model_type), packed=data_args.flattened(),
            workers=default_workers() if doctor.workers is None else doctor.workers,
        )
        for entry in entries
    }  # fmt: skip
    all_rows = Checkup(
        sum(each.rows for each in checkups.values()),
        [finding for each in checkups.values() for finding in each.findings],
        [report for each in checkups.values() for report in each.good],
        sum(each.seconds for each in checkups.values()),
    )
    forecast = predict(entries, checkups, doctor.processes, data_args, args)
    forecast |= memory(config, model_args, args, doctor.pairs)
    previews = []
    for entry in entries:
        name = entry["dataset_name"]
        for _, report in checkups[name].good[:PREVIEWS]:
            previews.append(preview(seen[name], entry["data_path"], report.row, encode))
    write_report(Path(doctor.report), all_rows, forecast, previews)
    if doctor.fix:
        write_clean(Path(doctor.fix), entries, opened, checkups)
    for line in summary(all_rows, forecast, doctor):
        print(line)
    return len(all_rows.errors)


def predict(
    entries: list[dict], checkups: dict[str, Checkup], processes: int, data_args: DataArguments,
    args: TrainingArguments,
) -> dict[str, Any]:  # fmt: skip
    """Samples, tokens and steps of the run, over the rows that training takes: those without errors."""
    good = {name: {report.row: report for _, report in each.good} for name, each in checkups.items()}
    used = [entry for entry in entries if good[entry["dataset_name"]]]
    names = [entry["dataset_name"] for entry in used]
    rows = [
        sample_rows(np.array(sorted(good[name])), entry["sampling_rate"], seed=args.seed, name=name)
        for name, entry in zip(names, used, strict=True)
    ]
    if used and "weight" in used[0]:
        rows = mix_rows(rows, [entry["weight"] for entry in used], seed=args.seed, names=names)
    reports = [good[name][row] for name, taken in zip(names, rows, strict=True) for row in taken.tolist()]
    found: dict[str, Any] = {
        "rows": len(reports),
        "tokens": sum(sum(report.tokens) for report in reports),
        "media_tokens": sum(report.media_tokens for report in reports),
        "loss_tokens": sum(report.loss_tokens for report in reports),
        "longest": max((length for report in reports for length in report.tokens), default=0),
    }
    if data_args.too_long in DROPPING:
        found["shortened_samples"] = sum(report.shortened for report in reports)
    items = len(reports)
    if data_args.data_packing and items:
        tokens = np.array([sum(report.tokens) for report in reports])
        patches = np.array([report.patches for report in reports])
        items = len(plan_packs(tokens, patches, args.model_max_length, data_args.pack_max_patches, args.seed))
        found |= {"packs": items, "fill": found["tokens"] / (items * args.model_max_length)}
    batches = math.ceil(items / (args.per_device_train_batch_size * processes))
    steps = max(math.ceil(batches / args.gradient_accumulation_steps), 1) if items else 0
    total = args.max_steps if args.max_steps > 0 else math.ceil(steps * args.num_train_epochs)
    return found | {"steps_an_epoch": steps, "steps": total}


def memory(config: Any, model_args: ModelArguments, args: TrainingArguments, pairs: bool) -> dict[str, Any]:
    """GiB of one process without ZeRO, without activations: 4 bytes a parameter, 12 more for one that is
    trained (gradient, and the two moments of Adam), with pairs 4 more for its copy in the reference; all in
    fp32 as training keeps them. An estimate.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    trained = trained_components(model_args)
    bytes_needed = 0
    for name, parameter in model.named_parameters():
        learns = trained[component_of(name)] and not args.lora_enable
        bytes_needed += parameter.numel() * (16 + 4 * pairs if learns else 4)
    return {"gib_without_activations": bytes_needed / 2**30}


def write_report(folder: Path, checkup: Checkup, forecast: dict[str, Any], previews: list[Any]) -> None:
    """Both files."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "rows": checkup.rows,
        "rows_per_second": checkup.rows / max(checkup.seconds, 1e-9),
        "counts": [list(each) for each in count_kinds(checkup.findings)],
        "forecast": forecast,
        "findings": [asdict(finding) for finding in checkup.findings],
    }
    (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    (folder / "report.html").write_text(render(checkup, forecast, previews), encoding="utf-8")


def write_clean(folder: Path, entries: list[dict], opened: dict[str, Any], checkups: dict[str, Any]) -> None:
    """The rows without errors, of equal ones the first, as JSONL; the inputs stay as they are."""
    folder.mkdir(parents=True)
    tables = []
    for entry in entries:
        name = entry["dataset_name"]
        rows = [opened[name].row(row) for row in checkups[name].clean_rows(name)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        place = json.dumps(str(Path(entry["data_path"]).resolve()))
        tables.append(f'[{name}]\nannotation_path = "{name}.jsonl"\ndata_path = {place}\n')
    (folder / "datasets.toml").write_text("\n".join(tables), encoding="utf-8")


def summary(checkup: Checkup, forecast: dict[str, Any], doctor: DoctorArguments) -> list[str]:
    """What the terminal says."""
    lines = [f"{checkup.rows} rows, {checkup.rows / max(checkup.seconds, 1e-9):.1f} a second"]
    lines += [f"  {level:8} {count:6} x {kind}" for level, kind, count in count_kinds(checkup.findings)]
    lines += [finding.text for finding in checkup.errors[:10]]
    numbers = {name: value if isinstance(value, int) else round(value, 3) for name, value in forecast.items()}
    lines.append("forecast: " + ", ".join(f"{name} {value}" for name, value in numbers.items()))
    lines.append(f"report: {doctor.report}/report.html")
    if doctor.fix:
        lines.append(f"cleaned: --dataset_config {doctor.fix}/datasets.toml")
    return lines


if __name__ == "__main__":
    main()
