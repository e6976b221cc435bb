"""Models in the layout of the published β-CLIP checkpoints."""

import json
from pathlib import Path

from open_clip.model import CLIP
from open_clip.transformer import LayerScale, QuickGELU
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from betaclip.model.beta_clip import BetaCLIP, ModelConfig, create_model, load_state
from betaclip.model.published_layout import from_published, is_published, open_clip_config, to_published
from betaclip.model.text_tower import stretched
from betaclip.model.weights import read_weights


def load_published(
    path: Path | str, *, head_width: int = 64, pool_heads: int = 8, allow_pickle: bool = False
) -> BetaCLIP:
    """A model in the published layout, its sizes taken from the tensors. Its configuration makes the same model again.

    Args:
        path: a safetensors file, or one of ``torch.save``: :func:`betaclip.model.weights.read_weights`.
        head_width: of the towers' attention heads, which no tensor shows.
        pool_heads: heads of the pooling block, likewise.
        allow_pickle: run whatever code a pickle holds. Only for files that you trust like a program.

    Raises:
        ValueError: another layout, no weights, heads that do not divide the widths, or objects beyond tensors.
    """
    state = read_weights(path, allow_pickle=allow_pickle)
    if not is_published(state):
        raise ValueError(f"{path}: expected the published layout, with positional_embedding_res and "
                         f"text_conditioned_patches_block.*; got {', '.join(sorted(state)[:8])} ...")  # fmt: skip
    towers = open_clip_config(state, head_width)
    config = ModelConfig(
        name=json.dumps(towers),
        context_length=stretched(towers["text_cfg"]["context_length"]),
        pool_heads=pool_heads,
        quick_gelu=True,
        pool_norm_inputs="text_conditioned_patches_block.ln_1.weight" in state,
    )
    model = create_model(config)
    load_state(model, from_published(state), path)
    return model


def save_published(model: BetaCLIP, path: Path | str) -> None:
    """Write a model as a safetensors file of the published layout.

    Raises:
        NotImplementedError: the layout cannot express the model; the message lists why.
    """
    reasons = _why_not(model.clip)
    if reasons:
        raise NotImplementedError(f"the published layout cannot express this model: {'; '.join(reasons)}")
    save_file(to_published({name: value.detach().cpu() for name, value in model.state_dict().items()}), path)


def _why_not(clip: nn.Module) -> list[str]:
    if not isinstance(clip, CLIP):
        return [f"its towers are a {type(clip).__name__}, not a CLIP"]
    reasons = []
    if not is_parametrized(clip, "positional_embedding"):
        reasons.append("its positions are not stretched")
    if not all(isinstance(b.mlp.gelu, QuickGELU) for t in (clip.visual, clip) for b in t.transformer.resblocks):
        reasons.append("its activation is not QuickGELU, which the layout takes for granted")
    if any(isinstance(m, LayerScale) for m in clip.modules()):
        reasons.append("it has LayerScale")
    if isinstance(clip.visual.ln_pre, nn.Identity):
        reasons.append("its vision tower has no LayerNorm before the blocks")
    if not isinstance(clip.text_projection, nn.Parameter):
        reasons.append("its text projection is not a plain matrix")
    return reasons
