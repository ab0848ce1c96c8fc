"""A flag that has no effect in its run is refused, a file's key is said; what has one, or is the default, never is."""

import pytest

from tandem.assembly.configs.methods import SamplesConfig, config_class
from tandem.assembly.configs.uses import GenerateConfig, SampleConfig, UseConfig
from tandem.cli.configs import DoctorConfig
from tandem.config import _keys_of, dump_config, load_config
from tandem.errors import UserError
from tandem.runs.goals import Goals

REQUIRED = ["--out", "runs/a", "--steps", "5", "--model", "m"]
VLLM, JUDGED, TRAINER = ["--engine.kind", "vllm"], ["--reward", "r.py:f"], ["--old-logp", "trainer"]
SFTConfig, RMConfig, PPOConfig, GRPOConfig, OPDConfig, REINFORCEConfig = map(
    config_class, ("sft", "rm", "ppo", "grpo", "opd", "reinforce")
)
DistillConfig, DPOConfig, KTOConfig = map(config_class, ("distill", "dpo", "kto"))
CONFIGS = (
    SFTConfig, RMConfig, PPOConfig, GRPOConfig, OPDConfig, REINFORCEConfig, DoctorConfig, GenerateConfig, SampleConfig,
    DistillConfig, DPOConfig, KTOConfig,
)  # fmt: skip


def words(config: type, flags: list[str]) -> list[str]:
    """A whole command line: what the config requires, and the flags."""
    if config is DoctorConfig:
        return flags
    data = [] if "--data" in flags else ["--data", "d.jsonl"]
    if config in (OPDConfig, DistillConfig):
        return [*REQUIRED, *data, "--teacher", "t", *flags]
    if issubclass(config, UseConfig):
        return ["--out", "o", "--model", "m", *data, *flags]
    return [*REQUIRED, *data, *(["--reward", "r.py:f"] if issubclass(config, SamplesConfig) else []), *flags]


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (SFTConfig, ["--eval-every", "5"], "--eval-every: has no effect without --eval-data"),
        *(
            (SFTConfig, [f"--lora.{key}", *value], f"--lora.{key}: has no effect without --lora.rank")
            for key, *value in (("alpha", "8"), ("targets", "q_proj"), ("dora",), ("rslora",), ("quantize", "nf4"))
        ),
        (
            GRPOConfig,
            ["--lora.rank", "8", "--kl-coef", "0.1", "--offload-frozen"],
            "--offload-frozen: has no effect, since this run has no frozen model",
        ),
        (
            RMConfig,
            ["--lora.rank", "8", "--bias-update-speed", "0.001"],
            "--bias-update-speed: has no effect with --lora.rank",
        ),
        (SFTConfig, ["--keep", "5", "--save-every", "0"], "--keep: has no effect without --save-every"),
        (SFTConfig, ["--rollouts-logged", "5"], "--rollouts-logged: has no effect, since this run has no samples"),
        (SFTConfig, ["--record"], "--record: has no effect, since this run has no samples"),
        (SFTConfig, ["--split", "test"], "--split: has no effect, since this run has no dataset with splits"),
        (SFTConfig, ["--eval-data", "e*.json", "--eval-split", "a"], "--eval-split: has no effect, since this run"),
        (SFTConfig, ["--data", "a.csv,b*", "--split", "test"], "--split: has no effect, since this run has no dataset"),
        (SFTConfig, ["--max-eval-samples", "5"], "--max-eval-samples: has no effect without --eval-data"),
        (SFTConfig, ["--chosen-key", "a"], "--chosen-key: has no effect, since this run has no preferences"),
        (SFTConfig, ["--step-separator", "a"], "--step-separator: has no effect, since this run has no steps"),
        (SFTConfig, ["--step-placeholder", "a"], "--step-placeholder: has no effect, since this run has no steps"),
        (SFTConfig, ["--label-key", "a"], "--label-key: has no effect, since this run has no unpaired and no st"),
        (RMConfig, ["--output-key", "a"], "--output-key: has no effect, since this run has no demonstrations"),
        (SFTConfig, ["--offload-frozen"], "--offload-frozen: has no effect, since this run has no frozen model"),
        (SFTConfig, ["--keep-gathered", "--placement.actor", "1"], "--keep-gathered: has no effect, since this run"),
        (SFTConfig, ["--cluster.deadline", "9"], "--cluster.deadline: has no effect, since this run has no workers"),
        (
            RMConfig,
            ["--aggregation", "sequence"],
            "--aggregation: has no effect, since this run has no los",
        ),
        (
            DPOConfig,
            ["--reference-every", "5", "--reference-cache", "c"],
            "--reference-cache: has no effect, since this run has no reference that stays",
        ),
        (GRPOConfig, ["--reference-every", "5"], "--reference-every: has no effect, since this run has no reference"),
        (PPOConfig, ["--reference-mix", "0.5"], "--reference-mix: has no effect without --reference-every"),
        (SFTConfig, ["--optimizer", "adafactor", "--betas", "0.9", "0.99"], "--betas: has no effect with --optimizer"),
        (RMConfig, ["--cluster.address", "auto"], "--cluster.address: has no effect, since this run has no workers"),
        (
            config_class("online-dpo"),
            ["--old-logp", "trainer"],
            "--old-logp: has no effect, since this run has no losses of tokens",
        ),
        (SFTConfig, ["--reference-cache", "c"], "--reference-cache: has no effect, since this run has no reference"),
        (DPOConfig, ["--offload-frozen"], "--offload-frozen: has no effect, since this run has no frozen model"),
        (PPOConfig, ["--kl", "none", "--kl-coef", "1"], "--kl-coef: has no effect without --kl"),
        (PPOConfig, ["--kl", "none", "--kl-estimator", "k3"], "--kl-estimator: has no effect without --kl"),
        (
            GRPOConfig,
            ["--correction", "geo"],
            "--correction: has no effect with --old-logp sampler",
        ),
        (
            config_class("online-dpo"),
            ["--ess-floor", "0.5"],
            "--ess-floor: has no effect, since this run has no losses of tokens",
        ),
        (OPDConfig, ["--correction-low", "0.5"], "--correction-low: has no effect with --correction none; give --corr"),
        (
            GRPOConfig,
            [*TRAINER, "--correction", "geo", "--correction-gap", "0.2"],
            "--correction-gap: has no effect",
        ),
        (OPDConfig, ["--reward-clip", "5"], "--reward-clip: has no effect without --reward-coef"),
        (REINFORCEConfig, ["--baseline-decay", "0.5"], "--baseline-decay: has no effect with --baseline batch; give"),
        (GRPOConfig, ["--kl-estimator", "k3"], "--kl-estimator: has no effect without --kl-coef"),
        (PPOConfig, ["--window", "0.5"], "--window: has no effect without --max-lag"),
        (PPOConfig, ["--stale-cache", "recompute"], "--stale-cache: has no effect without --max-lag"),
        (PPOConfig, ["--max-lag", "1", "--weights-change", "between-sequences"], "--weights-change: has no effect"),
        (GRPOConfig, ["--kl", "reward"], "--kl: has no effect without --kl-coef"),
        (GRPOConfig, ["--kl", "none", "--kl-coef", "1"], "--kl"),
        (PPOConfig, ["--kl", "none", "--reference", "r"], "--reference: has no effect, since this run has no refer"),
        (PPOConfig, ["--kl-horizon", "9"], "--kl-horizon: has no effect without --kl-target"),
        (config_class("rloo"), ["--kl-horizon", "9"], "--kl-horizon: has no effect without --kl-target"),
        (PPOConfig, ["--lora.share-critic"], "--lora.share-critic: has no effect without --lora.rank"),
        (
            GRPOConfig,
            ["--lora.rank", "8", "--lora.share-critic"],
            "--lora.share-critic: has no effect, since this run has no critic",
        ),
        (PPOConfig, ["--normalize-scores"], "--normalize-scores: has no effect, since this run has no reward model"),
        (PPOConfig, ["--placement.reward", "1"], "--placement.reward: has no effect, since this run has no reward"),
        (PPOConfig, ["--missing-eos-penalty", "2"], "--missing-eos-penalty: has no effect without --missing-eos"),
        (DistillConfig, ["--beta", "0.1"], "--beta: has no effect with --divergence forward; give --divergence jsd"),
        (OPDConfig, ["--missing-eos", "subtract"], "--missing-eos: has no effect, since this run has no reward"),
        (OPDConfig, ["--reward-processes", "2"], "--reward-processes: has no effect, since this run has no reward f"),
        (OPDConfig, ["--placement.reward", "1"], "--placement.reward: has no effect, since this run has no reward m"),
        (PPOConfig, ["--eval-reward", "r.py:f"], "--eval-reward: has no effect without --eval-data"),
        (SFTConfig, ["--keep-best", "eval/loss"], "--keep-best: has no effect without --eval-data"),
        (SFTConfig, ["--stop-when", "eval/loss<1"], "--stop-when: has no effect without --eval-data"),
        (SFTConfig, ["--eval-data", "e", "--patience", "2"], "--patience: has no effect without --keep-best"),
        (GRPOConfig, ["--eval-samples", "2"], "--eval-samples: has no effect without --eval-data"),
        (
            OPDConfig,
            ["--eval-data", "e", "--eval-success", "1"],
            "--eval-success: has no effect, since this run has no judge",
        ),
        (
            OPDConfig,
            ["--eval-data", "e", "--eval-temperature", "1"],
            "--eval-temperature: has no effect, since this run has no judge",
        ),
        (GRPOConfig, ["--placement.reference", "1"], "--placement.reference: has no effect, since this run has no ref"),
        (GRPOConfig, ["--normalize", "none", "--epsilon", "1"], "--epsilon: has no effect without --normalize"),
        (GRPOConfig, ["--engine.transport", "gloo"], "--engine.transport: has no effect, since this run has no eng"),
        (GRPOConfig, ["--engine.no-check-weights"], "--engine.no-check-weights: has no effect, since this run has"),
        *(
            (GRPOConfig, [f"--engine.{flag}", *value], f"--engine.{flag}: has no effect with --engine.kind live; give")
            for flag, *value in (
                ("tensor-parallel", "2"),
                ("memory-share", "0.5"),
                ("no-sleep",),
                ("no-seeded",),
                ("arguments", '{"a": 1}'),
            )
        ),
        (
            GRPOConfig,
            [*VLLM, "--engine.no-sleep", "--placement.engine", "1"],
            "--engine.no-sleep: has no effect with --placement.engine 1; give --placement.engine actor",
        ),
        (GRPOConfig, [*VLLM, "--engine.way", "slots"], "--engine.way: has no effect with --engine.kind vllm; give"),
        (
            GenerateConfig,
            ["--token-budget", "9"],
            "--token-budget: has no effect, since this run has no trained model a",
        ),
        (
            GenerateConfig,
            ["--cluster.deadline", "9"],
            "--cluster.deadline: has no effect, since this run has no workers",
        ),
        (GenerateConfig, ["--engine.no-check-weights"], "--engine.no-check-weights: has no effect, since this run has"),
        (SampleConfig, [*JUDGED, "--compile", "on"], "--compile: has no effect, since this run has no trained model a"),
        (
            SampleConfig,
            [*JUDGED, "--placement.reward", "1"],
            "--placement.reward: has no effect, since this run has no",
        ),
        (SampleConfig, [*JUDGED, "--keep", "all", "--min-reward", "1"], "--min-reward: has no effect with --keep all"),
        (DoctorConfig, ["--engine.no-seeded"], "--engine.no-seeded: has no effect with --engine.kind live"),
        # One step against the trainer's own log-probs: all ratios are 1.
        *(
            (GRPOConfig, [*TRAINER, f"--{key}", value], f"--{key}: has no effect, since this run has no ratios other")
            for key, value in (("clip-low", "0.1"), ("clip-high", "0.3"), ("dual-clip", "4"))
        ),
        (PPOConfig, ["--value-clip", "0.1"], "--value-clip: has no effect, since this run has no second optimizer"),
        *(
            (PPOConfig, ["--gamma", "0", f"--{key}", "0.5"], f"--{key}: has no effect without --gamma")
            for key in ("lam", "lam-alpha", "critic-lam")
        ),
        (
            config_class("cispo"),
            ["--dual-clip", "5"],
            "--dual-clip: 5 has no effect, since no weight is above 1 + clip",
        ),
    ],
)
def test_a_key_that_has_no_effect_is_refused(config, flags, message):
    with pytest.raises(UserError) as caught:
        load_config(config, words(config, flags))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (SFTConfig, ["--eval-data", "e", "--eval-every", "5", "--eval-split", "a"]),
        (SFTConfig, ["--lora.rank", "8", "--lora.alpha", "8", "--lora.targets", "q_proj", "--lora.dora"]),
        (GRPOConfig, ["--lora.rank", "8", "--lora.quantize", "nf4", "--kl-coef", "0.1"]),
        (PPOConfig, ["--lora.rank", "8", "--lora.share-critic", "--lora.targets", "all-linear", "experts", "lm_head"]),
        (GRPOConfig, ["--lora.rank", "8", "--kl-coef", "0.1", "--reference", "r", "--offload-frozen"]),
        (SFTConfig, ["--eval-data", "e.json", "h=hub/e", "--eval-split", "a"]),
        (
            SFTConfig,
            ["--eval-data", "e", "--keep-best=-eval/loss", "--patience", "2", "--stop-when", "eval/loss<1"],
        ),
        (
            GRPOConfig,
            ["--eval-data", "e", "--eval-samples", "4", "--eval-temperature", "0.5", "--eval-success", "1"],
        ),
        (OPDConfig, ["--eval-data", "e", "--eval-reward", "r.py:f", "--eval-success", "1"]),
        (DPOConfig, ["--offload-frozen", "--reference", "r", "--reference-cache", "c", "--placement.reference", "1"]),
        (KTOConfig, ["--reference-cache", "c", "--desirable-weight", "2"]),
        (RMConfig, ["--data", "hub/name", "--split", "b", "--chosen-key", "a", "--rejected-key", "b"]),
        (SFTConfig, ["--data", "a.jsonl:1,json@b:2", "--split", "b", "--output-key", "a", "--max-samples", "3"]),
        (GRPOConfig, ["--label-key", "a", "--eval-data", "e", "--max-eval-samples", "3"]),
        (SFTConfig, ["--optimizer", "muon", "--betas", "0.9", "0.99"]),
        (GRPOConfig, ["--kl-coef", "0.1", "--reference-every", "5", "--reference-mix", "0.5"]),
        (config_class("dpo"), ["--reference-every", "5"]),
        (SFTConfig, ["--placement.actor", "2", "--keep-gathered", "--cluster.deadline", "9"]),
        (PPOConfig, ["--kl-estimator", "k3"]),
        (PPOConfig, ["--max-lag", "2", "--window", "0.5", "--stale-cache", "keep"]),
        (PPOConfig, ["--max-lag", "1", "--placement.engine", "1", "--weights-change", "between-sequences"]),
        (GRPOConfig, [*VLLM, "--max-lag", "1", "--stale-cache", "recompute"]),
        (PPOConfig, ["--minibatches", "2", "--value-clip", "0.1", "--lam-alpha", "0.1", "--critic-lam", "1"]),
        (GRPOConfig, [*TRAINER, "--sample-epochs", "2", "--clip-low", "0.1", "--dual-clip", "4"]),
        (config_class("gspo"), ["--clip-high", "1e-3"]),
        (config_class("cispo"), ["--dual-clip", "4.9"]),
        (GRPOConfig, [*TRAINER, "--correction", "icepop", "--correction-low", "0.5", "--correction-high", "2"]),
        (GRPOConfig, [*TRAINER, "--correction", "decoupled", "--correction-high", ".inf", "--ess-floor", "0.5"]),
        (
            OPDConfig,
            [
                *TRAINER,
                "--correction",
                "gap",
                "--correction-gap",
                "0.2",
                "--correction-high",
                "2",
                "--kl-coef",
                "0.1",
                "--reference",
                "r",
            ],
        ),
        (REINFORCEConfig, ["--baseline", "running", "--baseline-decay", "0.5", "--kl-target", "3"]),
        (PPOConfig, ["--kl-target", "3", "--kl-horizon", "9", "--kl-coef", "1", "--reference", "r"]),
        (GRPOConfig, [*VLLM, "--engine.no-sleep", "--engine.tensor-parallel", "2", "--cluster.deadline", "9"]),
        (OPDConfig, ["--offload-frozen", "--placement.teacher", "1", "--eval-data", "e", "--eval-reward", "r.py:f"]),
        (GenerateConfig, ["--placement.engine", "2", "--cluster.deadline", "9", "--data", "hub/name", "--split", "b"]),
        (GenerateConfig, [*VLLM, "--engine.tensor-parallel", "2", "--write", "tokens"]),
        (
            SampleConfig,
            ["--reward-model", "r", "--token-budget", "9", "--placement.reward", "1", "--min-reward", "0.5"],
        ),
        (DistillConfig, ["--divergence", "jsd", "--beta", "0.1", "--placement.teacher", "2", "--teacher-top-k", "9"]),
        (GRPOConfig, ["--placement.engine", "1", "--engine.transport", "gloo", "--engine.way", "slots"]),
    ],
)
def test_a_key_that_has_an_effect_is_not(tmp_path, config, flags):
    """And what was given nowhere, or is its default, is never at fault: the resolved config can be read again."""
    read = load_config(config, words(config, flags))
    (tmp_path / "c.yaml").write_text(dump_config(read), encoding="utf-8")
    assert load_config(config, ["--config", str(tmp_path / "c.yaml")]) == read


def test_a_file_serves_a_laptop_and_a_cluster(tmp_path, caplog):
    """Flags may change what the file is about; its keys that are then idle are said, with their lines."""
    file = tmp_path / "c.yaml"
    file.write_text("placement.actor: 8\ncluster.address: auto\nkl_coef: 0.1\nkl_estimator: k3\n", encoding="utf-8")
    with_file = [*words(GRPOConfig, []), "--config", str(file)]
    load_config(GRPOConfig, with_file)
    assert not caplog.messages
    read = load_config(GRPOConfig, [*with_file, "--placement.actor", "here", "--kl-coef", "0"])
    assert read.cluster.address == "auto"
    assert caplog.messages == [
        f"{file}:2: cluster.address: has no effect, since this run has no workers",
        f"{file}:4: kl_estimator: has no effect without --kl-coef",
    ]


def test_what_a_file_says_of_a_model_that_is_not_there_does_nothing(tmp_path, caplog):
    file = tmp_path / "c.yaml"
    file.write_text("reference_every: 5\nreference_mix: 0.5\nkeep_best: eval/reward\npatience: 9\n", encoding="utf-8")
    read = load_config(GRPOConfig, [*words(GRPOConfig, []), "--config", str(file)])
    assert caplog.messages[0].startswith(f"{file}:1: reference_every: has no effect")
    assert read.following is None
    assert read.evaluation.goals == Goals()
    assert read.idle_for(2) == []
    assert load_config(GRPOConfig, [*words(GRPOConfig, ["--kl-coef", "1"]), "--config", str(file)]).following


def test_a_stale_cache_that_vllm_cannot_keep_is_refused():
    with pytest.raises(UserError, match=r"stale-cache: vLLM computes .* anew"):
        load_config(GRPOConfig, words(GRPOConfig, [*VLLM, "--max-lag", "1", "--stale-cache", "keep"]))


@pytest.mark.parametrize("alone", ["--weights-change between-sequences", "--engine.way padded"])
def test_a_stale_cache_is_refused_where_no_sample_runs_when_weights_change(alone):
    flags = ["--max-lag", "1", "--placement.engine", "1", *alone.split()]
    load_config(GRPOConfig, words(GRPOConfig, flags))
    for value in ("keep", "recompute"):
        with pytest.raises(UserError, match=f"stale-cache: has no effect with {alone}, where no sample runs"):
            load_config(GRPOConfig, words(GRPOConfig, [*flags, "--stale-cache", value]))


def test_who_takes_turns_does_not_wait_for_samples_to_end():
    """Told before anything is loaded, whatever the device turns out to be, unless it is said to be a CPU."""
    flags = [*VLLM, "--placement.actor", "1", "--max-lag", "1", "--weights-change", "between-sequences"]
    with pytest.raises(UserError, match=r"weights-change: an engine that takes turns .* --engine.no-sleep"):
        load_config(GRPOConfig, words(GRPOConfig, flags))
    for others in (["--engine.no-sleep"], ["--placement.engine", "1"], ["--device", "cpu"]):
        load_config(GRPOConfig, words(GRPOConfig, [*flags, *others]))


def test_old_samples_without_a_correction_are_asked_for_twice():
    """The ratio to the sampler's log-probs is a correction itself, and methods of pairs take none."""
    old = ["--max-lag", "1", *TRAINER]
    for flags in (old, [*old, "--correction", "none"]):
        with pytest.raises(UserError, match=r"correction: with max_lag above 0 .* or --uncorrected"):
            load_config(GRPOConfig, words(GRPOConfig, flags))
    # Of what can be given, nothing is proposed that would be refused next.
    truncated = [*old, *VLLM, "--placement.actor", "1", "--top-p", "0.9"]
    with pytest.raises(UserError, match=r"had drawn them; give --uncorrected$"):
        load_config(GRPOConfig, words(GRPOConfig, truncated))
    load_config(GRPOConfig, words(GRPOConfig, [*truncated, "--uncorrected"]))
    for flags in ([*old, "--uncorrected"], [*old, "--correction", "gap"], ["--max-lag", "1"], TRAINER):
        load_config(GRPOConfig, words(GRPOConfig, flags))
    load_config(config_class("online-dpo"), words(config_class("online-dpo"), ["--max-lag", "1"]))
    for flags, why in (
        (["--max-lag", "1"], "with --old-logp sampler"),
        (TRAINER, "without --max-lag"),
        ([*old, "--correction", "geo"], "with --correction geo"),
    ):
        with pytest.raises(UserError, match=f"--uncorrected: has no effect {why}"):
            load_config(GRPOConfig, words(GRPOConfig, [*flags, "--uncorrected"]))


def test_a_correction_that_nothing_can_compute_is_refused_wherever_it_stands(tmp_path):
    """It would fail at the first step, or train without what was asked for."""
    file = tmp_path / "c.yaml"
    file.write_text("correction: token_tis\n", encoding="utf-8")
    with pytest.raises(UserError, match="correction: has no effect with --old-logp sampler"):
        load_config(GRPOConfig, [*words(GRPOConfig, []), "--config", str(file)])
    load_config(GRPOConfig, [*words(GRPOConfig, TRAINER), "--config", str(file)])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--reference-every", "5"], "reference_every: 5 steps are never over before the last of 5"),
        (["--warmup-steps", "5"], "learning_rate: the warmup takes all 5 steps"),
        (["--lr-schedule", "linear", "--warmup-steps", "5"], "lr_schedule: the warmup takes all 5 steps"),
        (
            ["--eval-data", "e", "--eval-every", "2", "--keep-best", "eval/loss", "--patience", "3"],
            "patience: 3 evaluations are never over before the last of 5 steps",
        ),
    ],
)
def test_what_a_run_is_too_short_for_is_said(flags, said):
    config = load_config(DPOConfig, words(DPOConfig, flags))
    (line,) = config.idle_for(5)
    assert line.startswith(said)
    assert config.idle_for(7) == []


def test_a_lag_as_long_as_the_run_is_said():
    config = load_config(GRPOConfig, words(GRPOConfig, ["--max-lag", "3", "--reward", "r.py:f"]))
    assert config.idle_for(3) == ["max_lag: 3 with 3 steps: all prompts of the run are begun with the first weights"]
    assert config.idle_for(4) == []


def test_a_step_has_as_many_samples_as_minibatches():
    flags = ["--prompts-per-step", "3", "--samples-per-prompt", "2", "--minibatches"]
    for config, most in ((GRPOConfig, 6), (config_class("online-dpo"), 3)):
        assert load_config(config, words(config, [*flags, str(most)])).step.minibatches == most
        with pytest.raises(UserError, match=f"minibatches: expected at most {most}"):
            load_config(config, words(config, [*flags, str(most + 1)]))


def test_every_condition_names_a_key_or_a_part():
    parts = {
        "samples", "critic", "reference", "teacher", "reward model", "reward function", "workers",
        "dataset with splits", "held-out dataset with splits", "trainer split over several workers",
        "engine with weights of its own", "demonstrations", "preferences", "unpaired", "steps", "losses of tokens",
        "frozen model", "reward", "reference that stays",
        "judge of held-out samples",
        "trained model", "evaluated model", "ratios other than 1", "second optimizer step on a step's samples",
    }  # fmt: skip
    everywhere = {name for config in CONFIGS for name in _keys_of(config)}
    for config in CONFIGS:
        for name, key in _keys_of(config).items():
            for other, *values in key.metadata.get("needs", ()):
                assert other in everywhere or (other == "part" and set(values) <= parts), name
