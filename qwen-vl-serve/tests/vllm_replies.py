"""Run by tests in .venv-vllm: answer conversations with the offline engine.

    python vllm_replies.py TASK.json REPLIES.json

TASK {"checkpoint", "adapter" or null, "batch": [conversation], "max_new_tokens", "json_schema"}
REPLIES {"adapter" and "base": {"generated", "streamed", "pieces"}, "constrained", "unfinished"}
"""

import dataclasses
import json
import sys

from qwen_vl_serve import Finished, Sampling, open_backend


def answers(backend, batch, sampling):
    result = {"generated": backend.generate(batch, sampling), "streamed": [], "pieces": []}
    for messages in batch:
        *pieces, last = backend.stream(messages, sampling)
        assert isinstance(last, Finished)
        result["pieces"].append([piece.text for piece in pieces])
        result["streamed"].append(last.reply)
    return result


def main(task_file: str, replies_file: str) -> None:
    with open(task_file) as file:
        task = json.load(file)
    batch, sampling = task["batch"], Sampling(temperature=0, max_new_tokens=task["max_new_tokens"])
    backend = open_backend(task["checkpoint"], engine="vllm", adapter=task["adapter"])
    result = {}
    if task["adapter"]:
        result["adapter"] = answers(backend, batch, sampling)
        backend._adapter = None
    result["base"] = answers(backend, batch, sampling)
    constrained = Sampling(temperature=0, max_new_tokens=200, json_schema=task["json_schema"])
    result["constrained"] = backend.generate(batch[:2], constrained)

    stream = backend.stream(batch[0], Sampling(temperature=0, max_new_tokens=3000, repetition_penalty=1.3))
    next(stream)
    stream.close()
    result["unfinished"] = backend.engine.get_num_unfinished_requests()
    backend.close()
    with open(replies_file, "w") as file:
        json.dump(result, file, default=dataclasses.asdict)


if __name__ == "__main__":
    main(*sys.argv[1:])
