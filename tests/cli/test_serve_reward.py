"""``tandem serve-reward`` in a process of its own: it answers what the model says, in batches, and it stops well."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from helpers.models import make_module, make_tokenizer

from tandem.cli.main import main
from tandem.models.loading import load_scalar
from tandem.rewards.model import RewardModel
from tandem.rewards.process import RewardProcesses
from tandem.roles import RewardBatch
from tandem.rollout.judging import reward_batch, rollout_of
from tandem.training.scorer import LocalScorer
from tandem.types import Completion, Prompt
from tandem.workers.homes import seat_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    make_module("llama").save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    load_scalar(folder / "base", new_head="random", device="cpu").export(folder / "rm")
    (folder / "check.py").write_text(
        "def right(completions, answer, stop_reasons):\n"
        "    return [float(c == a) + (s == 'length') for c, a, s in zip(completions, answer, stop_reasons)]\n"
    )
    return folder


@pytest.fixture
def serve(folder):
    """Starts the command; returns (its process, its URL, the line that said so)."""
    started = []

    def begin(*words: str, **environment: str) -> tuple[subprocess.Popen[str], str, str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tandem", "serve-reward", *words, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env=os.environ | environment,
        )
        started.append(process)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if match := re.search(r"serving .* at (http://\S+)", line):
                return process, match[1], line
        raise AssertionError("".join(lines))

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def samples(texts: list[str]) -> RewardBatch:
    prompt = Prompt(prompt_id="p", prompt="ab=", token_ids=(2, 3, 4))
    stops = ["eos", "length"]
    completions = [
        Completion(token_ids=[5], behaviour_logp=[0.0], untruncated_logp=[0.0], stop=stops[i % 2], text=text)
        for i, text in enumerate(texts)
    ]
    return reward_batch([(prompt, rollout_of(prompt, i, c)) for i, c in enumerate(completions)])


def test_a_model_is_served(folder, serve, monkeypatch):
    process, url, said = serve("rm", "--batch-limit", "16", TANDEM_REWARD_TOKEN="hush", WORLD_SIZE="2", RANK="0")
    assert url.startswith("http://127.0.0.1:")
    assert "with a token" in said
    batch = samples(["abc"[: 1 + i % 3] * (1 + i % 5) for i in range(40)])
    model = load_scalar(folder / "rm", new_head="refuse", device="cpu")
    expected = RewardModel(seat_of(LocalScorer(model, token_budget=999)), model.tokenizer, reads_ids=False).score(batch)
    monkeypatch.setenv("TANDEM_REWARD_TOKEN", "hush")
    processes = RewardProcesses([url], deadline_s=30.0)
    (reward,) = processes.rewards()
    assert reward.score(batch) == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in expected}) > 10
    processes.close()

    ask = {"samples": [{"prompt": "ab=", "completion": "ba"}]}
    hush = {"authorization": "Bearer hush"}
    with httpx2.Client(trust_env=False) as client:
        known = client.get(f"{url}/health").json()
        assert known == {"status": "ok", "protocol": 1, "name": "rm", "version": known["version"], "batch_limit": 16}
        assert client.post(f"{url}/score", json=ask).status_code == 401
        assert client.post(f"{url}/score", json=ask, headers={"authorization": "Bearer hus"}).status_code == 401
        for wrong, status in (
            ({"samples": [*ask["samples"] * 17]}, 413),
            ({"samples": [{"prompt": "a"}]}, 422),
            ({"sample": []}, 422),
            ({"samples": [{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}]}, 422),
            ({"samples": [{"prompt": "a", "completion": [{"content": "b"}]}]}, 422),
            ({"samples": [{"prompt": "a", "completion": "b" * 128}]}, 422),
        ):
            assert client.post(f"{url}/score", json=wrong, headers=hush).status_code == status

        def one(number: int) -> float:
            return client.post(f"{url}/score", json=ask, headers=hush).json()["scores"][0]

        # Those that come together are judged together, also beside one that cannot be.
        with ThreadPoolExecutor(8) as pool:
            bad = pool.submit(client.post, f"{url}/score", json=wrong, headers=hush)
            scores = list(pool.map(one, range(24)))
            assert bad.result().status_code == 422
        assert scores == pytest.approx([scores[0]] * 24, abs=1e-5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) in (0, 143)


def test_a_function_is_served(serve):
    process, url, _ = serve("check.py:right")
    ask = [{"prompt": "q", "completion": c, "columns": {"answer": "a"}, "stop_reason": s}
           for c, s in (("a", "eos"), ("b", "eos"), ("a", "length"))]  # fmt: skip
    with httpx2.Client(trust_env=False) as client:
        answer = client.post(f"{url}/score", json={"samples": ask}).json()
        assert answer["scores"] == [1.0, 0.0, 2.0]
        refused = client.post(f"{url}/score", json={"samples": [{"prompt": "q", "completion": "a"}]})
        assert (refused.status_code, "wants the column 'answer'" in refused.text) == (422, True)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) in (0, 130)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./nothere"], "nothere"),
        (["base"], "no trained 'score' head"),
        (["check.py:wrong"], "no function 'wrong'; functions present: right"),
        (["rm", "--deadline", "5"], "--deadline: has no effect, since this run has no reward function"),
        (["rm", "--normalize-scores"], "rm: its config.json has no score_mean"),
        (["check.py:right", "--dtype", "bfloat16"], "--dtype: has no effect, since this run has no served model"),
        (["check.py:right", "--host", "300.1.1.1"], "300.1.1.1:8000 cannot be listened on"),
        (["rm", "--batch-limit", "0"], "--batch-limit: expected 1 or more"),
        ([], "missing --reward"),
    ],
)
def test_wrong_input(folder, monkeypatch, capsys, words, message):
    monkeypatch.chdir(folder)
    assert main(["serve-reward", *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tandem: error: ")]
    assert message in line
