"""``tandem export``: the run's own bytes, from whichever of its folders, or one line."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from helpers.runs import write_inputs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tandem.cli.main import main
from tandem.tasks.tiny import build_model, build_tokenizer


@pytest.fixture(scope="module", autouse=True)
def online():
    """There is a hub here, in this process. A tokenizer that is read without one is written with that mark."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs of 4 steps with a checkpoint every 2: SFT of a model with tied embeddings, and a reward model."""
    folder = tmp_path_factory.mktemp("made")
    write_inputs(folder)
    tied = build_tokenizer("abcdefghijklmnopqrstuvwxyz=")
    build_model(0, tokenizer=tied, hidden_size=64, layers=1).save_pretrained(folder / "tied")
    tied.save_pretrained(folder / "tied")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        common = ["--steps", "4", "--save-every", "2", "--batch-size", "4"]
        assert main(["sft", "--model", "tied", "--data", "demos.jsonl", "--out", "sft", *common]) == 0
        assert main(["rm", "--model", "base", "--data", "pairs.jsonl", "--out", "rm", *common]) == 0
    return folder


@pytest.fixture
def runs(made, tmp_path, monkeypatch):
    for name in ("sft", "rm"):
        shutil.copytree(made / name, tmp_path / name)
    for name in ("base", "tied"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def measured(run, *, scaled):
    """The files of a run's model; without ``scaled`` their config lacks what a run measures when it is done."""
    found = files(f"{run}/model")
    config = json.loads(found["config.json"])
    assert ("score_mean" in config) == (run == "rm")
    if not scaled and run == "rm":
        del config["score_mean"], config["score_std"]
        found["config.json"] = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
    return found


def test_a_reward_model_that_is_trained_on_has_no_scale_of_before(runs):
    """Its pairs are alike now, so that there is none to measure, and its checkpoint has none either."""
    Path("alike.jsonl").write_text('{"prompt": "a=", "chosen": "b", "rejected": "b"}\n' * 4)
    words = ["--model", "rm/model", "--data", "alike.jsonl", "--steps", "1", "--batch-size", "4", "--out", "on"]
    assert main(["rm", *words]) == 0
    assert export("--model", "on/checkpoints/step_00000001", "--out", "step") == 0
    assert "score_mean" in files("rm/model")["config.json"].decode()
    for folder in ("on/model", "step"):
        assert "score_mean" not in files(folder)["config.json"].decode()


def export(*words):
    return main(["export", *map(str, words)])


@pytest.mark.parametrize("run", ["sft", "rm"])
def test_the_last_checkpoint_is_the_model_that_the_run_wrote(runs, run):
    """Byte for byte, from the checkpoint's folder, its file, the finished run, and the run that wrote no model yet."""
    last = f"{run}/checkpoints/step_00000004"
    for number, source in enumerate([last, f"{last}/actor.pt", run, f"{run}/model"]):
        assert export("--model", source, "--out", f"out{number}") == 0
        assert files(f"out{number}") == measured(run, scaled=source == f"{run}/model" or source == run)
    written = measured(run, scaled=False)
    shutil.rmtree(f"{run}/model")
    assert export("--model", run, "--out", "unfinished") == 0
    assert files("unfinished") == written


def test_a_run_that_has_gone_on_is_its_newest_checkpoint(runs, capsys):
    """Resumed for more steps and killed in the midst of them: not the model of the steps before."""
    last = Path("sft/checkpoints/step_00000004")
    assert export("--model", last, "--out", "newest") == 0
    shutil.copy("tied/model.safetensors", "sft/model/model.safetensors")
    with Path("sft/events.jsonl").open("a") as file:
        file.write('{"event": "start", "step": 2}\n')
    assert export("--model", "sft", "--out", "found") == 0
    assert files("found") == files("newest")
    assert "sft: the run has gone on since it wrote sft/model" in capsys.readouterr().out


def test_another_step_and_dtype(runs):
    assert export("--model", "sft", "--step", "2", "--out", "a") == 0
    assert export("--model", "sft", "--step", "2", "--out", "b", "--dtype", "bfloat16") == 0
    saved = torch.load("sft/checkpoints/step_00000002/actor.pt", weights_only=True)["model"]
    a, b, last = (load_file(f"{folder}/model.safetensors") for folder in ("a", "b", "sft/model"))
    assert a.keys() == b.keys() == last.keys()
    assert all(torch.equal(a[name], saved[name]) and not torch.equal(a[name], last[name]) for name in a)
    assert all(torch.equal(b[name], a[name].bfloat16()) for name in a)
    model = AutoModelForCausalLM.from_pretrained("b")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert AutoModelForSequenceClassification.from_pretrained("rm/model").config.num_labels == 1


def refused(capsys, *words):
    capsys.readouterr()
    assert export(*words, "--out", "refused") == 2
    assert not Path("refused").exists()
    assert not Path(".refused-partial").exists()
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("tandem: error: ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sft", "--model", "base", "--out", "rm/model/next"], "lies in what the run in {}/rm writes (model)"),
        (["sft", "--model", "base", "--out", "rm/record"], "lies in what the run in {}/rm writes (record)"),
        (["export", "--model", "sft", "--out", "rm/checkpoints/x"], "lies in what the run in {}/rm writes"),
        (["export", "--model", "tied", "--out", "tied/half"], "lies in tied, which is read (model)"),
        (["export", "--model", "tied", "--out", "/proc/x"], "/proc: cannot be written: /proc: "),
        (["sft", "--model", "tied/", "--out", "tied/run"], "lies in tied/, which is read (model)"),
        (["sft", "--model", "base", "--data", "rows", "--out", "rows/a/run"], "lies in rows, which is read (data)"),
        (["sft", "--model", "base", "--data", "a.jsonl:1,json@rows:2", "--out", "rows/b"], "lies in rows, which is"),
        (["sft", "--model", "sft/model", "--out", "sft", "--overwrite"], "--overwrite would delete sft/model, which"),
        (["sft", "--model", "base", "--data", "rm/rollouts.jsonl", "--out", "rm", "--overwrite"], "rm/rollouts.jsonl"),
    ],
)  # fmt: skip
def test_no_out_lies_in_what_others_wrote_or_what_is_read(words, says, runs, capsys):
    Path("rows").mkdir()
    Path("rm/rollouts.jsonl").write_text("")
    before = sorted(runs.rglob("*"))
    given = [] if words[0] == "export" else ["--steps", "1"] + ([] if "--data" in words else ["--data", "demos.jsonl"])
    assert main([*words, *given]) == 2
    assert says.format(runs) in capsys.readouterr().err
    assert sorted(runs.rglob("*")) == before


def test_what_is_no_whole_checkpoint_is_refused(runs, capsys):
    step = Path("sft/checkpoints/step_00000004")
    actor, manifest = (step / "actor.pt").read_bytes(), (step / "manifest.json").read_text()
    shutil.rmtree("sft/model")
    (step / "actor.pt").write_bytes(actor[:-1] + bytes([actor[-1] ^ 1]))
    assert f"{step}/actor.pt: corrupt: sha256" in refused(capsys, "--model", "sft")
    (step / "actor.pt").write_bytes(actor[:500])
    assert f"{step}/actor.pt: truncated or changed" in refused(capsys, "--model", step)
    (step / "actor.pt").unlink()
    assert f"{step}/actor.pt: is missing" in refused(capsys, "--model", step)
    (step / "actor.pt").write_bytes(actor)
    (step / "manifest.json").write_text(manifest.replace('"seed": 0', '"seed": 1'))
    assert "a checkpoint of another run (seed 1, not 0)" in refused(capsys, "--model", step)
    (step / "manifest.json").unlink()
    assert "manifest.json: is missing" in refused(capsys, "--model", step)
    (step / "manifest.json").write_text(manifest)
    half = step.rename(step.with_name(".partial-step_00000004"))
    assert "not a whole checkpoint" in refused(capsys, "--model", half)
    assert "step_00000009: no such checkpoint; those of the run: step_00000002" in refused(
        capsys, "--model", "sft", "--step", "9"
    )
    assert "not a checkpoint of base: " in refused(capsys, "--model", "sft", "--base", "base")
    shutil.move("sft/checkpoints/step_00000002", "step_00000002")
    assert "config.yaml: does not say which model the run began with" in refused(capsys, "--model", "step_00000002")
    assert export("--model", "step_00000002", "--base", "tied", "--out", "moved") == 0
    assert "that has saved no checkpoint" in refused(capsys, "--model", "sft")
    assert "ema: a run keeps a running average of its policy, none of its critic" in refused(
        capsys, "--model", "sft", "--role", "critic", "--ema"
    )
    assert "no model folder ./nothing" in refused(capsys, "--model", "./nothing")
    assert "base: rm/model is a whole model" in refused(capsys, "--model", "rm/model", "--base", "base")
    assert export("--model", "rm", "--out", "moved") == 2
    assert export("--model", "rm", "--out", "moved", "--overwrite") == 0


def test_overwrite_replaces_the_folder_of_a_model_and_nothing_else(runs, capsys):
    """A run (its checkpoints!), what is exported itself, and folders of other things stay."""
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("x")
    for source, out in (("rm", "rm"), ("rm/model", "rm"), ("rm/model", "rm/model"), ("sft", "rm"), ("rm", "mine")):
        assert export("--model", source, "--out", out, "--overwrite") == 2
        assert "give another --out" in capsys.readouterr().err
    assert Path("rm/checkpoints/step_00000004/actor.pt").exists()
    assert Path("rm/model/config.json").exists()
    assert Path("mine/thesis.txt").exists()


def test_a_number_that_the_dtype_cannot_hold_is_refused(runs, capsys):
    model = AutoModelForCausalLM.from_pretrained("sft/model")
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    model.save_pretrained("sft/model")
    message = "dtype: model.norm.weight has 100000, which float16 cannot hold"
    assert message in refused(capsys, "--model", "sft/model", "--dtype", "float16")
    assert export("--model", "sft/model", "--dtype", "bfloat16", "--out", "held") == 0


class Repositories(ThreadingHTTPServer):
    """As much of the hub's API as a push needs, on the loopback: files arrive in one commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.made: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.failing = 0


class _Requests(BaseHTTPRequestHandler):
    server: Repositories

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != "Bearer hf_right":
            self._answer({"error": "who are you?"}, 401)
        elif self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self._answer({"url": f"http://127.0.0.1:{self.server.server_port}/me/tiny", "id": "me/tiny"})
        elif self.server.failing:
            self._answer({"error": "no room"}, self.server.failing)
        elif self.path == "/api/models/me/tiny/preupload/main":
            asked = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            self._answer({"files": modes})
        elif self.path.startswith("/api/models/me/tiny/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitUrl": "http://127.0.0.1/me/tiny/commit/0", "commitOid": "0" * 40})
        else:
            self._answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        self._answer({"error": "no such repository"}, 404)

    def _answer(self, value: dict, code: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[Repositories]:
    with Repositories() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        yield server
        server.shutdown()
        thread.join()


def test_a_push_is_the_folder(runs, hub):
    assert export("--model", "sft", "--out", "a", "--push-to-hub", "me/tiny", "--private") == 0
    assert [(made["name"], made["visibility"]) for made in hub.made] == [("tiny", "private")]
    assert hub.files == files("a")


def test_a_push_that_fails_is_one_line(runs, hub, capsys, monkeypatch):
    assert "'me/too/much'" in refused(capsys, "--model", "sft", "--push-to-hub", "me/too/much")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "me/tiny cannot be made: 401" in refused(capsys, "--model", "sft", "--push-to-hub", "me/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    hub.failing = 403
    assert export("--model", "sft", "--out", "a", "--push-to-hub", "me/tiny") == 2
    assert "cannot be pushed to; a is written, and 'hf upload me/tiny a' pushes it again" in capsys.readouterr().err
    assert files("a") == files("sft/model")
    assert hub.files == {}
    hub.shutdown()
    hub.server_close()
    assert export("--model", "sft", "--out", "b", "--push-to-hub", "me/tiny") == 75
    assert "push_to_hub: me/tiny cannot be made: " in capsys.readouterr().err
    assert not Path("b").exists()
