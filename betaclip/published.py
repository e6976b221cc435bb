"""Load and save models in the layout of the published β-CLIP checkpoints; load those of FLAIR."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from betaclip.files import write_atomically
from betaclip.model.beta_clip import BetaCLIP, ModelConfig, create_model, load_flair_state, load_published_state
from betaclip.model.flair_layout import FLAIR_SETTINGS, flair_config, is_flair
from betaclip.model.published_layout import (
    has_input_norms,
    is_published,
    not_published_reasons,
    open_clip_config,
    to_published,
)
from betaclip.model.published_optimizer import moments
from betaclip.model.text_tower import stretched
from betaclip.model.weights import read_file, read_metadata, read_weights, weights_of

HEAD_WIDTH, POOL_HEADS = 64, 8  # of the released models
# Names of the heads' sizes in the metadata of files that betaclip writes.
_VISION, _TEXT, _POOL = "vision_head_width", "text_head_width", "pool_heads"


def load_published(
    path: Path | str, *, head_width: int | None = None, pool_heads: int | None = None, allow_pickle: bool = False
) -> BetaCLIP:
    """Load a model from the published layout, or from that of released FLAIR checkpoints (arXiv 2412.03561), with its
    sizes taken from the tensors.

    Args:
        path: a safetensors file, or one of ``torch.save`` (:func:`betaclip.model.weights.read_weights`).
        head_width: width of the towers' attention heads, which no tensor shows. By default the number in the file's
            metadata, which :func:`save_published` writes, or 64.
        pool_heads: number of heads of the pooling block, which no tensor shows either. By default the number in the
            metadata, or 8.
        allow_pickle: also unpickle arbitrary objects, which runs whatever code the file holds. Set it only for files
            that you trust as you would trust a program.

    Returns:
        The model, in float32 on the CPU. ``create_model(model.config)`` makes the same one with random weights.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: the file has another layout, holds no weights, damaged ones or objects beyond tensors, or the heads
            do not divide the widths or are not those that the file says. The message is one line that names the file
            and the tensor.

    Example:
        >>> import tempfile, torch
        >>> from betaclip.model import ModelConfig, create_model
        >>> from betaclip.published import load_published, save_published
        >>> model = create_model(ModelConfig(context_length=248, quick_gelu=True))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_published(model, f"{folder}/model.safetensors")
        ...     again = load_published(f"{folder}/model.safetensors")
        >>> torch.equal(again.pool.mlp.c_fc.weight, model.pool.mlp.c_fc.weight)
        True
    """
    state = read_weights(path, allow_pickle=allow_pickle)
    flair = is_flair(state)
    if not (flair or is_published(state)):
        raise ValueError(f"{path}: expected the published layout, which has positional_embedding_res and "
                         f"text_conditioned_patches_block.*; got {', '.join(sorted(state)[:8])} ...")  # fmt: skip
    try:
        heads = _heads(read_metadata(path), head_width, pool_heads)
        towers = (flair_config if flair else open_clip_config)(state, heads[_VISION], heads[_TEXT])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if flair:
        length = towers["text_cfg"]["context_length"]
        config = ModelConfig(json.dumps(towers), context_length=length, pool_heads=heads[_POOL], **FLAIR_SETTINGS)
        model = create_model(config)
        load_flair_state(model, state, path)
        return model
    config = ModelConfig(
        name=json.dumps(towers),
        context_length=stretched(towers["text_cfg"]["context_length"]),
        pool_heads=heads[_POOL],
        quick_gelu=True,
        pool_norm_inputs=has_input_norms(state),
    )
    model = create_model(config)
    load_published_state(model, state, path)
    return model


def save_published(model: BetaCLIP, path: Path | str) -> None:
    """Write a model in the published layout, as a safetensors file.

    Args:
        model: it must have stretched positions and QuickGELU; :func:`load_published` has an example.
        path: the file to write.

    Raises:
        NotImplementedError: the layout cannot express the model; the message lists every reason.
    """
    reasons = not_published_reasons(model.clip, model.config)
    if reasons:
        raise NotImplementedError(f"the published layout cannot express this model: {'; '.join(reasons)}")
    tensors = to_published({name: value.detach().cpu() for name, value in model.state_dict().items()})
    metadata = {name: str(number) for name, number in heads_of(model).items()}
    with write_atomically(path) as file:
        file.write(save(tensors, metadata))


def heads_of(model: BetaCLIP) -> dict[str, int]:
    """The widths of the towers' heads and the number of the pool's, which no tensor shows."""
    vision, text = (tower.transformer.resblocks[0].attn.head_dim for tower in (model.clip.visual, model.clip))
    return {_VISION: vision, _TEXT: text, _POOL: model.pool.attn.num_heads}


def _heads(metadata: Mapping[str, str], head_width: int | None, pool_heads: int | None) -> dict[str, int]:
    """The heads that are given, else those that the file says, else those of the released models.

    Raises:
        ValueError: a number is given and the file says another, or the file says none where it should.
    """
    heads = {}
    for name, given, released in (
        (_VISION, head_width, HEAD_WIDTH),
        (_TEXT, head_width, HEAD_WIDTH),
        (_POOL, pool_heads, POOL_HEADS),
    ):
        said = metadata.get(name)
        if said is not None and not said.isdecimal():
            raise ValueError(f"{name}: expected a number in the file's metadata, got {said[:80]!r}")
        if said is not None and given not in (None, int(said)):
            raise ValueError(f"{name}: the file says {said}, and {given} is asked for; leave the option out")
        heads[name] = int(said or released) if given is None else given
    return heads


@dataclass(frozen=True)
class TrainingState:
    """The training state in a checkpoint of the released training code: everything but the weights.

    epochs: the number of epochs that are completed.
    moments: AdamW's ``exp_avg``, ``exp_avg_sq`` and ``step`` by names of a BetaCLIP's parameters.
    """

    epochs: int
    moments: dict[str, dict[str, Tensor]]


def read_training_state(path: Path | str) -> TrainingState:
    """Read the epoch and the optimisers' state of a checkpoint of the released training code.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: the file is damaged, has another layout, or no state that fits its weights. The message is one line.
    """
    content = read_file(path)
    weights = weights_of(content, path)
    if not is_published(weights):
        raise ValueError(f"{path}: expected the published layout, got {', '.join(sorted(weights)[:8])} ...")
    epochs = content.get("epoch")
    if type(epochs) is not int or epochs < 0:
        raise ValueError(f"{path}: epoch: expected the number of completed epochs, got {str(epochs)[:80]!r}")
    try:
        return TrainingState(epochs, moments(content, weights))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, IndexError, RuntimeError) as error:  # of names and shapes that no model has
        raise ValueError(
            f"{path}: expected all weights of the published layout: {str(error).splitlines()[0]}"
        ) from error
