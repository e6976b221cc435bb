"""The range in which one exponential serves both directions of a softmax.

With e = exp(S - shift) and one shift for every row and column of a launch, partial sums of e merge by plain addition:
lse = shift + log(sum e). That is exact as long as no logit lies so far above the shift that sums overflow, and no
row's log-sum-exp so far below it that its terms fade out. float32 spans 2^-126 to 2^128, float64 2^-1022 to 2^1024; at
either end room is kept for 2^20 terms, and at the lower end for 24 or 53 bits of precision.
"""

import torch

# Nats by which a logit may exceed the shift.
MAX_ABOVE_SHIFT = {torch.float32: 73.0, torch.float64: 690.0}
# Nats by which a row's log-sum-exp may lie below the shift and has still lost nothing.
MAX_BELOW_SHIFT = {torch.float32: 57.0, torch.float64: 655.0}
# exp(S - lse_y) = p exp(lse_x - lse_y) with p = exp(S - lse_x) <= 1. Where p underflows the left side counts for
# nothing (below 1e-14, 1e-200), as long as no lse_x exceeds an lse_y by this many nats.
MAX_SINGLE_EXP_SPREAD = {torch.float32: 55.0, torch.float64: 240.0}
