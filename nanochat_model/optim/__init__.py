"""One optimizer, two kinds of group: Muon for matrices inside the layers, AdamW for tables and scalars.

Shares nothing with torch.optim's interface but the names: learning rates are fixed at construction and every step is given its
multipliers, so that nothing about the schedule is stored here.
"""

from __future__ import annotations

from nanochat_model.optim.muon_adamw import MuonAdamW, build_optimizer

__all__ = ["MuonAdamW", "build_optimizer"]
