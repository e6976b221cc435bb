"""The range in which one exponential serves both directions of a softmax.

e = exp(S - c) with one reference c for every row and column of a launch lets partial sums of e merge by plain
addition: lse = c + log(sum e). It is exact as long as a logit is not so far above c that sums overflow, nor a
row's statistic so far below it that its terms fade out. float32 spans 2^-126 to 2^128, float64 2^-1022 to
2^1024; at either end room is kept for 2^20 terms, and at the lower for 24 or 53 bits of precision.
"""

import torch

# Nats by which a logit may exceed c.
HEADROOM = {torch.float32: 73.0, torch.float64: 690.0}
# Nats below c down to which a row's log-sum-exp has lost nothing.
FOOTROOM = {torch.float32: 57.0, torch.float64: 655.0}
# exp(S - lse_y) = p exp(lse_x - lse_y) with p = exp(S - lse_x) <= 1. Where p underflows the left side counts for
# nothing (below 1e-14, 1e-200), as long as no lse_x exceeds an lse_y by this many nats.
SPREAD = {torch.float32: 55.0, torch.float64: 240.0}
