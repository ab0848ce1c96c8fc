"""A config made into a run: its items read, its models placed, its crew put together, its steps run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tandem.assembly.configs.methods import RowsConfig, RunConfig, SamplesConfig
from tandem.assembly.configs.replay import ReplayConfig
from tandem.assembly.configs.sections import EngineSection, ScheduleSection
from tandem.assembly.feeds import Feed, RowsFeed, SamplesFeed, check_sampling
from tandem.assembly.models import adapter_params, load_models, require_trainable, scalar_roles
from tandem.assembly.placing import Homes
from tandem.assembly.plans import models_used, print_plan
from tandem.assembly.refresh import refresh_of
from tandem.assembly.replay_feed import ReplayFeed
from tandem.assembly.sessions import check_out, session
from tandem.assembly.text_feed import TextFeed
from tandem.collector import leaving_out
from tandem.errors import UserError
from tandem.roles import Seat
from tandem.runs.progress import say
from tandem.runs.trackers import require_trackers
from tandem.schedules.crew import Crew
from tandem.schedules.pipeline import Pipeline
from tandem.stages import counting, stage
from tandem.workers.launched import launched
from tandem.workers.torchrun import Ranks, joined

BITS_HELD = 2.0
"""What a trained number can hold, in bits (Allen-Zhu and Li, arXiv:2404.05405)."""


def run(config: RunConfig) -> Path | None:
    """See ``tandem.run``."""
    with ExitStack() as stack:
        stack.enter_context(counting())
        with stage("meeting"):
            ranks = _ranks(config, stack)
        if ranks is None or ranks.leader:
            return _run(config, stack, ranks)
        ranks.follow()
        return None


def _ranks(config: RunConfig, stack: ExitStack) -> Ranks | None:
    """Those of a torchrun, once they have met; None without one, and for a run on samples, which refuses it."""
    if not launched() or isinstance(config, SamplesConfig):
        return None
    if config.placement.actor != "here":
        raise UserError("placement.actor: torchrun has started the workers already; leave the key out")
    return stack.enter_context(joined(config.model.device, config.cluster.deadline))


def _run(config: RunConfig, stack: ExitStack, ranks: Ranks | None) -> Path | None:
    """The run, in the order in which a mistake is cheapest to find. ``ranks``: those of a torchrun that are there."""
    require_trackers(config.run.track)
    if (model := check_out(config)) is not None:
        return model
    homes = _homes(config)
    if ranks is None:
        homes.check()
    with stage("data"):
        feed = _feed(config, stack)
    if (model := check_out(config, feed)) is not None:
        return model
    feed.check()
    config.method.check(feed.planned)
    for line in [*config.notes, *config.idle_for(feed.planned)]:
        say(line)
    if config.run.dry_run:
        _print_plan(config, feed)
        return None
    if config.run.epochs is not None and not isinstance(config, ReplayConfig):
        say(f"{config.run.epochs:g} epochs of {feed.size} rows are {feed.steps} steps of {config.items_per_step}")
    idle = feed.once.recall() if feed.once else set()
    homes.roles = [role for role in homes.roles if role not in idle]
    places = stack.enter_context(homes) if ranks is None else ranks
    feed.begin(homes)
    models = load_models(config, places.begin, feed.planned, idle)
    if config.lora.on and (line := too_small(models["actor"].call("trained_numbers"), feed.bits)):
        say(line)
    crew = _crew(config, feed, models)
    # A reference that follows is no longer what its folder holds.
    saved = crew.trainers if crew.refresh is None else {**crew.trainers, "reference": models["reference"]}
    started = stack.enter_context(session(config, saved, feed))
    if feed.once:
        feed.once.ask(models, started.progress)
    started.numbers = partial(feed.numbers, models, started.progress)
    started.workers = places.seconds
    schedule = config.schedule if isinstance(config, SamplesConfig) and config.sampler else ScheduleSection()
    stack.enter_context(leaving_out())
    Pipeline(
        steps=feed.steps,
        items_per_step=config.items_per_step,
        max_lag=schedule.max_lag,
        window=schedule.window,
        token_budget=config.model.token_budget,
    ).run(crew, started)
    return started.finish()


def _homes(config: RunConfig) -> Homes:
    """Where the run's roles will live. Raises UserError for models, or samples, that could not be trained on."""
    require_trainable(config)
    roles = [*config.sources]
    if isinstance(config, SamplesConfig) and config.sampler is not None:
        check_sampling(config)
        roles.append("engine")
    return Homes(
        config.model,
        config.placement,
        config.cluster,
        config.sampler or EngineSection(),
        roles,
        adapters=adapter_params(config, "actor") if config.lora.on else None,
        fold=config.lora.fold,
    )


def _crew(config: RunConfig, feed: Feed, models: Mapping[str, Seat]) -> Crew:
    """Who does what in a step, with the feed at work."""
    trainers = {role: models[role] for role in config.method.losses()}
    fed = feed.start(models)
    return Crew(
        method=config.method,
        tickets=partial(feed.order.tickets, per_step=config.items_per_step),
        source=fed.source,
        prepare=fed.prepare,
        trainers=trainers,
        push_weights=fed.push_weights,
        evaluate=fed.evaluate,
        ahead=fed.ahead,
        ess_floor=config.step.ess_floor if isinstance(config, SamplesConfig) else None,
        refresh=refresh_of(config, models),
    )


def too_small(numbers: int, bits: float) -> str:
    """Says so where adapters can hold far less than the data have to say; nothing where they can."""
    if bits <= 2 * BITS_HELD * numbers:
        return ""
    return (
        f"lora.rank: the adapters hold about {BITS_HELD:g} x {numbers / 1e6:.3g}M bits and the data say about "
        f"{bits / 1e6:.3g}M, 1 for each trained token: far more; a larger rank, or the whole model, may learn more"
    )


def _feed(config: RunConfig, stack: ExitStack) -> Feed:
    if isinstance(config, ReplayConfig):
        return ReplayFeed(config)
    if isinstance(config, SamplesConfig):
        return SamplesFeed(config, stack)
    assert isinstance(config, RowsConfig)
    return TextFeed(config) if config.reads.kind == "text" else RowsFeed(config)


def _print_plan(config: RunConfig, feed: Feed) -> None:
    """What a dry run shows: the resolved config and what the run would use."""
    shared = filter(config.is_shared, config.sources)
    uses = models_used(config, scalar_roles(config), shared=[*shared])
    print_plan(config, uses | feed.uses(), feed.idle)
