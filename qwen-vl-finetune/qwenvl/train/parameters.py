"""Which parameters are trained, how fast, and with how much weight decay: one table, one row a component.

Components, the flag that trains each, and the flag of its learning rate:

    vision     the vision encoder                                  --tune_mm_vision  --vision_tower_lr
    merger     its projection into the language model, with the    --tune_mm_mlp     --mm_projector_lr
               DeepStack mergers of Qwen3-VL
    language   the language model, with lm_head, tied or not       --tune_mm_llm     --learning_rate
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from qwenvl.train.argument import ModelArguments, TrainingArguments

logger = logging.getLogger(__name__)

_MERGERS = ("model.visual.merger.", "model.visual.deepstack_merger_list.")
_PEFT = "base_model.model."


@dataclass(frozen=True)
class Component:
    """One row of the table: which component, whether it is trained, and how."""

    name: str
    trainable: bool
    learning_rate: float
    weight_decay: float


def component_of(parameter: str) -> str:
    """The component ("vision", "merger" or "language") that a parameter of the model belongs to, by its name.

    Names of a model that PEFT has wrapped are understood too.
    """
    name = parameter.removeprefix(_PEFT)
    if name.startswith(_MERGERS):
        return "merger"
    if name.startswith("model.visual."):
        return "vision"
    if name.startswith(("model.language_model.", "lm_head.")):
        return "language"
    raise ValueError(f"parameter {parameter!r} belongs to no known component of a Qwen-VL model")


def trained_components(model_args: ModelArguments) -> dict[str, bool]:
    """Component -> whether the --tune_mm_* flags ask for its training."""
    return {
        "vision": model_args.tune_mm_vision,
        "merger": model_args.tune_mm_mlp,
        "language": model_args.tune_mm_llm,
    }


def component_table(model_args: ModelArguments, training_args: TrainingArguments) -> dict[str, Component]:
    """The whole table, from the command line; an absent learning rate is --learning_rate."""
    rates = {
        "vision": training_args.vision_tower_lr,
        "merger": training_args.mm_projector_lr,
        "language": None,
    }
    return {
        name: Component(
            name,
            trainable,
            training_args.learning_rate if rates[name] is None else rates[name],
            training_args.weight_decay,
        )
        for name, trainable in trained_components(model_args).items()
    }


def set_model(model_args: ModelArguments, model: nn.Module) -> None:
    """Freeze or free each parameter of `model` as the --tune_mm_* flags say.

    Raises ValueError where no component is to be trained.
    """
    trained = trained_components(model_args)
    if not any(trained.values()):
        raise ValueError(
            "nothing to train: pass --tune_mm_llm True, --tune_mm_mlp True, --tune_mm_vision True or several"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[component_of(name)])


def undecayed_parameters(model: nn.Module) -> set[str]:
    """Names of what gets no weight decay: biases, norm weights, the decay rates of linear attention, and the
    magnitudes of DoRA adapters.
    """
    names = set()
    for prefix, module in model.named_modules():
        norm = type(module).__name__.endswith(("Norm", "NormGated"))
        for name, _ in module.named_parameters(recurse=False):
            if norm or name.endswith(("bias", "A_log")) or "lora_magnitude_vector" in prefix:
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def parameter_groups(model: nn.Module, table: dict[str, Component], *, muon: bool = False) -> list[dict]:
    """Optimiser groups, one per component and kind of decay, each with its own learning rate.

    Each group carries its `name`, such as "merger" or "merger, no decay".  With `muon` the matrices of layers
    make groups of their own, marked for `MuonAndAdamW`.
    """
    undecayed = undecayed_parameters(model)
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = (component_of(name), name not in undecayed, muon and is_layer_matrix(name, parameter))
            groups.setdefault(kind, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": table[component].learning_rate,
            "weight_decay": table[component].weight_decay if decayed else 0.0,
            "name": component + (", matrices" if matrices else "") + ("" if decayed else ", no decay"),
        }
        | ({"muon": True} if matrices else {})
        for (component, decayed, matrices), parameters in groups.items()
    ]


def is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a weight maps features to features: no embedding, no head, no kernel, no stack of experts."""
    return parameter.ndim == 2 and "embed" not in name and "lm_head" not in name


def describe(model: nn.Module, table: dict[str, Component]) -> Iterator[str]:
    """One line a component: trained or frozen, parameters, learning rate."""
    total = dict.fromkeys(table, 0)
    trained = dict.fromkeys(table, 0)
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # PEFT keeps a frozen copy of what it trains in full.
            continue
        # ZeRO-3 leaves an empty tensor in place of a weight that it has split, and its size beside it.
        size = getattr(parameter, "ds_numel", parameter.numel())
        total[component_of(name)] += size
        trained[component_of(name)] += size if parameter.requires_grad else 0
    for name, component in table.items():
        if trained[name]:
            state = f"{trained[name]:,} of {total[name]:,} parameters at rate {component.learning_rate:g}"
        else:
            state = f"frozen, {total[name]:,} parameters"
        yield f"{name}: {state}"
