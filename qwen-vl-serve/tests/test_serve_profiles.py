"""What is chosen for which checkpoint on which machine, and how the user's flags and a profile's meet."""

import json
from dataclasses import replace

import pytest

from qwen_vl_serve.checkpoint import Checkpoint, chat_template, find_checkpoint, starts_thinking
from qwen_vl_serve.flags import combine, given, read_flags
from qwen_vl_serve.hardware import Gpu, Hardware, find_hardware, visible_gpus
from qwen_vl_serve.profiles import Wishes, make_plan, tensor_parallel

TEXT = {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 12288}
TEXT |= {"max_position_embeddings": 262144}
TEXT |= {"rope_scaling": {"mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_type": "default"}}
DENSE = Checkpoint("dense", None, True, {"model_type": "qwen3_vl", "text_config": TEXT})
EXPERTS = {**TEXT, "num_attention_heads": 64, "num_key_value_heads": 4, "num_experts": 128}
EXPERTS |= {"moe_intermediate_size": 1536}
MOE = replace(DENSE, model="moe", config={"model_type": "qwen3_vl_moe", "text_config": EXPERTS})
MOE_FP8 = replace(MOE, config={**MOE.config, "quantization_config": {"quant_method": "fp8"}})
H100 = Gpu("H100", 79.6, 9.0)
LISTING = """0, GPU-aaaa-1, NVIDIA H100 80GB HBM3, 81559, 9.0
1, GPU-bbbb-2, NVIDIA GB10, [N/A], 12.1
"""


def flags(text):
    return read_flags(text.split())


def plan(checkpoint=DENSE, gpus=0, wishes=None, user="", **more):
    found = Hardware((H100,) * gpus, cpus=2)
    return make_plan(checkpoint, found, wishes or Wishes(), flags(user), **more)


def value(arguments, name):
    told = given(read_flags(arguments), name)
    return told[0] if told else told


@pytest.mark.parametrize(
    ("checkpoint", "gpus", "profile", "split"),
    [
        (DENSE, 0, "cpu", None),
        (DENSE, 1, "gpu", None),
        (MOE_FP8, 1, "gpu", None),
        (DENSE, 2, "gpus", "2"),
        (DENSE, 6, "gpus", "4"),
        (MOE, 8, "gpus", "8"),
        (MOE_FP8, 8, "moe-fp8", "8"),
    ],
)
def test_the_machine_and_the_checkpoint_choose_the_profile(checkpoint, gpus, profile, split):
    chosen = plan(checkpoint, gpus)
    assert chosen.notes[0].startswith(f"profile {profile} (")
    assert value(chosen.arguments, "tensor-parallel-size") == split
    assert (value(chosen.arguments, "enable-expert-parallel") == ()) == (profile == "moe-fp8")
    assert value(chosen.arguments, "max-model-len") == ("4096" if profile == "cpu" else "auto")
    assert any("4 of the 6 GPUs" in note for note in chosen.notes) == (gpus == 6)


@pytest.mark.parametrize(
    ("change", "gpus", "split"),
    [
        ({}, 64, 32),
        ({"num_attention_heads": 28, "num_key_value_heads": 4}, 8, 4),
        ({"num_key_value_heads": 6}, 8, 2),
        ({"intermediate_size": 18}, 8, 2),
        ({}, 1, 1),
    ],
)
def test_a_model_is_split_as_far_as_its_sizes_divide(change, gpus, split):
    checkpoint = replace(DENSE, config={"text_config": {**TEXT, **change}})
    assert tensor_parallel(checkpoint, gpus, by_experts=False) == split


def test_experts_decide_how_far_they_are_split():
    odd = replace(MOE, config={"text_config": {**EXPERTS, "num_experts": 6, "moe_intermediate_size": 20}})
    assert tensor_parallel(odd, 8, by_experts=True) == 2
    assert tensor_parallel(odd, 8, by_experts=False) == 4


def test_what_a_small_or_old_gpu_means_is_said():
    heavy = replace(DENSE, weights=90.0)
    assert any("90 GiB" in note for note in plan(heavy, 1).notes)
    assert not any("90 GiB" in note for note in plan(heavy, 2).notes)
    old = make_plan(DENSE, Hardware((Gpu("T4", 15.0, 7.5),), 2), Wishes())
    assert value(old.arguments, "dtype") == "half"
    assert any("too old for bfloat16" in note for note in old.notes)


def test_without_config_only_what_needs_none_is_planned():
    remote = Checkpoint("Qwen/Qwen3-VL-8B-Instruct", None, False, None, problem="no network")
    assert value(plan(remote, 1).arguments, "served-model-name") == "Qwen/Qwen3-VL-8B-Instruct"
    assert value(plan(remote, 8, Wishes(profile="published")).arguments, "port") == "22002"
    for wishes in (Wishes(), Wishes(profile="gpus"), Wishes(profile="published", long_context=2.0)):
        with pytest.raises(ValueError, match=r"needs its config\.json, which can't be had: no network"):
            plan(remote, 8, wishes)


def test_long_context_stretches_positions_and_keeps_the_sections():
    stretched = plan(DENSE, 1, Wishes(long_context=3.0)).arguments
    inner = json.loads(value(stretched, "hf-overrides"))["text_config"]
    assert inner["max_position_embeddings"] == 786432
    assert inner["rope_parameters"] == {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 262144,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    }
    assert value(stretched, "max-model-len") == "auto"
    assert value(plan(DENSE, 0, Wishes(long_context=2.0)).arguments, "max-model-len") == "524288"
    # Qwen's README asks for a million tokens at a factor of 3.
    million = plan(DENSE, 1, Wishes(long_context=3.0), "--max-model-len 1m").arguments
    inner = json.loads(value(million, "hf-overrides"))["text_config"]
    assert inner["max_position_embeddings"] == 1_000_000


@pytest.mark.parametrize(
    ("wishes", "told"),
    [
        (Wishes(long_context=1.0), "a factor above 1"),
        (Wishes(rope_scaling={"factor": 2.0}), "original_max_position_embeddings, rope_type missing"),
        (Wishes(rope_scaling={"factor": 2.0}, long_context=2.0), "give one of them"),
        (Wishes(profile="moe-fp8"), "--profile gpus"),
    ],
)
def test_wishes_that_cannot_be_are_refused(wishes, told):
    with pytest.raises(ValueError, match=told):
        plan(DENSE, 2, wishes)


def test_modifiers_go_with_every_profile():
    wishes = Wishes(images_only=True, client_frames=True, reasoning=True, tools=True, stock_media=True)
    for gpus in (0, 1, 4):
        chosen = plan(DENSE, gpus, wishes)
        assert json.loads(value(chosen.arguments, "limit-mm-per-prompt")) == {"image": 64, "video": 0}
        assert json.loads(value(chosen.arguments, "media-io-kwargs")) == {"video": {"num_frames": -1}}
        assert value(chosen.arguments, "reasoning-parser") == "qwen3"
        assert value(chosen.arguments, "tool-call-parser") == "hermes"
        assert value(chosen.arguments, "mm-processor-kwargs") is None  # vLLM's own media
        assert not {"VLLM_MEDIA_CONNECTOR", "QWENVL_MEDIA"} & chosen.environment.keys()
        assert chosen.environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"


def test_what_the_user_has_set_in_the_environment_stays():
    environ = {"VLLM_CPU_KVCACHE_SPACE": "8", "OMP_NUM_THREADS": "4", "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "1"}
    environment = plan(environ=environ).environment
    assert not {"VLLM_CPU_KVCACHE_SPACE", "OMP_NUM_THREADS"} & environment.keys()
    assert environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"  # this one is no matter of taste
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    many = make_plan(DENSE, Hardware(cpus=32), Wishes())
    assert many.environment["VLLM_CPU_OMP_THREADS_BIND"] == "auto"
    assert "OMP_NUM_THREADS" not in many.environment


@pytest.mark.parametrize(
    ("profile", "user", "environ", "warned"),
    [
        (None, "", {}, False),
        ("published", "", {}, True),
        ("published", "--host 127.0.0.1", {}, False),
        ("published", "--api-key secret", {}, False),
        (None, "--host ::", {"VLLM_API_KEY": "secret"}, False),
        (None, "--host=192.168.1.7", {}, True),
    ],
)
def test_a_door_left_open_is_told(profile, user, environ, warned):
    notes = plan(DENSE, 1, Wishes(profile=profile), user, environ=environ).notes
    assert any("without a key" in note for note in notes) == warned


PROFILE = {"dtype": "float32", "enforce-eager": True, "tensor-parallel-size": 2}
PROFILE |= {"limit": {"image": 64, "video": {"count": 1, "num_frames": 32}}}


@pytest.mark.parametrize(
    ("user", "wanted"),
    [
        ("", "--dtype float32 --enforce-eager --tensor-parallel-size 2"),
        ("--dtype=half", "--enforce-eager --tensor-parallel-size 2 --dtype=half"),
        ("--no_enforce_eager", "--dtype float32 --tensor-parallel-size 2 --no_enforce_eager"),
        ("-tp 4 -x", "--dtype float32 --enforce-eager -tp 4 -x"),
        ("--tensor_parallel_size 4", "--dtype float32 --enforce-eager --tensor_parallel_size 4"),
        ("--max-model-len -1", "--dtype float32 --enforce-eager --tensor-parallel-size 2 --max-model-len -1"),
        ("--a b c --d", "--dtype float32 --enforce-eager --tensor-parallel-size 2 --a b c --d"),
    ],
)
def test_the_users_flags_win_however_they_are_written(user, wanted):
    plain = {name: told for name, told in PROFILE.items() if name != "limit"}
    assert " ".join(combine(plain, flags(user))) == wanted


@pytest.mark.parametrize(
    ("user", "wanted"),
    [
        ([], ["--limit", json.dumps(PROFILE["limit"])]),
        (
            ["--limit", '{"video": {"count": 3}}'],
            ["--limit", '{"image": 64, "video": {"count": 3, "num_frames": 32}}'],
        ),
        (['--limit={"image": 1}'], ["--limit", '{"image": 1, "video": {"count": 1, "num_frames": 32}}']),
        (["--limit", '{"video": 0}'], ["--limit", '{"image": 64, "video": 0}']),
        (
            ["--limit.image", "4"],
            ["--limit.video.count", "1", "--limit.video.num_frames", "32", "--limit.image", "4"],
        ),
        (["--limit.video=0"], ["--limit.image", "64", "--limit.video=0"]),
        (["--limit", "{broken"], ["--limit", "{broken"]),
    ],
)
def test_flags_with_json_are_put_together_key_by_key(user, wanted):
    assert list(combine({"limit": PROFILE["limit"]}, read_flags(user))) == wanted


def test_a_config_file_of_the_users_wins_over_the_profile():
    configured = {"dtype": "half", "limit": {"image": 2}}
    arguments = combine(PROFILE, [], configured)
    assert "--dtype" not in arguments and "--enforce-eager" in arguments
    assert json.loads(arguments[arguments.index("--limit") + 1])["image"] == 2
    assert combine(PROFILE, flags("--dtype bfloat16"), configured)[-2:] == ("--dtype", "bfloat16")


def test_gpus_are_those_that_cuda_would_show():
    first, second = visible_gpus(LISTING, None)
    assert (first.name, round(first.memory), first.capability) == ("NVIDIA H100 80GB HBM3", 80, 9.0)
    assert (second.memory, second.capability) == (None, 12.1)
    assert visible_gpus(LISTING, "1") == (second,)
    assert visible_gpus(LISTING, "GPU-bbbb, 0") == (second, first)
    assert visible_gpus(LISTING, "0,7,1") == (first,)  # CUDA stops at what it does not know
    assert visible_gpus(LISTING, "") == visible_gpus(LISTING, "-1") == visible_gpus("", None) == ()
    assert len(visible_gpus(LISTING, "MIG-1,MIG-2")) == 2
    assert str(Hardware((first, first), 8)) == "2 x NVIDIA H100 80GB HBM3 with 80 GiB"


def test_a_broken_driver_is_told(tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Driver/library version mismatch'\nexit 18\n")
    tool.chmod(0o755)
    found = find_hardware({"PATH": str(tmp_path)})
    assert found.gpus == () and found.problem == "nvidia-smi says: Driver/library version mismatch"
    assert any(found.problem in note for note in make_plan(DENSE, found, Wishes()).notes)
    assert find_hardware({"PATH": "/nowhere"}).problem == ""


def test_thinking_is_seen_in_the_template(tmp_path):
    nano = find_checkpoint("models/qwen3-vl-nano")
    template = chat_template(nano.folder)
    assert not starts_thinking(template, {})
    assert starts_thinking(template, {"enable_thinking": True})
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "default", "template": "{{ messages[0].role }}<think>\n"}]})
    )
    assert starts_thinking(chat_template(tmp_path), {})
    with pytest.raises(ValueError, match="the chat template can't be rendered"):
        starts_thinking("{{ raise_exception('no') }}", {})


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, r"config\.json is missing"), ("{", "not JSON"), ("[]", "holds a list, not an object")],
)
def test_a_broken_checkpoint_is_named(tmp_path, content, told):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=told):
        find_checkpoint(str(tmp_path))
