"""CLIP's loss, linear in memory."""

from torch import Tensor, nn

from betaclip.kernels.similarity.operators import Backend
from betaclip.losses.beta_cal import GroupLike, softmax_loss
from betaclip.losses.inputs import check_backend, check_gather, check_pairs


class ClipLoss(nn.Module):
    """CLIP's loss for one text per image: β-CAL's softmax form at K = 1, by the same kernel.

    Equivalent to:

        v, t = F.normalize(image_embeds.float(), dim=-1), F.normalize(text_embeds.float(), dim=-1)
        s, own = logit_scale * v @ t.T, torch.arange(B)
        loss = (F.cross_entropy(s, own) + F.cross_entropy(s.T, own)) / 2

    in O(B·D) memory.

    Args:
        backend: as for :func:`betaclip.kernels.similarity.similarity_logsumexp`.
        gather: ``"auto"``, False, True, ``"all_gather"`` or ``"ring"``: whether, and how, to contrast with the images
            and texts of all ranks; see :func:`betaclip.beta_cal_ce_loss`.
        process_group: the ranks to gather from; None for the default group.

    Raises:
        ValueError: ``backend`` or ``gather`` is unknown.

    Example:
        >>> import torch
        >>> from betaclip import ClipLoss
        >>> image, text = torch.eye(4), torch.eye(4)  # 4 pairs, each unlike the others
        >>> print(f"{ClipLoss()(image, text, logit_scale=1.0):.4f}")  # log(e + 3) - 1
        0.7437
    """

    def __init__(
        self,
        backend: Backend = "auto",
        gather: bool | str = "auto",
        process_group: GroupLike | None = None,
    ) -> None:
        super().__init__()
        check_backend(backend)
        check_gather(gather)
        self.backend, self.gather, self.process_group = backend, gather, process_group

    def forward(self, image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float) -> Tensor:
        """The loss of one batch.

        Args:
            image_embeds: (B, D) image embeddings, any norm, any floating dtype.
            text_embeds: (B, D) text embeddings; text i belongs to image i.
            logit_scale: () inverse temperature, after exp; may require a gradient.

        Returns:
            () float32 (float64 for float64 inputs), in nats.

        Raises:
            ValueError: an argument is malformed or disagrees with another; the message names it.
            NotImplementedError: the named backend cannot serve these inputs; the message says why.
            RuntimeError: ``gather`` other than ``"auto"`` without an initialised process group.
        """
        check_pairs(image_embeds, text_embeds)
        return softmax_loss(
            "ClipLoss", image_embeds.unsqueeze(1), text_embeds.unsqueeze(1), logit_scale, 0.0, 1.0, None, None, None,
            "ignore", self.backend, gather=self.gather, process_group=self.process_group,
        )  # fmt: skip
