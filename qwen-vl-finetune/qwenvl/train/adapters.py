"""LoRA adapters: where they sit, what else is trained beside them, and how they become a checkpoint again.

--lora_components language,experts    these get adapters
--tune_mm_mlp True                    not among them, so trained in full and saved with the adapters

         language                  merger, vision           experts of a mixture
on       each linear layer         each linear layer        the fused parameters, [E, out, in]
not on   lm_head, routers          the patch embedding

output_dir/adapter   adapter_model.safetensors, adapter_config.json, base.json, processor
output_dir           base + adapter in the base's dtype, as `merge` writes it
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from qwenvl.train import expert_layout
from qwenvl.train.argument import ModelArguments, TrainingArguments
from qwenvl.train.parameters import component_of, trained_components

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.getLogger(__name__)

COMPONENTS = ("language", "merger", "vision", "experts")
BASE_FILE = "base.json"
_SAMPLED_BYTES = 4096


def adapted_components(model_args: ModelArguments, training_args: TrainingArguments) -> set[str]:
    """Components that get adapters: --lora_components, else what the --tune_mm_* flags name, else language.

    Raises ValueError for a name that is none, and for the language model in full beside adapters elsewhere.
    """
    trained = {name for name, wanted in trained_components(model_args).items() if wanted}
    if training_args.lora_components is None:
        return trained or {"language"}
    adapted = {name.strip() for name in training_args.lora_components.split(",")}
    if unknown := adapted - set(COMPONENTS):
        raise ValueError(
            f"--lora_components: {', '.join(sorted(unknown))!r} is none of {', '.join(COMPONENTS)}"
        )
    if "language" in trained and not adapted & {"language", "experts"}:
        raise ValueError(
            "--tune_mm_llm True, but --lora_components leaves the language model out: training it in full "
            "beside adapters saves nothing; add language, or train without --lora_enable"
        )
    return adapted


def lora_config(
    model_args: ModelArguments, training_args: TrainingArguments, model: PreTrainedModel
) -> LoraConfig:
    """PEFT's configuration of the adapters, with every layer named in full.

    Raises ValueError for what PEFT cannot adapt, ModuleNotFoundError where it is not installed.
    """
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--lora_enable needs PEFT: uv pip install -e 'qwen-vl-finetune[lora]'"
        ) from error
    adapted = adapted_components(model_args, training_args)
    wanted = trained_components(model_args)
    in_full = {name for name in ("merger", "vision") if wanted[name] and name not in adapted}
    layers, experts, whole = [], [], []
    for name, module in model.named_modules():
        for parameter, value in module.named_parameters(recurse=False):
            component = component_of(f"{name}.{parameter}")
            if component in in_full:
                whole.append(name)
            elif name.endswith(".mlp.experts") and value.ndim == 3 and "experts" in adapted:
                experts.append(f"{name}.{parameter}")
            elif isinstance(module, nn.Linear) and name != "lm_head" and component in adapted:
                layers.append(name)
    if "experts" in adapted:
        _check_experts(experts, model.config, training_args)
    return LoraConfig(
        r=training_args.lora_r,
        lora_alpha=training_args.lora_alpha,
        lora_dropout=training_args.lora_dropout,
        use_dora=training_args.lora_dora,
        target_modules=list(dict.fromkeys(layers)),
        target_parameters=experts or None,
        modules_to_save=list(dict.fromkeys(whole)) or None,
    )


def _check_experts(experts: list[str], config: PreTrainedConfig, training_args: TrainingArguments) -> None:
    if not experts:
        raise ValueError(f"--lora_components experts: model_type {config.model_type!r} has no experts")
    if training_args.lora_dora or training_args.lora_dropout:
        raise ValueError(
            "--lora_components experts: PEFT's adapters on fused experts know neither --lora_dora nor "
            "--lora_dropout; leave both off, or the experts out"
        )


def add_adapters(
    model_args: ModelArguments, training_args: TrainingArguments, model: PreTrainedModel
) -> PreTrainedModel:
    """`model` with adapters, everything else frozen but the components that are trained in full."""
    config = lora_config(model_args, training_args, model)
    from peft import get_peft_model, prepare_model_for_kbit_training

    if training_args.lora_quantize is not None:
        # The Trainer turns gradient checkpointing on by itself.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for line in vllm_objections(config):
        logger.info("the adapter by itself can't be served by vLLM, the merged checkpoint can: %s", line)
    return cast(PreTrainedModel, get_peft_model(model, config))


def vllm_objections(config: LoraConfig) -> list[str]:
    """Why vLLM would refuse such an adapter or serve it in part; empty where it would serve it whole."""
    objections = []
    if config.use_dora:
        objections.append("it has no DoRA")
    if config.modules_to_save:
        objections.append("it takes no weights trained in full")
    if config.target_parameters:
        objections.append("PEFT's form of adapters on fused experts is not tested with it")
    if any(".linear_attn." in name for name in config.target_modules or ()):
        objections.append("adapters on linear attention are not tested with it")
    if any("visual." in name for name in config.target_modules or ()):
        objections.append("it leaves out what is in the vision tower and the mergers")
    return objections


def quantisation(training_args: TrainingArguments, config: PreTrainedConfig) -> BitsAndBytesConfig | None:
    """How --lora_quantize loads the language model's linear layers; None without the flag.

    The vision tower, the mergers and lm_head keep their dtype.  Training with it is not tested on a GPU here.
    Raises ValueError where bitsandbytes cannot work.
    """
    kind = training_args.lora_quantize
    if kind is None:
        return None
    if config.model_type.endswith("_moe"):
        raise ValueError(
            f"--lora_quantize {kind}: bitsandbytes quantises linear layers, and the experts of "
            f"{config.model_type} are fused parameters; train it without the flag"
        )
    if training_args.deepspeed and training_args.hf_deepspeed_config.is_zero3():
        raise ValueError(
            f"--lora_quantize {kind}: ZeRO-3 can't split quantised weights; use scripts/zero2.json"
        )
    if not torch.cuda.is_available():
        raise ValueError(f"--lora_quantize {kind} needs a CUDA device; train without it on this machine")
    return quantisation_config(kind, torch.bfloat16 if training_args.bf16 else torch.float32)


def quantisation_config(kind: str, compute: torch.dtype) -> BitsAndBytesConfig:
    """bitsandbytes' configuration for "4bit" (NF4, its constants quantised too) or "8bit"."""
    skipped = ["visual", "lm_head"]
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=skipped,
    )


def fingerprint(model: str, cache_dir: str | None = None) -> str:
    """What tells a checkpoint's weights from others: a hash of names, shapes, dtypes and each tensor's start.

    model: a folder, or a hub's name that is in the cache.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, cache_dir=cache_dir, local_files_only=True))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no *.safetensors file; adapters need a base saved in that form")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            for name, tensor in sorted(header.items()):
                begin, end = tensor["data_offsets"]
                file.seek(8 + size + begin)
                digest.update(f"{name} {tensor['dtype']} {tensor['shape']}".encode())
                digest.update(file.read(min(end - begin, _SAMPLED_BYTES)))
    return digest.hexdigest()


def write_base(folder: Path, model: str, weights: str) -> None:
    """Beside an adapter, which base it was trained on."""
    said = {"model_name_or_path": model, "weights": weights}
    (folder / BASE_FILE).write_text(json.dumps(said, indent=2) + "\n")


def merge(
    adapter: str | Path, output_dir: str | Path, base: str | None = None, cache_dir: str | None = None
) -> None:
    """Write base + adapter as a checkpoint: weights in the base's dtype, configuration, processor.

    Computed in fp32 on the CPU.  base: the adapter's own where None.  Raises ValueError where `adapter` is
    none, or was trained on other weights than the base's.
    """
    from peft import PeftModel

    adapter = Path(adapter)
    base = base or base_of(adapter)
    _check_base(adapter, base, cache_dir)
    config = AutoConfig.from_pretrained(base, cache_dir=cache_dir)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32, cache_dir=cache_dir)
    adapted = PeftModel.from_pretrained(model, adapter, torch_device="cpu")
    merged = cast(PreTrainedModel, adapted.merge_and_unload(safe_merge=True))
    cast(nn.Module, merged).to(dtype)
    merged.save_pretrained(output_dir)
    expert_layout.publish(output_dir)
    AutoProcessor.from_pretrained(adapter).save_pretrained(output_dir)


def base_of(adapter: Path) -> str:
    """The base that an adapter's folder names."""
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{adapter}: no adapter_config.json, so this is no adapter's folder")
    return json.loads(path.read_text())["base_model_name_or_path"]


def _check_base(adapter: Path, base: str, cache_dir: str | None) -> None:
    base_of(adapter)
    path = adapter / BASE_FILE
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, which says what the adapter was trained on; train_qwen.py writes it"
        )
    said = json.loads(path.read_text())
    if fingerprint(base, cache_dir) != said["weights"]:
        raise ValueError(
            f"{base} holds other weights than {adapter} was trained on ({said['model_name_or_path']}); "
            "pass the right --model_name_or_path"
        )
