"""Image, patch and text embeddings of transformers' CLIP and SigLIP models."""

from typing import Any

from torch import Tensor

from betaclip.integrations.embeddings import Embeddings


def encode(
    model: Any, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, **vision: Any
) -> Embeddings:
    """Encode images and texts by a CLIP or SigLIP of transformers, patches included.

    transformers returns patches as the vision tower leaves them. This applies to them what the model applies to the
    image's embedding: CLIP's last LayerNorm and projection; SigLIP has normalised them and projects nothing. Gradients
    flow. Call it inside the module that DistributedDataParallel wraps.

    Args:
        model: ``CLIPModel``, ``SiglipModel``, ``Siglip2Model``, or a model that is built like one of them; adapters of
            PEFT may wrap it.
        pixel_values: the images, as the model's processor returns them.
        input_ids: (B, K, L) token ids of K texts for each image, or (N, L).
        attention_mask: of the same shape, if the model is to have one.
        vision: other arguments of the vision tower, such as ``interpolate_pos_encoding``, or ``pixel_attention_mask``
            and ``spatial_shapes`` of SigLIP 2 (give the former to the pooling block as ``patch_mask``, too).

    Returns:
        The embeddings (B, D), (B, P, D) and (B, K, D) or (N, D), not normalised.

    Raises:
        NotImplementedError: the model has no towers of this kind.

    Example:
        >>> import torch
        >>> from transformers import SiglipConfig, SiglipModel
        >>> from betaclip.integrations.transformers import encode
        >>> size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> text, vision = size | {"vocab_size": 100}, size | {"image_size": 32, "patch_size": 8}
        >>> model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        >>> out = encode(model, torch.randn(2, 3, 32, 32), torch.randint(100, (2, 3, 64)))  # 2 images with 3 texts each
        >>> out.image.shape, out.patches.shape, out.texts.shape
        (torch.Size([2, 32]), torch.Size([2, 16, 32]), torch.Size([2, 3, 32]))
    """
    tower = getattr(model, "vision_model", None)
    if tower is None or not hasattr(tower, "post_layernorm") or not hasattr(model, "get_text_features"):
        raise NotImplementedError(
            f"model: expected a CLIP or SigLIP of transformers, got {type(model).__name__}, which lacks a vision_model "
            "with post_layernorm, or get_text_features (of a wrapper such as DistributedDataParallel, pass the module)"
        )
    out = tower(pixel_values=pixel_values, return_dict=True, **vision)
    image, patches = out.pooler_output, out.last_hidden_state
    if hasattr(model, "visual_projection"):  # CLIP; the first token is the class token
        image = model.visual_projection(image)
        patches = model.visual_projection(tower.post_layernorm(patches[:, 1:]))
    elif image is None:
        raise NotImplementedError("model: expected a SigLIP with a head, which pools the patches (vision_use_head)")
    flat_mask = None if attention_mask is None else attention_mask.flatten(0, -2)
    texts = model.get_text_features(input_ids=input_ids.flatten(0, -2), attention_mask=flat_mask)
    if not isinstance(texts, Tensor):  # since transformers 5
        texts = texts.pooler_output
    return Embeddings(image, patches, texts.unflatten(0, input_ids.shape[:-1]))
