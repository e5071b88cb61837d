"""Named acceleration settings, measured in closed loop on the tiny models (see README, "What it does to a video")."""

from __future__ import annotations

from .correct import CorrectionConfig
from .engine import Acceleration, HistoryGuidedConfig, SchedulerConfig
from .policy import TriModalConfig

BALANCED = Acceleration(scheduler=SchedulerConfig(TriModalConfig(0.0, 0.6)))
FAST = Acceleration(scheduler=SchedulerConfig(TriModalConfig(0.0, 1.2, max_skip=8)))
HISTORY_GUIDED = Acceleration(history_guided=HistoryGuidedConfig(0.10), correction=CorrectionConfig())

PRESETS = {"balanced": BALANCED, "fast": FAST, "history-guided": HISTORY_GUIDED}
