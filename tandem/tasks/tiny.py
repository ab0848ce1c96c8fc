"""A tokenizer of one token a character and a randomly initialised model of under a million parameters.

Nothing is downloaded. Saved with ``save_pretrained`` the two make an ordinary Hugging Face folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tandem.seeds import derive_seed
from tandem.tasks.letters import END_OF_PROMPT, LETTERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"


def build_tokenizer(characters: str = LETTERS + END_OF_PROMPT) -> PreTrainedTokenizerFast:
    """One token for each of ``characters``, after ``<pad>`` (0) and ``<eos>`` (1); no beginning-of-sequence token.

    Text goes in and out unchanged. A character that is not in the vocabulary makes encoding fail.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *dict.fromkeys(characters)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def build_model(
    seed: int,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    hidden_size: int = 128,
    layers: int = 3,
    **config: Any,
) -> PreTrainedModel:
    """A Llama causal LM in fp32 with random weights that depend on ``seed`` alone (0.74M parameters by default).

    ``tokenizer`` (default ``build_tokenizer()``) gives the vocabulary size and the special ids; ``config`` overrides
    any other key of ``LlamaConfig``. The caller's random state is left as it was.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or build_tokenizer()
    defaults = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": hidden_size // 64,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "model"))
        model = LlamaForCausalLM(LlamaConfig(**(defaults | config)))
    return model.eval()
