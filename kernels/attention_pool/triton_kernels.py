"""Triton kernels of attention pooling: the steps between the folded projections.

L latent queries of width D attend on an image's P patches x; 1 / |x_p|, from the loaded patches themselves, scales
columns of logits and weights, so that no normalised patch exists.

* forward: a program takes BLOCK_L latent queries of one image and its patches BLOCK_P at a time, with online softmax:
  logits from D in steps of BLOCK_D, then weighted sums of the same patches, BLOCK_D columns at a time. Logits never
  leave the program; weighted sums do only where P > BLOCK_P, to be rescaled. Patches come from memory once, for a
  block of them is still in cache when it is read again.
* backward: a program forms one tile of S = z x̂ᵀ and dA = g x̂ᵀ from D in steps of BLOCK_D and writes [dS; A] / |x|,
  the operand of two library products; of <x̂_p, dx̂_p> it writes its latent queries' share. No atomics.

Masked patches and patches beyond P are not read, and weigh 0. Offsets of images and patches are 64-bit.
"""

import triton
import triton.language as tl


@triton.jit
def _valid(mask_ptr, stride_mask, image, patches, P, HAS_MASK: tl.constexpr):
    """(BLOCK_P,) patches that take part."""
    valid = patches < P
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + image * stride_mask + patches, mask=valid, other=0) != 0)
    return valid


@triton.jit
def _inverse(squares, LEAST: tl.constexpr):
    """1 / |x|, 0 where |x| < LEAST"""
    norm = tl.sqrt(squares)
    return tl.where(norm < LEAST, 0.0, 1.0 / tl.where(norm < LEAST, 1.0, norm))


@triton.jit(do_not_specialize=["P", "L"])
def _attention_pool_fwd_kernel(
    x_ptr, z_ptr, mask_ptr,  # (images, P, D), (images, L, D), (images, P)
    means_ptr, lse_ptr,  # (images, L, D), (images, L): -inf for an image without valid patches
    sums_ptr,  # (images, L, D) if MANY_BLOCKS: scratch, weighted sums of the blocks before
    P, L, stride_image, stride_patch, stride_mask,
    D: tl.constexpr, NORMALIZE: tl.constexpr, LEAST: tl.constexpr, HAS_MASK: tl.constexpr, MANY_BLOCKS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(L, BLOCK_L)
    image, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    latents = block * BLOCK_L + tl.arange(0, BLOCK_L)
    of_z = (image * L + latents) * D
    total = tl.zeros((BLOCK_L,), dtype=ACC)
    top = tl.full((BLOCK_L,), -float("inf"), dtype=ACC)
    for start in range(0, P, BLOCK_P):
        patches = start + tl.arange(0, BLOCK_P)
        valid = _valid(mask_ptr, stride_mask, image, patches, P, HAS_MASK)
        of_x = image * stride_image + patches.to(tl.int64) * stride_patch
        s = tl.zeros((BLOCK_L, BLOCK_P), dtype=ACC)
        squares = tl.zeros((BLOCK_P,), dtype=ACC)
        for left in range(0, D, BLOCK_D):
            depth = left + tl.arange(0, BLOCK_D)
            x = tl.load(x_ptr + of_x[:, None] + depth[None, :], mask=valid[:, None] & (depth < D)[None, :], other=0.0)
            inside = (latents < L)[:, None] & (depth < D)[None, :]
            z = tl.load(z_ptr + of_z[:, None] + depth[None, :], mask=inside, other=0.0)
            s = tl.dot(z, x.T, s, input_precision=PRECISION, out_dtype=ACC)
            if NORMALIZE:
                squares += tl.sum(x.to(ACC) * x.to(ACC), 1)
        if NORMALIZE:
            inverse = _inverse(squares, LEAST)
            s *= inverse[None, :]
        s = tl.where(valid[None, :], s, -float("inf"))
        highest = tl.maximum(top, tl.max(s, 1))
        finite = tl.where(highest == -float("inf"), 0.0, highest)
        weights, decay = tl.exp(s - finite[:, None]), tl.exp(top - finite)
        total = total * decay + tl.sum(weights, 1)
        top = highest
        if NORMALIZE:
            weights *= inverse[None, :]
        weights = weights.to(x_ptr.dtype.element_ty)
        share = 1.0 / tl.where(total > 0, total, 1.0)
        for left in range(0, D, BLOCK_D):
            depth = left + tl.arange(0, BLOCK_D)
            x = tl.load(x_ptr + of_x[:, None] + depth[None, :], mask=valid[:, None] & (depth < D)[None, :], other=0.0)
            rows = of_z[:, None] + depth[None, :]
            inside = (latents < L)[:, None] & (depth < D)[None, :]
            sums = tl.dot(weights, x, input_precision=PRECISION, out_dtype=ACC)
            if MANY_BLOCKS:
                if start > 0:
                    sums += decay[:, None] * tl.load(sums_ptr + rows, mask=inside, other=0.0)
                if start + BLOCK_P < P:
                    tl.store(sums_ptr + rows, sums, mask=inside)
            if start + BLOCK_P >= P:
                means = (sums * share[:, None]).to(means_ptr.dtype.element_ty)
                tl.store(means_ptr + rows, means, mask=inside)
        tl.debug_barrier()  # this program alone touches its sums; its threads meet between two blocks
    tl.store(lse_ptr + image * L + latents, tl.log(total) + top, mask=latents < L)


@triton.jit(do_not_specialize=["P", "L"])
def _attention_pool_bwd_kernel(
    x_ptr, zg_ptr, mask_ptr,  # (images, P, D), (images, L / H, 2, H, D), (images, P)
    lse_ptr, delta_ptr,  # (images, L), (images, L)
    weights_ptr, along_ptr,  # (images, L / H, 2, H, P), (images, blocks of L, P)
    P, L, stride_image, stride_patch, stride_mask,
    H: tl.constexpr, D: tl.constexpr, NORMALIZE: tl.constexpr, LEAST: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    l_blocks, p_blocks = tl.cdiv(L, BLOCK_L), tl.cdiv(P, BLOCK_P)
    tile = tl.program_id(0)
    image = (tile // (l_blocks * p_blocks)).to(tl.int64)
    block = tile // p_blocks % l_blocks
    latents = block * BLOCK_L + tl.arange(0, BLOCK_L)
    patches = tile % p_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = _valid(mask_ptr, stride_mask, image, patches, P, HAS_MASK)
    of_z = image * 2 * L + latents // H * (2 * H) + latents % H  # rows of zg and of weights
    s = tl.zeros((BLOCK_L, BLOCK_P), dtype=ACC)
    da = tl.zeros((BLOCK_L, BLOCK_P), dtype=ACC)
    squares = tl.zeros((BLOCK_P,), dtype=ACC)
    for start in range(0, D, BLOCK_D):
        depth = start + tl.arange(0, BLOCK_D)
        offsets = image * stride_image + patches.to(tl.int64)[:, None] * stride_patch + depth[None, :]
        x = tl.load(x_ptr + offsets, mask=valid[:, None] & (depth < D)[None, :], other=0.0)
        rows = of_z[:, None] * D + depth[None, :]
        inside = (latents < L)[:, None] & (depth < D)[None, :]
        z = tl.load(zg_ptr + rows, mask=inside, other=0.0)
        g = tl.load(zg_ptr + rows + H * D, mask=inside, other=0.0)
        s = tl.dot(z, x.T, s, input_precision=PRECISION, out_dtype=ACC)
        da = tl.dot(g, x.T, da, input_precision=PRECISION, out_dtype=ACC)
        if NORMALIZE:
            squares += tl.sum(x.to(ACC) * x.to(ACC), 1)
    lse = tl.load(lse_ptr + image * L + latents, mask=latents < L, other=0.0)
    delta = tl.load(delta_ptr + image * L + latents, mask=latents < L, other=0.0)
    if NORMALIZE:
        inverse = _inverse(squares, LEAST)
        s *= inverse[None, :]
        da *= inverse[None, :]
    a = tl.where(valid[None, :], tl.exp(s - lse[:, None]), 0.0)
    ds = a * (da - delta[:, None])
    if NORMALIZE:
        along = tl.sum(ds * s + a * da, 0) * inverse * inverse
        tl.store(along_ptr + (image * l_blocks + block) * P + patches, along, mask=patches < P)
        ds *= inverse[None, :]
        a *= inverse[None, :]
    offsets = of_z[:, None] * P + patches[None, :]
    inside = (latents < L)[:, None] & (patches < P)[None, :]
    tl.store(weights_ptr + offsets, ds.to(weights_ptr.dtype.element_ty), mask=inside)
    tl.store(weights_ptr + offsets + H * P, a.to(weights_ptr.dtype.element_ty), mask=inside)
