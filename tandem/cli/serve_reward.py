"""``tandem serve-reward``: a reward model, or a reward function, for runs on other machines to ask."""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import os
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tandem.assembly.configs.sections import ModelSection, RewardSection
from tandem.cli.configs import ServeRewardConfig
from tandem.errors import UserError
from tandem.rewards.kinds import is_function
from tandem.rewards.process import RewardProcesses
from tandem.rewards.protocol import PROTOCOL, TOKEN
from tandem.roles import Reward, RewardBatch
from tandem.runs.progress import say
from tandem.types import Rollout

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from tandem.cli.configs import ServedModel
    from tandem.rewards.app import Sample

log = logging.getLogger("tandem")


def run(config: ServeRewardConfig) -> int:
    """Serves until SIGTERM or Ctrl-C; what is being judged then is still answered."""
    try:
        import uvicorn

        from tandem.rewards.app import make_app
    except ImportError as error:
        raise UserError("serve-reward: FastAPI and uvicorn are missing; pip install 'tandem-rlhf[serve]'") from error
    serve, token = config.serve, os.environ.get(TOKEN)
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(serve.host, serve.port))
        reward, version = load(config, stack)
        host, port = listener.getsockname()[:2]
        if not token and not ipaddress.ip_address(host).is_loopback:
            log.warning("%s is no loopback address, and whoever reaches it may ask; %s sets a token", host, TOKEN)
        app = make_app(
            lambda samples: reward.score(batch_of(samples)),
            name=serve.reward,
            version=version,
            batch_limit=serve.batch_limit,
            token=token,
        )
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        say(
            f"serving {serve.reward} at {where} (protocol {PROTOCOL}, version {version}, at most {serve.batch_limit} "
            f"samples a batch{', with a token' if token else ''})"
        )
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
        say("stopped")
    return 0


def load(config: ServeRewardConfig, stack: ExitStack) -> tuple[Reward, str]:
    """What judges, and a digest of it: of the model's files, or of the function's."""
    source = config.serve.reward
    if not is_function(source):
        return load_model(source, config.model, stack)
    processes = RewardProcesses([source], deadline_s=config.serve.deadline)
    stack.callback(processes.close)
    (function,) = processes.rewards()
    return function, function.version or _digest([source, *(path.read_bytes() for path in function.files.values())])


def load_model(source: str, section: ServedModel, stack: ExitStack) -> tuple[Reward, str]:
    """A reward model in this process, and a digest of its files."""
    # Imported where it is wanted: a server of a function needs no torch.
    from tandem.assembly.digests import digest_model
    from tandem.assembly.judging import placed_reward_models, score_scales
    from tandem.models.loading import pick_device
    from tandem.parallel.world import World
    from tandem.workers.homes import Here
    from tandem.workers.process import Site

    model = ModelSection(
        model=source,
        dtype=section.dtype,
        device=section.device,
        token_budget=section.token_budget,
        trust_remote_code=section.trust_remote_code,
        compile="off",
    )
    rewards = RewardSection(reward_model=(source,), normalize_scores=section.normalize_scores)
    scales = score_scales(rewards, model)
    # Beside the processes of a torchrun it is none of theirs: no placement is asked.
    here = Here(Site(World(device=pick_device(section.device))))
    stack.callback(here.close)
    (reward,) = placed_reward_models(rewards, model, here)
    return reward, _digest([digest_model(source), *scales])


def batch_of(samples: Seq[Sample]) -> RewardBatch:
    """Samples as a reward sees them. Of a rollout there is only how it ended: what was sampled is text here."""
    names = sorted({name for sample in samples for name in sample.columns})
    return RewardBatch(
        prompts=[sample.prompt for sample in samples],
        completions=[sample.completion for sample in samples],
        rollouts=[Rollout.of_answer("", i, sample.stop_reason) for i, sample in enumerate(samples)],
        columns={name: [sample.columns.get(name) for sample in samples] for name in names},
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"port: {host}:{port} cannot be listened on: {error.strerror or error}") from error


def _digest(found: object) -> str:
    return hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest()
