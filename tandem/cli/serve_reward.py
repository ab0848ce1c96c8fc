"""``tandem serve-reward``: a reward model, or a reward function, for runs on other machines to ask."""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import os
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

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
        return load_model(source, config.model)
    processes = RewardProcesses([source], deadline_s=config.serve.deadline)
    stack.callback(processes.close)
    (function,) = processes.rewards()
    return function, function.version or _digest([source, *(path.read_bytes() for path in function.files.values())])


def load_model(source: str, section: ServedModel) -> tuple[Reward, str]:
    """A reward model, and a digest of its files."""
    # Imported where it is wanted: a server of a function needs no torch.
    from tandem.assembly.digests import digest_model
    from tandem.models.description import read_score_scale
    from tandem.models.limits import limits_of
    from tandem.models.loading import load_scalar, pick_device
    from tandem.rewards.model import RewardModel
    from tandem.training.trainer import LocalScorer
    from tandem.workers.homes import seat_of

    code = section.trust_remote_code
    scale = read_score_scale(source, trust_remote_code=code) if section.normalize_scores else None
    say(f"loading the reward model from {source}")
    model = load_scalar(
        source,
        new_head="refuse",
        dtype=section.dtype,
        device=str(pick_device(section.device)),
        trust_remote_code=code,
    )
    scorer = LocalScorer(model, token_budget=section.token_budget)
    limits = limits_of(model.module.config, source)
    reward = RewardModel(seat_of(scorer), model.tokenizer, reads_ids=False, scale=scale, limits=limits)
    return reward, _digest([digest_model(source), scale])


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
