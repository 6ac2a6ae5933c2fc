"""The transformers back end: stream, batch and the model library's own generate give the same tokens."""

import subprocess
import sys
import threading

import pytest
import torch
from PIL import Image

from qwen_vl_serve import GREEDY, Finished, ReasoningDelta, Sampling, TextDelta, open_backend
from qwen_vl_serve.answers import TextPieces
from qwen_vl_serve.backends.transformers import TransformersBackend
from qwen_vl_utils import MediaPolicy, MediaRefused

SHORT = Sampling(temperature=0, max_new_tokens=8)


def user(*items):
    kinds = {".png": "image", ".mp4": "video"}
    content = [
        {"type": kinds[item[-4:]], kinds[item[-4:]]: item}
        if item[-4:] in kinds
        else {"type": "text", "text": item}
        for item in items
    ]
    return [{"role": "user", "content": content}]


def prompts(pictures, clip):
    square, wide, small = pictures
    return [
        user("What is this?"),
        user(square, "What colour is the round thing on the left, and what stands beside it?"),
        user(wide, "a shape?"),
        user("First", small, "then", wide, "Which is larger?"),
        user(clip, "Where does it go?"),
        [{"role": "system", "content": "Be brief."}, *user(small, "Who?")],
        [*user(small, "Who?"), {"role": "assistant", "content": "me"}, *user("Sure?")],
    ]


def streamed(backend, messages, sampling=SHORT):
    *pieces, last = backend.stream(messages, sampling)
    assert all(isinstance(piece, TextDelta) and piece.text for piece in pieces)
    assert isinstance(last, Finished)
    assert "".join(piece.text for piece in pieces) == last.reply.text
    return last.reply


def test_a_batch_equals_one_by_one_equals_the_stream(any_backend, pictures, clip):
    batch = prompts(pictures, clip)
    together = any_backend.generate(batch, SHORT)
    alone = [any_backend.generate([messages], SHORT)[0] for messages in batch]
    assert together == alone
    assert [streamed(any_backend, messages) for messages in batch] == alone
    assert len({reply.token_ids for reply in together}) == len(batch)
    assert {reply.prompt_tokens for reply in together} != {together[0].prompt_tokens}


def test_the_tokens_are_those_of_the_model_library_alone(any_backend, pictures):
    """Template, processor and generate called as the model library's documentation does."""
    processor, model = any_backend.processor, any_backend.model
    messages = user(pictures[0], "What is this?")
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    picture = Image.open(pictures[0])
    inputs = processor(text=[text], images=[picture], do_resize=False, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    prompt = inputs["input_ids"].shape[1]
    (reply,) = any_backend.generate([messages], SHORT)
    assert reply.prompt_tokens == prompt
    assert list(reply.token_ids) == output[0, prompt:].tolist()
    assert reply.text == processor.tokenizer.decode(output[0, prompt:], skip_special_tokens=True)
    assert (reply.finish_reason, reply.completion_tokens) == ("length", 8)


@pytest.fixture
def ends_at(backend):
    """Makes some token end the model's turn, for one test."""
    before = backend._ends

    def end(token):
        backend._ends = frozenset({token})

    yield end
    backend._ends = before


def test_an_ended_answer_is_cut_at_its_end_token_in_a_batch_too(backend, pictures, clip, ends_at):
    batch = prompts(pictures, clip)[:3]
    ids = [reply.token_ids for reply in backend.generate(batch, SHORT)]
    end = ids[1][3]
    ends_at(end)
    replies = backend.generate(batch, SHORT)
    for reply, full in zip(replies, ids, strict=True):
        length = full.index(end) + 1 if end in full else 8
        assert reply.token_ids == full[:length]
        assert reply.finish_reason == ("stop" if end in full else "length")
    assert replies[1].completion_tokens <= 4
    assert [streamed(backend, messages) for messages in batch] == replies


def test_generation_config_decides_what_the_caller_leaves_open(backend, pictures, monkeypatch):
    messages = user(pictures[0], "Why?")
    monkeypatch.setattr(backend.model.generation_config, "max_new_tokens", 3)
    assert backend.generate([messages], GREEDY)[0].completion_tokens == 3
    for name, value in {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.9}.items():
        monkeypatch.setattr(backend.model.generation_config, name, value)
    config = backend._generation_config(Sampling())
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.9, 30, 0.9)
    config = backend._generation_config(Sampling(top_p=0.5, max_new_tokens=7))
    assert (config.top_p, config.top_k, config.max_new_tokens) == (0.5, 30, 7)
    assert backend._generation_config(GREEDY).do_sample is False
    assert backend.model.generation_config.top_p == 0.9  # the checkpoint's own is left as it was


def test_a_seed_repeats_a_sampled_answer_and_leaves_the_generators_alone(backend, pictures):
    messages = user(pictures[1], "Tell me.")
    state = torch.random.get_rng_state()
    answers = [
        streamed(backend, messages, Sampling(temperature=1.0, max_new_tokens=12, seed=seed)).token_ids
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]
    assert answers[0] != streamed(backend, messages).token_ids
    assert torch.equal(state, torch.random.get_rng_state())


def test_closing_the_stream_stops_the_model(backend, pictures, monkeypatch):
    steps = 0

    def count(*_):
        nonlocal steps
        steps += 1

    with backend.model.register_forward_hook(count):
        stream = backend.stream(user(pictures[0], "Go on."), Sampling(temperature=0, max_new_tokens=2000))
        next(stream)
        stream.close()
        after_close = steps
        backend.generate([user("next")], Sampling(temperature=0, max_new_tokens=1))
    assert steps == after_close + 1  # nothing runs on behind the reader's back
    assert steps < 200


def test_an_error_while_answering_reaches_the_reader_and_the_next_prompt_works(backend, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory, say")

    with backend.model.register_forward_hook(fail), pytest.raises(RuntimeError, match="out of memory"):
        list(backend.stream(user("Hello"), SHORT))
    assert streamed(backend, user("Hello")).completion_tokens == 8


def test_readers_in_several_threads_get_their_own_answers(backend, pictures, clip):
    batch = prompts(pictures, clip)[:4]
    expected = backend.generate(batch, SHORT)
    got = [None] * len(batch)

    def read(place):
        got[place] = streamed(backend, batch[place])

    threads = [threading.Thread(target=read, args=(place,)) for place in range(len(batch))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_streams_take_turns_token_by_token_and_keep_their_own_state(backend, pictures, clip):
    """Two of them sampled with a seed: neither their random numbers nor their positions mix."""
    kinds = [SHORT, Sampling(temperature=1.0, seed=1, max_new_tokens=8), SHORT]
    kinds.append(Sampling(temperature=1.0, seed=2, max_new_tokens=8))
    batch = prompts(pictures, clip)[1:5]
    expected = [streamed(backend, *pair) for pair in zip(batch, kinds, strict=True)]
    state = torch.random.get_rng_state()
    order, got = [], [None] * len(batch)
    begin = threading.Barrier(len(batch))

    def read(place):
        begin.wait()
        for event in backend.stream(batch[place], kinds[place]):
            order.append(place)
            got[place] = event

    threads = [threading.Thread(target=read, args=(place,)) for place in range(len(batch))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.reply for event in got] == expected
    assert order != sorted(order)  # nobody waited for another's whole answer
    assert torch.equal(state, torch.random.get_rng_state())


def test_presence_penalty_is_openais(backend, pictures):
    """Subtracted once from the logit of each token that the answer holds; greedy, computed by hand here."""
    messages, penalty = user(pictures[0], "Say more."), 1.5
    (reply,) = backend.generate(
        [messages], Sampling(temperature=0, max_new_tokens=12, presence_penalty=penalty)
    )
    assert (
        reply.token_ids != streamed(backend, messages, Sampling(temperature=0, max_new_tokens=12)).token_ids
    )
    inputs = backend._inputs([messages], ())
    ids = inputs.pop("input_ids")
    inputs.pop("attention_mask"), inputs.pop("mm_token_type_ids")
    answer = []
    for _ in range(reply.completion_tokens):
        row = torch.cat([ids, torch.tensor([answer], dtype=ids.dtype)], dim=1)
        types = (row == backend.processor.image_token_id).long()
        with torch.no_grad():
            logits = backend.model(input_ids=row, mm_token_type_ids=types, use_cache=False, **inputs).logits
        scores = logits[0, -1]
        scores[sorted(set(answer))] -= penalty
        answer.append(int(scores.argmax()))
    assert tuple(answer) == reply.token_ids


def test_tools_are_rendered_and_a_schema_is_refused(backend):
    tool = {"type": "function", "function": {"name": "click", "description": "", "parameters": {}}}
    plain, offered = (backend.generate([user("Click.")], SHORT, tools=tools)[0] for tools in ((), (tool,)))
    assert offered.prompt_tokens > plain.prompt_tokens
    assert "click" in backend.processor.tokenizer.decode(offered.prompt_token_ids)
    with pytest.raises(ValueError, match=r"json_schema.*engine='vllm'"):
        backend.generate([user("JSON!")], Sampling(json_schema={"type": "object"}))


def test_a_thinking_model_is_read_from_its_prompt_on(lively):
    thinking = {"enable_thinking": True}
    backend = open_backend(lively("qwen3_vl"), device="cpu", chat_template_kwargs=thinking)
    reply = streamed_with_thoughts(backend, user("Hm?"))
    assert reply.reasoning and not reply.text


def streamed_with_thoughts(backend, messages):
    *pieces, last = backend.stream(messages, SHORT)
    assert (
        "".join(piece.text for piece in pieces if isinstance(piece, ReasoningDelta)) == last.reply.reasoning
    )
    assert "".join(piece.text for piece in pieces if isinstance(piece, TextDelta)) == last.reply.text
    return last.reply


def test_text_pieces_join_to_the_whole_and_never_split_a_character(backend):
    tokenizer = backend.processor.tokenizer
    random = torch.Generator().manual_seed(0)
    texts = ["plain words", "Grüße, 你好, 🦆🦆!", "e\u0301 \u200d ﷽"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    rows += torch.randint(0, len(tokenizer), (200, 20), generator=random).tolist()  # broken UTF-8 and all
    for ids in rows:
        pieces = TextPieces(tokenizer)
        shown = [pieces.add(token) for token in ids]
        assert not any(piece.endswith("\ufffd") for piece in shown)
        assert "".join(shown) + pieces.rest() == tokenizer.decode(ids, skip_special_tokens=True)
        assert pieces.token_ids == ids


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"engine": "vllm"}, ModuleNotFoundError, "the engine 'vllm' needs the package vllm: pip install"),
        ({"engine": "openai"}, ValueError, "engine='openai' does not fit"),
    ],
)
def test_an_engine_that_can_not_be_had_says_why(lively, arguments, error, told):
    with pytest.raises(error, match=told):
        open_backend(lively("qwen3_vl"), **arguments)


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_p": 1.1}, {"max_new_tokens": 0}, {"repetition_penalty": -0.5}]
)
def test_sampling_out_of_bounds_is_refused_by_name(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=rf"Sampling\.{name} is {value}"):
        Sampling(**bad)


def test_a_policy_decides_which_files_a_message_may_name(backend, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (64, 64)).save(secret)
    messages = user(str(secret), "what is it?")
    assert backend.generate([messages], SHORT)
    guarded = TransformersBackend(backend.model, backend.processor, MediaPolicy.strict())
    with pytest.raises(MediaRefused, match="schemes"):
        guarded.generate([messages], SHORT)
    with pytest.raises(MediaRefused, match="schemes"):
        next(guarded.stream(messages, SHORT))


def test_no_prompts_no_replies(backend):
    assert backend.generate([], SHORT) == []


def test_a_folder_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint, config\.json is missing"):
        open_backend(tmp_path)


def test_importing_the_package_loads_no_model_library():
    code = "import sys, qwen_vl_serve; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
