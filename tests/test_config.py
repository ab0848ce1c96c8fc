"""Configs: what may be written in a file and on the command line, and what is said where it may not."""

from __future__ import annotations

import math
import shlex
import sys
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from tandem.assembly.configs.evaluation_sections import SampledEvaluationSection
from tandem.assembly.configs.methods import config_class
from tandem.assembly.configs.sections import (
    DataSection,
    EngineSection,
    ModelSection,
    OptimSection,
    RewardSection,
    RunSection,
    SamplingSection,
)
from tandem.assembly.configs.uses import SampleConfig
from tandem.config import (
    _keys_of,
    changeable,
    describe,
    dump_config,
    load_config,
    settings,
    with_keys,
)
from tandem.errors import UserError
from tandem.keys import MAY_CHANGE, PREFIXED, Checked, must
from tandem.methods.ppo import PPO


@dataclass(frozen=True, kw_only=True)
class HotOptim(OptimSection):
    learning_rate: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class CriticSection:
    critic: str | None = None
    """Where the critic starts from."""


@dataclass(frozen=True, kw_only=True)
class ExampleConfig:
    """A config with every section, as an online command has it."""

    models: CriticSection = field(default_factory=CriticSection)
    run: RunSection
    model: ModelSection
    data: DataSection
    optim: HotOptim
    sampling: SamplingSection
    reward: RewardSection
    evaluation: SampledEvaluationSection = field(default_factory=SampledEvaluationSection)
    engine: EngineSection = field(default_factory=EngineSection, metadata=PREFIXED)
    method: PPO = field(default_factory=lambda: PPO(gamma=0.9))
    parts = frozenset({"ratios other than 1", "second optimizer step on a step's samples"})


REQUIRED = ["--out", "runs/a", "--steps", "5", "--model", "m", "--data", "d.jsonl", "--reward", "r.py:f"]


def argv(*flags: str) -> list[str]:
    """The required flags, but for those that are given, and then these."""
    given = {flag.partition("=")[0] for flag in flags}
    pairs = zip(REQUIRED[::2], REQUIRED[1::2], strict=True)
    return [word for pair in pairs if pair[0] not in given for word in pair] + list(flags)


def load(*flags: str) -> ExampleConfig:
    return load_config(ExampleConfig, argv(*flags))


def refusal(*flags: str) -> str:
    with pytest.raises(UserError) as caught:
        load(*flags)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes ``a.yaml`` into the working directory."""
    monkeypatch.chdir(tmp_path)
    return lambda text: Path("a.yaml").write_text(text)


def test_defaults_of_sections_of_their_subclasses_and_of_the_config():
    config = load()
    assert (config.run.seed, config.model.dtype, config.sampling.stop) == (0, "float32", ())
    assert config.optim == HotOptim(learning_rate=1e-3)
    assert config.method == PPO(gamma=0.9)


def test_a_flag_changes_its_key_and_no_other():
    assert load("--lam", "0.8").method == PPO(gamma=0.9, lam=0.8)
    assert load("--betas", "0.8", "0.99").optim == HotOptim(betas=(0.8, 0.99))
    assert load("--critic", "c").models.critic == "c"


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        ("--learning-rate 1e-5 --seed 7 --temperature 0", {"learning_rate": 1e-5, "seed": 7, "temperature": 0.0}),
        ("--betas 0.8 0.99 --stop 'a b' '\n' --max-grad-norm inf",
         {"betas": (0.8, 0.99), "stop": ("a b", "\n"), "max_grad_norm": math.inf}),
        ("--reward a.py:f b.py:g --reward-weights 1 -0.5",
         {"reward": ("a.py:f", "b.py:g"), "reward_weights": (1.0, -0.5)}),
        ("--resume --no-whiten-advantages --dtype bfloat16", {"whiten_advantages": False, "dtype": "bfloat16"}),
        ("--engine.kind vllm --engine.no-sleep --engine.memory-share 0.5",
         {"engine.kind": "vllm", "engine.sleep": False, "engine.memory_share": 0.5}),
        ("--value-clip None --kl-target 6 --learning-rate=3e-4 --stop",
         {"value_clip": None, "kl_target": 6.0, "learning_rate": 3e-4, "stop": ()}),
        ("--max_new_tokens 9 --steps 6", {"max_new_tokens": 9, "steps": 6}),
    ],
)  # fmt: skip
def test_flags_mean_their_keys_and_no_others(flags, keys):
    assert settings(load(*shlex.split(flags))) == settings(load()) | keys


def test_yaml_first_then_flags(file):
    file("seed: 3\nlearning-rate: 1e-5  # dashes are fine\ntemperature: 1\nsave_every: 100\n")
    config = load("--config", "a.yaml", "--seed", "4")
    assert config.run.seed == 4
    assert config.run.save_every == "100"
    assert (config.optim.learning_rate, config.sampling.temperature) == (1e-5, 1.0)
    assert isinstance(config.sampling.temperature, float)


def test_flags_win_wherever_they_stand(file):
    file("seed: 3\n")
    assert load("--seed", "4", "--config", "a.yaml").run.seed == 4


def test_a_later_file_wins(file, tmp_path):
    file("seed: 3\nsteps: 9\n")
    (tmp_path / "b.yaml").write_text("seed: 5\n")
    config = load_config(ExampleConfig, ["--config", "a.yaml", "--config", "b.yaml", *REQUIRED[:2], *REQUIRED[4:]])
    assert (config.run.seed, config.run.steps) == (5, 9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stop: [no, '12', \"\\n\"]", ("no", "12", "\n")),
        ("stop: END", ("END",)),
        ("stop: []", ()),
        ("stop:\n  - a\n  - --b", ("a", "--b")),
    ],
)
def test_yaml_lists(file, text, expected):
    file(text)
    assert load("--config", "a.yaml").sampling.stop == expected


def test_empty_yaml_and_null(file):
    file("# nothing but a remark\n")
    assert load("--config", "a.yaml") == load()
    file("value_clip: null\nreward_clip:\ncritic: ~\n")
    config = load("--config", "a.yaml")
    assert (config.method.value_clip, config.method.reward_clip, config.models.critic) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1\n\nlearing_rate: 2\n", "a.yaml:3: unknown key learing_rate; did you mean learning_rate?"),
        ("lr: 2", "a.yaml:1: unknown key lr; did you mean long_rows or learning_rate?"),
        ("zzzz: 2", "a.yaml:1: unknown key zzzz; --help lists them"),
        ("seed: 1\nseed: 2", "a.yaml:2: seed is given a second time; keep one of the two"),
        ("seed: 1\nkeep: abc", "a.yaml:2: keep: expected a whole number, got 'abc'"),
        ("seed: 1.0", "a.yaml:1: seed: expected a whole number, got '1.0'"),
        ("seed: true", "a.yaml:1: seed: expected a whole number, got 'true'"),
        ("seed: [1, 2]", "a.yaml:1: seed: expected a whole number, got '[1, 2]'"),
        ("seed:", "a.yaml:1: seed: expected a whole number, got nothing"),
        ("temperature: .nan", "a.yaml:1: temperature: expected a number, got '.nan'"),
        ("temperature: true", "a.yaml:1: temperature: expected a number, got 'true'"),
        ("trust_remote_code: 1", "a.yaml:1: trust_remote_code: expected true or false, got '1'"),
        ("dtype: float16", "a.yaml:1: dtype: expected one of float32, bfloat16, got 'float16'"),
        ("betas: [0.9]", "a.yaml:1: betas: expected a list of 2, each a number, got '[0.9]'"),
        ("reward_weights: [1, x]", "a.yaml:1: reward_weights: expected a list, each a number, got '[1, x]'"),
        ("value_clip: x", "a.yaml:1: value_clip: expected a number or none, got 'x'"),
        ("seed: 1\nmodel:\n  model: x", "a.yaml:2: model: expected a value or a list of values; keys are flat"),
        ("- seed", "a.yaml:1: expected lines of 'key: value'"),
        ("seed: 1\nstop: [a\n", "a.yaml:3: not YAML: "),
        ("seed: 1\ntemperature: -1\n", "a.yaml:2: temperature: expected 0 or more, got -1.0"),
        ("seed: 1\ndual_clip: 0.5\n", "a.yaml:2: dual_clip: "),
    ],
)
def test_wrong_yaml_is_named_with_its_line(file, text, message):
    file(text)
    assert refusal("--config", "a.yaml").startswith(message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learing-rate", "1"], "unknown flag --learing-rate; did you mean --learning-rate?"),
        (["--lr", "1"], "unknown flag --lr; did you mean --long-rows or --learning-rate?"),
        (["--num_generations", "4"], "unknown flag --num_generations; did you mean --samples-per-prompt?"),
        (["--beta", "0.1"], "unknown flag --beta; did you mean --kl-coef?"),
        (["--batch-size", "8"], "unknown flag --batch-size; did you mean --prompts-per-step?"),
        (["--confg", "a.yaml"], "unknown flag --confg; did you mean --config?"),
        (["--no-seed"], "unknown flag --no-seed"),
        (["--steps", "abc"], "--steps: expected a whole number or none, got 'abc'"),
        (["--steps"], "--steps: expected a whole number or none, got nothing"),
        (["--steps", "1", "2"], "--steps: expected a whole number or none, got '[1, 2]'"),
        (["--resume", "maybe"], "--resume: expected true or false, got 'maybe'"),
        (["--config", "none.yaml"], "--config none.yaml: cannot be read: No such file or directory"),
        (["--config"], "--config: expected a YAML file"),
    ],
)
def test_wrong_flags_are_named(flags, message):
    assert refusal(*flags).startswith(message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--device", "cpu", "-lr", "1"],
            "unknown flag -lr; did you mean --long-rows or --learning-rate? (flags begin",
        ),
        (["--keep", "-learning-rate=1"], "unknown flag -learning-rate=1; did you mean --learning-rate? (flags begin"),
        (["--optim.learning-rate", "1"], "unknown flag --optim.learning-rate; did you mean --learning-rate?"),
        (["--seed", "1", "--seed", "2"], "--seed: given twice, 1 and 2; keep one of the two"),
        (["--seed", str(2**63)], f"--seed: expected a whole number of at most 64 bits, got '{2**63}'"),
        (["--rollouts-logged", "9" * 30], "--rollouts-logged: expected a whole number of at most 64 bits, got '999"),
        (["--learning-rate", "inf"], "--learning-rate: expected a finite number, got 'inf'"),
        (["--reward-weights", "1", "-.inf"], "--reward-weights: expected a finite number, got ['1', '-.inf']"),
        (["--seed", "9" * 5000], "--seed: expected a whole number, got '999"),
    ],
)
def test_mistakes_of_the_hand(flags, message):
    assert refusal(*flags).startswith(message)


def test_what_begins_with_one_dash_and_is_a_value():
    config = load("--reward-weights", "-.5", "--stop=-END", "--max-grad-norm", "inf", "--reward-clip", "None")
    assert (config.reward.reward_weights, config.sampling.stop) == ((-0.5,), ("-END",))
    assert refusal("--max-grad-norm", "-inf") == "--max-grad-norm: expected more than 0, got -inf"


def test_a_list_that_is_given_twice_goes_on():
    config = load("--reward", "a.py:f", "b.py:g", "--reward", "c.py:h", "--seed", "3", "--seed", "3")
    assert (config.reward.reward, config.run.seed) == (("a.py:f", "b.py:g", "c.py:h"), 3)
    assert load("--betas", "0.8", "--betas", "0.99").optim.betas == (0.8, 0.99)


def test_the_name_of_a_section_is_answered_with_its_keys(file):
    for text, key in (("optim:\n  learning_rate: 1", "learning_rate"), ("engine: {kind: vllm}", "engine.kind")):
        file(text)
        name = text.partition(":")[0]
        expected = f"a.yaml:1: unknown key {name}; keys are flat, so write {key}: … by itself, and so on"
        assert refusal("--config", "a.yaml") == expected


def test_a_key_of_another_method_is_said_to_be_its(file):
    file("normalize: std\nbatch_size: 2\n")
    for method, words, expected in (
        ("ppo", ["--config", "a.yaml"], "a.yaml:1: unknown key normalize, which is one of grpo; leave it out"),
        ("ppo", ["--answer-logp", "sum"], "unknown flag --answer-logp, which is one of dpo, online-dpo; leave it out"),
        ("ppo", ["--normalise", "std"], "unknown flag --normalise; did you mean --normalize-scores?"),
        ("grpo", ["--batch-size", "2"], "unknown flag --batch-size; did you mean --prompts-per-step?"),
    ):
        with pytest.raises(UserError) as error:
            load_config(config_class(method), words)
        assert str(error.value) == expected


def test_home_stands_for_a_tilde_in_every_path(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file("data: ~/d.jsonl\nreward: [~/r.py:f, m.n:g]\nstop: ['~/']\n")
    config = load_config(ExampleConfig, ["--config", "~/a.yaml", "--out", "~/o", "--model=~/m", "--steps", "1"])
    assert (config.run.out, config.model.model) == (f"{tmp_path}/o", f"{tmp_path}/m")
    assert config.data.data == f"{tmp_path}/d.jsonl"
    assert config.reward.reward == (f"{tmp_path}/r.py:f", "m.n:g")
    assert config.sampling.stop == ("~/",)


def test_a_word_without_a_flag():
    with pytest.raises(UserError, match=r"'x\.yaml' stands alone"):
        load_config(ExampleConfig, ["x.yaml", *REQUIRED])


@pytest.mark.parametrize(
    "flags",
    [
        ["--steps", "0"],
        ["--keep", "0"],
        ["--seed", "-1"],
        ["--save-every", "10h"],
        ["--token-budget", "0"],
        ["--eval-every", "-1"],
        ["--eval-samples", "0"],
        ["--eval-temperature", "-1"],
        ["--eval-data="],
        ["--max-length", "0"],
        ["--learning-rate", "0"],
        ["--learning-rate", "1e3"],
        ["--max-grad-norm", "-1"],
        ["--warmup-steps", "-1"],
        ["--weight-decay", "-0.1"],
        ["--betas", "0.9", "1"],
        ["--prompts-per-step", "0"],
        ["--samples-per-prompt", "0"],
        ["--max-new-tokens", "0"],
        ["--max-slots", "0"],
        ["--temperature", "-0.5"],
        ["--top-k", "-1"],
        ["--top-p", "0"],
        ["--top-p", "1.1"],
        ["--min-p", "1.5"],
        ["--stop", ""],
        ["--reward", "rewards.py"],
        ["--reward-weights", "1", "2"],
        ["--missing-eos-penalty", "-1"],
        ["--out", ""],
        ["--model="],
    ],
)
def test_values_out_of_range_name_their_flag(flags):
    name = flags[0].rstrip("=")
    assert refusal(*flags).startswith(f"{name}: expected ")


def test_keys_that_contradict_each_other():
    assert refusal("--resume", "--overwrite").startswith("--overwrite: ")
    assert refusal("--reward-model", "").startswith("--reward-model: expected folders")


def test_a_method_that_learns_from_rewards_is_given_one(tmp_path):
    unjudged, wanted = REQUIRED[:-2], r"reward: nothing judges .* --reward FILE.py:function or --reward-model DIR"
    with pytest.raises(UserError, match=f"^{wanted}"):
        load_config(config_class("grpo"), unjudged)
    file = tmp_path / "c.yaml"
    file.write_text("seed: 1\nreward: []\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"^{file}:2: {wanted}"):
        load_config(config_class("ppo"), [*unjudged, "--config", str(file)])


def test_weights_of_0_are_of_a_run_that_learns_from_something_else(tmp_path):
    one = [*REQUIRED, "--reward-weights", "0"]
    sample = ["--model", "m", "--data", "d.jsonl", "--reward", "r.py:f", "--out", "o", "--reward-weights", "-0.0"]
    for cls, words in ((config_class("grpo"), one), (config_class("dapo"), one), (SampleConfig, sample)):
        with pytest.raises(UserError, match=r"^--reward-weights: all are 0, so no sample is better than another"):
            load_config(cls, words)
    for more in (["--missing-eos", "subtract"], ["--overlong-buffer", "9"], ["--reward", "a.py:f", "b.py:g"]):
        weights = ["0", "1"] if "b.py:g" in more else ["0"]
        flags = [*([] if "b.py:g" in more else REQUIRED[-2:]), *more, "--reward-weights", *weights]
        load_config(config_class("grpo"), [*REQUIRED[:-2], *flags])
    with pytest.raises(UserError, match="all are 0"):
        load_config(config_class("grpo"), [*one, "--missing-eos", "replace", "--missing-eos-penalty", "0"])
    load_config(config_class("opd"), [*one, "--teacher", "t"])
    load_config(SampleConfig, [*sample, "--keep", "all"])


def test_missing_keys_are_all_named_with_what_they_are():
    with pytest.raises(UserError) as caught:
        load_config(ExampleConfig, ["--out", "a", "--steps", "1"])
    assert str(caught.value) == (
        "missing --model (A Hugging Face folder, or a name on the hub); "
        "--data (A .jsonl, .json, .csv, .parquet or .arrow file, a folder of them, json@FOLDER, or the name of a "
        "dataset on the hub; or several of these, with commas between them, each with :WEIGHT behind it or none: "
        "a.jsonl:0.4,b.jsonl:0.6)"
    )


AWKWARD = [
    ["--stop", "\n\n", "no", "123", "é ", "# x", "[a]", "'", '"', "-", "~", "a: b"],
    ["--learning-rate", "1e-05", "--max-grad-norm", "inf", "--betas", "0.1", "0.30000000000000004"],
    ["--critic", "123", "--value-clip", "None", "--reward", "a b.py:f", "c.py:g", "--reward-weights", "1", "1e-9"],
    ["--model", "yes", "--data", "1:30", "--device", "null", "--stop=--end"],
    ["--dual-clip", "3", "--kl", "loss", "--kl-estimator", "k2", "--clip-high", "0.28"],
]


@pytest.mark.parametrize("flags", AWKWARD)
def test_round_trip(tmp_path, flags):
    config = load(*flags)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(ExampleConfig, ["--config", str(path)]) == config
    assert dump_config(load_config(ExampleConfig, ["--config", str(path)])) == path.read_text(encoding="utf-8")


def test_the_dump_is_flat_yaml_of_every_key_but_those_of_one_start():
    config = load("--overwrite", "--dry-run")
    text = dump_config(config)
    names = {f.name for f in fields(config) if not is_dataclass(getattr(config, f.name))}
    for f in fields(config):
        if is_dataclass(section := getattr(config, f.name)):
            prefix = "engine." if f.name == "engine" else ""
            names |= {prefix + key for key in _keys_of(type(section))}
    assert set(yaml.safe_load(text)) == names - {"resume", "accept_changed", "overwrite", "dry_run"}
    assert text.startswith("# The resolved config")
    assert "\n# optim\n" in text


def test_a_key_that_does_not_say_so_must_stay_as_it_was():
    assert set(changeable(load())) == {
        "out",
        "steps",
        "epochs",
        "patience",
        "track",
        "stop_when",
        "save_every",
        "keep",
        "rollouts_logged",
        "record",
        "reward_processes",
    }
    assert not any(changeable(load()).values())
    assert "linear" in changeable(load("--lr-schedule", "linear"))["steps"]


def test_describe_groups_by_section():
    lines = describe(load("--stop", "a", "b")).splitlines()
    assert lines.index("sampling") < next(i for i, line in enumerate(lines) if line.split() == ["stop", "a", "b"])
    assert next(line for line in lines if "learning_rate" in line).split() == ["learning_rate", "0.001"]


def test_help_teaches_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(ExampleConfig, ["--help"], prog="tandem example")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    words = " ".join(out.replace("[no-]", "").split())
    assert "usage: tandem example" in words
    assert "--config FILE.yaml" in words
    assert "A config with every section" in words
    for section in (RunSection, ModelSection, DataSection, OptimSection, SamplingSection, RewardSection, PPO):
        for name in _keys_of(section):
            assert f"--{name.replace('_', '-')}" in words
    assert "Bound, above 1, on the ratio where the advantage is negative." in words
    assert "Divides the logits. 0 is greedy." in words


def test_every_key_of_every_section_has_help():
    assert [name for name, key in _keys_of(ExampleConfig).items() if not key.doc] == []


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Knobs that sections share."""

    depth: int = field(default=1, metadata=MAY_CHANGE)
    """How deep."""
    width: float = 0.5
    """How wide."""


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A section with a dataclass in it, whose default is not that of its class."""

    height: int = 3
    """How high."""
    inner: Inner = field(default=Inner(depth=2))


@dataclass(frozen=True, kw_only=True)
class Nested:
    """A config with such a section, one of them prefixed."""

    outer: Outer = field(default_factory=lambda: Outer(height=4))
    other: Outer = field(default_factory=Outer, metadata=PREFIXED)


def test_a_dataclass_in_a_section_is_flat(tmp_path):
    config = load_config(Nested, ["--depth", "7", "--other.width", "0.25"])
    assert config == Nested(outer=Outer(height=4, inner=Inner(depth=7)), other=Outer(inner=Inner(depth=2, width=0.25)))
    assert settings(config) == {
        "height": 4, "depth": 7, "width": 0.5, "other.height": 3, "other.depth": 2, "other.width": 0.25
    }  # fmt: skip
    assert set(changeable(config)) == {"depth", "other.depth"}
    (tmp_path / "c.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(Nested, ["--config", str(tmp_path / "c.yaml")]) == config
    with pytest.raises(UserError, match=r"unknown flag --inner\.depth; did you mean --depth"):
        load_config(Nested, ["--inner.depth", "7"])


def test_keys_are_changed_wherever_they_are():
    assert with_keys(Outer(), depth=9, height=1) == Outer(height=1, inner=Inner(depth=9))
    with pytest.raises(TypeError, match="Outer has no key size"):
        with_keys(Outer(), size=1)


def test_two_sections_with_the_same_key_are_a_bug():
    @dataclass(kw_only=True)
    class One:
        depth: int = 0

    @dataclass(kw_only=True)
    class Other:
        depth: int = 1

    @dataclass(kw_only=True)
    class Clash:
        one: One
        other: Other

    sys.modules[__name__].__dict__.update(One=One, Other=Other)
    with pytest.raises(TypeError, match="depth"):
        load_config(Clash, [])


def test_literals_that_are_not_text():
    @dataclass(kw_only=True)
    class Sizes:
        zero: Literal[1, 2, 3] = 1

    assert load_config(Sizes, ["--zero", "3"]) == Sizes(zero=3)
    with pytest.raises(UserError, match="--zero: expected one of 1, 2, 3, got '4'"):
        load_config(Sizes, ["--zero", "4"])


@dataclass(frozen=True, kw_only=True)
class Tea(Checked):
    prefix = "tea."
    cups: int | None = field(default=1, metadata=must("1 or more", lambda cups: cups >= 1))


@dataclass(frozen=True, kw_only=True)
class Party(Tea):
    cups: int | None = 12


@pytest.mark.parametrize("kind", [Tea, Party])
def test_a_key_is_what_it_must_be_also_where_its_default_is_another(kind):
    assert kind(cups=None).cups is None
    with pytest.raises(UserError, match=r"^tea\.cups: expected 1 or more, got 0$"):
        kind(cups=0)
