"""The statistics of a few hundred embeddings from the one matrix of all their cosines, on the CPU.

At such sizes the number of operators is the time, and the matrix fits the cache. One product serves all pairs, those
within images included, and it is the matrix that is normalised instead of the rows:

    C_ij = <x_i, y_j> / (|x_i| |y_j|)

With G the gradient of C, that of a row is (sum_j G_ij y_j / |y_j| - x_i / |x_i| sum_j G_ij C_ij) / |x_i|. ``blockwise``
has the same statistics of any number of rows, and of rows whose norms are extreme.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from betaclip.kernels.similarity.exponent_range import MAX_ABOVE_SHIFT, MAX_BELOW_SHIFT
from betaclip.kernels.similarity.within_images import Images, exact_dtype, may_be_padded

# Between these norms neither a product of two rows nor of their inverse norms leaves the range of float32.
_MIN_NORM, _MAX_NORM = 2.0**-20, 2.0**20


@dataclass(frozen=True)
class AllCosines:
    """The cosines of N rows of x with N rows of y, which belong to the same images.

    x, y: (N, D) in accumulation dtype, 0 in rows that take no part.
    inverse_norms: (2, N) of x and of y, 0 for such rows.
    matrix: (N, N) cosines.
    excluded: (N, N) bool, pairs that are not contrasted.
    """

    x: Tensor
    y: Tensor
    inverse_norms: Tensor
    matrix: Tensor
    excluded: Tensor
    images: Images

    @classmethod
    def of(
        cls,
        x: Tensor,
        y: Tensor,
        image_id: Tensor,
        text_id: Tensor | None,
        images: Images,
        room: Tensor,
        filled: bool = False,
    ) -> "AllCosines | None":
        """None if a norm is extreme.

        x, y: (N, D) in accumulation dtype, in which they may hold anything in padded rows.
        room: takes the matrix if it has N * N elements; ``filled``: and then has it already.
        """
        padding = image_id < 0 if may_be_padded(image_id) else None
        if padding is not None:
            x, y = (rows.masked_fill(padding.unsqueeze(1), 0) for rows in (x, y))
        norms = room.new_empty(2, len(x))
        for rows, out in zip((x, y), norms, strict=True):
            torch.linalg.vector_norm(rows, dim=1, out=out)
        lowest, highest = map(float, (norms if padding is None else norms.masked_fill(padding, 1)).aminmax())
        if not (_MIN_NORM <= lowest and highest <= _MAX_NORM):
            return None
        inverse = norms.reciprocal_()
        excluded = image_id.unsqueeze(1) == image_id
        if padding is not None:
            inverse.masked_fill_(padding, 0)
            excluded |= padding | padding.unsqueeze(1)
        if text_id is not None:
            excluded |= (text_id.unsqueeze(1) == text_id) & (text_id >= 0)
        pairs = len(x) ** 2
        if room.numel() != pairs:
            room, filled = room.new_empty(pairs), False
        matrix = room.view(len(x), len(x))
        if not filled:
            exact = exact_dtype(room)
            matrix.copy_(x.to(exact) @ y.to(exact).T).mul_(inverse[0].unsqueeze(1)).mul_(inverse[1])
        return cls(x, y, inverse, matrix, excluded, images)

    def within_images(self) -> Tensor:
        """(1, B, K, K) cosines, 0 with empty slots."""
        if self.images.slots is None:
            return self._blocks(self.matrix).clone(memory_format=torch.contiguous_format).unsqueeze(0)
        place, filled = self._places(self.images.slots)
        return torch.where(filled, self.matrix.view(-1)[place], 0).unsqueeze(0)

    def logsumexp(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(1, N) over each row's pairs, and (1, N) over each column's."""
        logits = self._logits(scale)
        if self._single_exp(scale):
            e = logits.exp_()
            return e.sum(1, keepdim=True).T.log_(), e.sum(0, keepdim=True).log_()
        return logits.logsumexp(1).unsqueeze(0), logits.logsumexp(0, keepdim=True)

    def logsumexp_gradient(self, scale: Tensor, lse_x: Tensor, lse_y: Tensor, dlse_x: Tensor, dlse_y: Tensor) -> Tensor:
        """(N, N) of the logits, from the statistics and their incoming gradients."""
        logits, lse_x, dlse_x = self._logits(scale), lse_x.T, dlse_x.T
        if self._single_exp(scale):
            most = MAX_ABOVE_SHIFT[logits.dtype]  # reached without any pair only, whose exponentials are all 0
            weights_x, weights_y = (d * (-lse).clamp_max(most).exp() for d, lse in ((dlse_x, lse_x), (dlse_y, lse_y)))
            return logits.exp_().mul_(weights_x + weights_y)
        lse_x, lse_y = (lse.masked_fill(lse == -torch.inf, torch.inf) for lse in (lse_x, lse_y))
        to_x = (logits - lse_x).exp_().mul_(dlse_x)
        return logits.sub_(lse_y).exp_().mul_(dlse_y).add_(to_x)

    def softplus_sums(self, scale: Tensor, bias: Tensor | None) -> Tensor:
        """(1, N) over each row's pairs."""
        logits = self._logits(scale, bias)
        # Beyond the threshold it is the logit itself, which there it equals in this dtype.
        return F.softplus(logits, threshold=MAX_ABOVE_SHIFT[logits.dtype]).sum(1).unsqueeze(0)

    def softplus_gradient(self, scale: Tensor, bias: Tensor | None, dsums: Tensor) -> Tensor:
        """(N, N) of the logits, from the incoming gradient of the sums (1, N)."""
        return self._logits(scale, bias).sigmoid_().mul_(dsums.T)

    def gradients(
        self, dlogits: Tensor, scale: Tensor, dcosines: Tensor, need_dx: bool, need_dy: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those of x and y, (N, D), or (0,) where they are not needed, and of the scale, from the gradients of the
        logits (N, N), which is written over, and of the cosines within images (1, B, K, K)."""
        dscale = torch.dot(dlogits.view(-1), self.matrix.view(-1))
        g = dlogits.mul_(scale)
        self._add_within_images(g, dcosines[0])
        radial, exact = g * self.matrix, exact_dtype(g)
        weights = g.mul_(self.inverse_norms[0].unsqueeze(1)).mul_(self.inverse_norms[1]).to(exact)
        gradients = []
        for needed, rows, others, side, through_norm, inverse_norm in (
            (need_dx, self.x, self.y, weights, radial.sum(1), self.inverse_norms[0]),
            (need_dy, self.y, self.x, weights.T, radial.sum(0), self.inverse_norms[1]),
        ):
            if needed:
                gradient = torch.mm(side, others.to(exact)).to(g.dtype)
                through_norm.mul_(inverse_norm).mul_(inverse_norm)
                gradients.append(gradient.addcmul_(rows, through_norm.unsqueeze(1), value=-1))
            else:
                gradients.append(g.new_empty(0))
        dx, dy = gradients
        return dx, dy, dscale

    def _logits(self, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = self.matrix * scale
        if bias is not None:
            logits.add_(bias)
        return logits.masked_fill_(self.excluded, -torch.inf)

    def _single_exp(self, scale: Tensor) -> bool:
        """Whether exp(S) neither overflows nor fades out, so that one exponential serves both directions."""
        return abs(float(scale)) <= MAX_BELOW_SHIFT[scale.dtype]

    def _blocks(self, matrix: Tensor) -> Tensor:
        """(B, K, K) view of the pairs of one image, where rows are in order of images."""
        images, texts_per_image, *_ = self.images
        return matrix.view(images, texts_per_image, images, texts_per_image).diagonal(0, 0, 2).permute(2, 0, 1)

    def _places(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, K) where each pair of slots is in the flat matrix, and whether neither is empty."""
        row, filled = slots.clamp_min(0), slots >= 0
        return row.unsqueeze(2) * len(self.x) + row.unsqueeze(1), filled.unsqueeze(2) & filled.unsqueeze(1)

    def _add_within_images(self, g: Tensor, dcosines: Tensor) -> None:
        if self.images.slots is None:
            self._blocks(g).add_(dcosines)
        else:  # what the empty slots add to row 0 is zero
            place, filled = self._places(self.images.slots)
            g.view(-1).index_add_(0, place.flatten(), torch.where(filled, dcosines, 0).flatten())
