"""Clients that read: generate()'s assistants, lm-eval, offloading, quantisation and the server of transformers."""

import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

PROMPT = "def area(self"


def greedy(model, tokenize, **options):
    inputs = tokenize(PROMPT, return_tensors="pt")
    return model.generate(**inputs, min_new_tokens=24, max_new_tokens=24, do_sample=False, **options)


def test_a_stop_string_ends_the_text(load, tokenizer):
    model, pieces = load(), [tokenizer.decode(token) for token in range(len(tokenizer))]
    odd = [token for token, piece in enumerate(pieces) if not (piece.isascii() and piece.isprintable())]
    options = {"suppress_tokens": odd}  # parts of characters
    whole = greedy(model, tokenizer, **options)[0]
    first = len(tokenizer(PROMPT)["input_ids"])
    stop = pieces[whole[first + 2]]
    ids = greedy(model, tokenizer, stop_strings=[stop], tokenizer=tokenizer, **options)[0]
    assert first < len(ids) < len(whole) and torch.equal(ids, whole[: len(ids)])
    assert stop in tokenizer.decode(ids[first:]) and stop not in tokenizer.decode(ids[first:-1])


@pytest.mark.parametrize("speculation", ["assistant", "prompt lookup"])
def test_speculative_decoding_equals_greedy(load, tokenizer, speculation):
    model = load()
    options = {"prompt_lookup_num_tokens": 3} if speculation == "prompt lookup" else {"assistant_model": load()}
    assert torch.equal(greedy(model, tokenizer, **options), greedy(model, tokenizer))


@pytest.mark.parametrize("place", ["cpu_offload", "disk_offload", "device_map"])
def test_offloaded_weights_give_the_same_logits(load, tmp_path, place):
    accelerate = pytest.importorskip("accelerate")
    ids, model = torch.arange(3, 40)[None], load()
    with torch.no_grad():
        want = model(ids).logits
        if place == "cpu_offload":
            model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        elif place == "disk_offload":
            model = accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        else:
            blocks = {f"model.layers.{layer}": ("cpu", "disk")[layer % 2] for layer in range(len(model.model.layers))}
            others = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
            model = load(device_map=blocks | others, offload_folder=tmp_path)
        assert torch.equal(model(ids).logits, want)


def test_int8_weights_of_torchao_are_near_and_the_router_keeps_float32(load):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    ids, options = torch.arange(3, 40)[None], {"device_map": "cpu", "dtype": torch.float32}
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        want, model = load(**options)(ids).logits, load(quantization_config=config, **options)
        got = model(ids).logits
    weights = {name: type(weight).__name__ for name, weight in model.named_parameters()}
    assert "Int8Tensor" in weights["model.layers.0.projection.qkv_proj.weight"]
    assert weights["model.layers.0.router.weight"] == "Parameter"
    assert 0 < (got - want).norm() / want.norm() < 0.1


def test_lm_eval_scores_and_runs_a_task(load, tokenizer, tmp_path):
    pytest.importorskip("lm_eval")
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = load()
    client = HFLM(pretrained=model, tokenizer=tokenizer, max_length=256, batch_size=2, device="cpu")
    pairs = [("def f", "(x): return x"), ("def area(self, width):", " return self.height * width"), ("a", "b")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    for (context, end), (score, _) in zip(pairs, client.loglikelihood(requests, disable_tqdm=True), strict=True):
        first, last = (client.tok_encode(text) for text in (context, context + end))
        with torch.no_grad():
            scores = model(torch.tensor([last])).logits.log_softmax(-1)[0, :-1]
        want = scores[range(len(last) - 1), last[1:]][len(first) - 1 :].sum().item()
        assert score == pytest.approx(want, rel=1e-4)
    rows = [{"question": f"{n} + {n} =", "choices": [str(2 * n), str(2 * n + 1)], "answer": 0} for n in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sums.yaml").write_text(
        f"""task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "sums.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(client, tasks=["sums"], task_manager=manager, bootstrap_iters=0)
    assert 0.0 <= results["results"]["sums"]["acc,none"] <= 1.0


SERVE = """
import transformers
from transformers.cli.transformers import main

transformers.HSPMNForCausalLM = transformers.AutoModelForCausalLM  # `serve` looks for the class in the library
main()
"""


def test_transformers_serve_answers_a_chat_turn(folder, tmp_path):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, *f"serve {folder} --trust-remote-code --device cpu --port {port}".split()]
    body = {"model": str(folder), "messages": [{"role": "user", "content": "def area"}], "max_tokens": 8}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            for _ in range(120):
                try:
                    answer = json.load(urllib.request.urlopen(request, timeout=60))
                    break
                except urllib.error.URLError as error:
                    assert not hasattr(error, "code") and server.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.5)
        finally:
            server.terminate()
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant" and message["content"] and answer["usage"]["completion_tokens"] <= 8
